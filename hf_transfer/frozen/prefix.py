"""Where a partly frozen network can be cut in two, so that what is below the cut runs once for each row.

cut = find_cut(model, batch)                 # the value that crosses the cut, and how to go on from it
value = cut.capture(batch)                   # runs the network up to the cut
with cut.resumed(value):
    logits = model(**cut.placeholders(batch, value)).logits          # runs the rest of it

The network itself goes on from a stored value: for that long its frozen modules give placeholders, and the last of
them the value. So hooks, gradients and checkpoints are those of the ordinary network, whatever its architecture is.
No cut is taken on trust: logits and gradients of the rest are compared with those of the whole, in evaluation and in
training mode; a network that uses more of its frozen part than crosses the cut is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, plain_model
from ..data.replay import borrowed_generators
from ..errors import TransferError
from ..objective import logits_of
from .trace import Call, mode_of, only_tensor, trace

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5  # of logits and gradients, relative to the largest
_TRIED = 3  # of the last frozen modules, whose output may cross
_NOT_WEIGHTS = ("_name_or_path", "id2label", "label2id", "label_names", "num_classes", "num_labels", "problem_type")


class NoCut(TransferError):
    """A network that cannot be cut, or is not to be; the message says why."""


class _Reached(BaseException):
    """Ends a forward pass at the cut; not an Exception, which a network may catch."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


@dataclass(frozen=True, eq=False)
class Cut:
    """A place at which a network can be cut. Made by `find_cut`.

    Attributes:
        model: The network; its forward is changed only within `resumed`.
        name: Path of the module at the cut.
        at_input: Whether the value is that module's input (else its output).
        shape: Shape of one row's value, as found; (T, D) where `per_token`.
        dtype: Of the value.
        per_token: Whether there is a value for each token of a text.
        steps: The modules that are all the rest of the network, one after the other; None where it is more than these.
        stubs: Frozen modules below the cut and the shapes of what they gave, which placeholders stand for.
        inputs: Of the network's floating-point inputs the shape of a row, and the dtype.
    """

    model: nn.Module
    name: str
    at_input: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    per_token: bool
    steps: tuple[nn.Module, ...] | None
    stubs: tuple[tuple[nn.Module, Any], ...]
    inputs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    _sizes: tuple[int, int | None]

    def __str__(self) -> str:
        side = "before" if self.at_input else "after"
        return f"{side} {self.name}, {'x'.join(map(str, self.shape))} numbers a {'text' if self.per_token else 'row'}"

    @property
    def module(self) -> nn.Module:
        """The module at the cut."""
        return self.model.get_submodule(self.name)

    def capture(self, inputs: Mapping[str, Any]) -> Tensor:
        """Runs the network up to the cut, in eval mode without gradient.

        Args:
            inputs: The network's, by name.

        Returns:
            The value that crosses, (N, ...).
        """

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            raise _Reached(next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value)))

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            raise _Reached(cast(Tensor, only_tensor(output)))

        handle = (
            self.module.register_forward_pre_hook(before, with_kwargs=True)
            if self.at_input
            else self.module.register_forward_hook(after)
        )
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad():
                self.model(**inputs)
        except _Reached as reached:
            return reached.value
        finally:
            handle.remove()
            for module in training:
                module.training = True
        raise TransferError(f"{self.name} did not run, so nothing crossed the cut {self}.")

    @contextmanager
    def resumed(self, value: Tensor) -> Iterator[None]:
        """Within it the network's forward goes on from a value, whatever it is given for its frozen part.

        Args:
            value: What `capture` gave, (N, ...).
        """
        changed: list[tuple[nn.Module, Callable[..., Any]]]
        if self.steps is not None:
            changed = [(self.model, partial(_chain, self.steps, value))]
        else:
            changed = [(module, partial(self._stand_in, shape, value)) for module, shape in self.stubs[:-1]]
            changed.append((self.module, partial(_in_its_place, self.stubs[-1][1], value)))
        before = [module.__dict__.get("forward") for module, _ in changed]  # accelerate puts autocast there
        for module, forward in changed:
            module.__dict__["forward"] = forward
        try:
            yield
        finally:
            for (module, _), own in zip(changed, before, strict=True):
                if own is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = own

    def _stand_in(self, shape: Any, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What a frozen module gives within `resumed`: zeros that take no memory, of the batch's own size."""
        rows, tokens = self._sizes

        def zeros(size: torch.Size) -> Tensor:
            now = [len(value) if size[0] == rows else size[0], *size[1:]]
            if self.per_token and len(now) > 1 and now[1] == tokens:
                now[1] = value.shape[1]
            return value.new_zeros(()).expand(now)

        return _filled(shape, zeros)

    def placeholders(self, inputs: Mapping[str, Any], value: Tensor) -> dict[str, Any]:
        """The network's inputs without its images or sounds: in their place is what only has their shape.

        Args:
            inputs: What there is of them: token ids, masks.
            value: What crosses the cut, (N, ...).
        """
        if self.steps is not None:
            return dict(inputs)
        empty = {
            name: value.new_zeros((), dtype=dtype).expand(len(value), *shape)
            for name, (shape, dtype) in self.inputs.items()
        }
        return {**empty, **inputs}

    def fingerprint(self, anatomy: Anatomy, computed_in: str = "") -> str:
        """Hexadecimal digits that change with what crosses the cut: weights and buffers below it, its place.

        Args:
            anatomy: The network's.
            computed_in: The dtype of autocast, where there is one.
        """
        model = self.model
        lowest = lowest_trained(model, anatomy)
        tensors = [*model.named_parameters(), *model.named_buffers()]
        config: Any = getattr(model, "config", None)
        facts = {} if config is None else {k: v for k, v in config.to_dict().items() if k not in _NOT_WEIGHTS}
        known = [str(self), computed_in, type(model).__name__, facts]
        digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
        for name, tensor in sorted(tensors, key=lambda item: item[0]):
            if anatomy.group(name) < lowest:
                owner = model.get_submodule(name.rpartition(".")[0])
                digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{owner.extra_repr()}".encode())
                digest.update(cast(Any, tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        return digest.hexdigest()


def find_cut(model: nn.Module, batch: Mapping[str, Any], anatomy: Anatomy | None = None) -> Cut:
    """The last place at which the frozen lower part of a network ends, and one value crosses.

    Args:
        model: A network that a Tuning was applied to, on any device.
        batch: Its inputs for two rows or more, on that device; of texts, some of unequal length.
        anatomy: The network's.

    Returns:
        The cut.

    Raises:
        NoCut: Naming why there is none: nothing below is frozen, adapters, or the rest needs more than one value.
    """
    anatomy = Anatomy.of(model) if anatomy is None else anatomy
    lowest = lowest_trained(model, anatomy)
    with borrowed_generators():
        return _find(model, dict(batch), anatomy, lowest)


def lowest_trained(model: nn.Module, anatomy: Anatomy) -> int:
    """The first group of a network in which something trains; those before it are frozen.

    Args:
        model: The network.
        anatomy: Its anatomy.

    Returns:
        From 1.

    Raises:
        NoCut: If there is nothing to cut: the network is wrapped, nothing in it trains, or nothing is frozen below.
    """
    if plain_model(model) is not model:
        raise NoCut(f"{type(model).__name__} wraps the network (an adapter, or a compiled one).")
    trained = {anatomy.group(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise NoCut("nothing in the network trains.")
    if not min(trained):
        raise NoCut("nothing is frozen below what trains: the first layers train.")
    return min(trained)


def _find(model: nn.Module, inputs: dict[str, Any], anatomy: Anatomy, lowest: int) -> Cut:
    with mode_of(model, training=True), torch.random.fork_rng(), torch.no_grad():
        root, output = trace(model, inputs)
    first = next((call for call in root.inside() if not call.children and not call.frozen), None)
    if first is None:
        raise NoCut("no module of it trains.")
    units = _units(root, first.index)
    units = [unit for unit in units if all(_is_below(name, anatomy, lowest) for name in _parameters(unit))]
    if not any(True for unit in units for _ in unit.module.parameters()):
        raise NoCut(f"nothing is frozen below {first.name!r}, the first module that trains.")
    found: list[str] = []
    for candidate in _candidates(model, inputs, root, first, units, logits_of(output)):
        why = _difference(candidate, inputs)
        if why is None:
            return candidate
        found.append(f"{candidate}: {why}")
    raise NoCut(f"{type(model).__name__} cannot be cut below {first.name!r} ({'; '.join(found) or 'no one value'}).")


def _parameters(unit: Call) -> list[str]:
    return [f"{unit.name}.{name}" for name, _ in unit.module.named_parameters()]


def _is_below(name: str, anatomy: Anatomy, group: int) -> bool:
    return anatomy.group(name) < group


def _units(root: Call, end: int) -> list[Call]:
    """The outermost frozen calls that began before a call and returned one tensor."""
    if root.index >= end:
        return []
    if root.frozen and only_tensor(root.output) is not None:
        return [root]
    return [unit for child in root.children for unit in _units(child, end)]


def _candidates(
    model: nn.Module, inputs: Mapping[str, Any], root: Call, first: Call, units: Sequence[Call], logits: Tensor
) -> Iterator[Cut]:
    """Cuts to try, the latest first: at the input of what trains, then at the output of the last frozen module."""
    entry = _entry(first)
    rows = len(logits)
    mask = inputs.get("attention_mask")
    floats = {
        name: (tuple(value.shape[1:]), value.dtype)
        for name, value in inputs.items()
        if torch.is_tensor(value) and value.is_floating_point()
    }

    def made(call: Call, value: Tensor | None, at_input: bool, steps: Any, stubs: Any) -> Iterator[Cut]:
        if value is None or value.dim() < 2 or len(value) != rows or not value.is_floating_point():
            return
        per_token = mask is not None and value.dim() == 3
        if per_token and value.shape[:2] != mask.shape:
            return
        if mask is not None and not per_token and steps is None:
            return  # the length of a batch's texts, which placeholders need, does not cross
        yield Cut(
            model, call.name, at_input, tuple(value.shape[1:]), value.dtype, per_token, steps, stubs, floats,
            (rows, mask.shape[1] if mask is not None else None),
        )  # fmt: skip

    if (steps := _steps(entry, entry.given, logits)) is not None:
        yield from made(entry, entry.given, True, steps, ())
    for last in units[: -_TRIED - 1 : -1]:
        value = only_tensor(last.output)
        following = _following(last)
        if following and (steps := _steps(following[0], value, logits)) is not None:
            yield from made(last, value, False, steps, ())
        if value is None or sum(call.module is last.module for call in root.inside()) > 1:
            continue
        stubs = {unit.module: _emptied(unit.output) for unit in units if unit.index <= last.index}
        yield from made(last, value, False, None, tuple(stubs.items()))
        # again with small frozen modules at work, as biases by relative position are needed by all blocks
        alike = {module: shape for module, shape in stubs.items() if shape == _emptied(last.output)}
        if len(alike) < len(stubs):
            yield from made(last, value, False, None, tuple(alike.items()))


def _entry(first: Call) -> Call:
    """The outermost call that begins with a given one."""
    entry = first
    for around in first.ancestors():
        between = [call for call in around.inside() if around.index < call.index < first.index]
        if around.parent is None or any(call not in first.ancestors() for call in between):
            return entry
        entry = around
    return entry


def _following(call: Call) -> list[Call]:
    """The outermost calls that began after one ended."""
    around = set(call.ancestors())
    inside = set(call.inside())
    later: list[Call] = []
    for parent in call.ancestors():
        later += [c for c in parent.children if c.index > call.index and c not in around and c not in inside]
    return sorted(later, key=lambda c: c.index)


def _steps(entry: Call, value: Tensor | None, logits: Tensor) -> tuple[nn.Module, ...] | None:
    """The modules from a call on, where each is given what the one before returned and the last gives the logits."""
    calls = [entry, *_following(entry)]
    for call in calls:
        if call.given is None or call.given is not value or not torch.is_tensor(call.output):
            return None
        value = call.output
    return tuple(call.module for call in calls) if value is logits else None


def _emptied(output: Any) -> Any:
    """What a module returned, with the shape of its one tensor in the tensor's place."""
    if torch.is_tensor(output):
        return output.shape
    return type(output)(item.shape if torch.is_tensor(item) else item for item in output)


def _filled(emptied: Any, make: Callable[[torch.Size], Tensor]) -> Any:
    """What `_emptied` made, with a tensor in its place."""
    if isinstance(emptied, torch.Size):
        return make(emptied)
    return type(emptied)(make(item) if isinstance(item, torch.Size) else item for item in emptied)


def _in_its_place(emptied: Any, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _filled(emptied, lambda _: value)


def _chain(steps: Sequence[nn.Module], value: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    for step in steps:
        value = step(value)
    return {"logits": value}


# ---- no cut is taken on trust ---------------------------------------------------------------------------------------


def _difference(cut: Cut, inputs: Mapping[str, Any]) -> str | None:
    """Why a cut is wrong; None where the rest of the network answers and learns as the whole does."""
    mask = inputs.get("attention_mask")
    kept = {name: value for name, value in inputs.items() if name not in cut.inputs}
    try:
        value = cut.capture(inputs)
        if mask is not None and (why := _differs_alone(cut, inputs, mask, value)):
            return why
        if cut.per_token:  # what a cache holds: attended tokens
            value = value * mask[..., None].to(value.dtype)
        for training in (False, True):
            whole = _answers(cut.model, inputs, training)
            with cut.resumed(value.clone()):
                rest = _answers(cut.model, cut.placeholders(kept, value), training)
            for ours, theirs in zip(rest, whole, strict=True):
                if not _alike(ours, theirs):
                    return f"the rest is not the whole in {'training' if training else 'evaluation'} mode"
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError) as error:
        return " ".join(str(error).split())[:200]  # a forward that wants more than a placeholder
    return None


def _differs_alone(cut: Cut, inputs: Mapping[str, Any], mask: Tensor, value: Tensor) -> str | None:
    """Whether what crosses depends on how a text is padded."""
    row = int(mask.sum(1).argmin())
    kept = mask[row].bool()
    if kept.all():
        return None
    alone = {
        name: item[row : row + 1][:, kept] if item.shape[:2] == mask.shape else item[row : row + 1]
        for name, item in inputs.items()
    }
    there = value[row][kept] if cut.per_token else value[row]
    return None if _alike(cut.capture(alone)[0], there) else "a text's values depend on how it is padded"


def _answers(model: nn.Module, inputs: Mapping[str, Any], training: bool) -> list[Tensor | None]:
    """The logits, and the gradient of each parameter that trains; None for one that was not used."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with mode_of(model, training=training), torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        logits = logits_of(model(**inputs)).float()
        mask = inputs.get("attention_mask")
        if mask is not None and logits.dim() == 3 and logits.shape[:2] == mask.shape:
            logits = logits * mask[..., None]  # padding has no label
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.device)
        gradients = torch.autograd.grad((logits * weights).sum(), trained, allow_unused=True)
    return [logits.detach(), *gradients]


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    scale = float(b.abs().max()) if b.numel() else 0.0
    return bool((a - b).abs().max() <= TOLERANCE * max(scale, 1.0)) if b.numel() else True
