"""A place at which a partly frozen network is cut in two: the value that crosses, and how to go on from it.

The network itself goes on from a stored value. Where what is left of it is a chain of modules, these run; else its
forward does, while its frozen modules give placeholders, and the last of them the value. So gradients and checkpoints
are those of the ordinary network, whatever its architecture is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, plain_model
from ..errors import TransferError
from .trace import only_tensor

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
        model: The network; of its frozen modules the forward is changed within `rest`.
        name: Path of the module at the cut.
        at_input: Whether the value is that module's input (else its output).
        shape: Shape of one row's value, as found; (T, D) where `per_token`.
        dtype: Of the value.
        per_token: Whether there is a value for each token of a text.
        steps: The modules that are all the rest of the network, one after the other; None where it is more than these.
        stubs: Frozen modules below the cut and the shapes of what they gave, which placeholders stand for.
        inputs: Of the network's floating-point inputs the shape of a row, and the dtype.
        sizes: Rows, and tokens where the inputs are texts, of the batch that `stubs` was found with.
        largest: Bytes a row of that batch of the largest output of a module.
        memory_format: Of the value, as the network lays it out.
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
    sizes: tuple[int, int | None]
    largest: int
    memory_format: torch.memory_format

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
        with self.capturing() as run:
            return run(inputs)

    @contextmanager
    def capturing(self) -> Iterator[Callable[[Mapping[str, Any]], Tensor]]:
        """`capture` for many batches: the network is in eval mode for all of them."""

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            raise _Reached(next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value)))

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            raise _Reached(cast(Tensor, only_tensor(output)))

        def run(inputs: Mapping[str, Any]) -> Tensor:
            try:
                with torch.no_grad():  # inference mode would leave its mark on what a network keeps, such as positions
                    self.model(**inputs)
            except _Reached as reached:
                return reached.value
            raise TransferError(f"{self.name} did not run, so nothing crossed the cut {self}.")

        handle = (
            self.module.register_forward_pre_hook(before, with_kwargs=True)
            if self.at_input
            else self.module.register_forward_hook(after)
        )
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            yield run
        finally:
            handle.remove()
            for module in training:
                module.training = True

    def rest(self, inputs: Mapping[str, Any], value: Tensor) -> Any:
        """Runs the network behind the cut.

        Args:
            inputs: The network's, by name; images and sounds, which only what is below the cut reads, are not needed.
            value: What `capture` gave, (N, ...).

        Returns:
            Its outputs; a mapping with the logits, where no more than a chain of modules ran.
        """
        if self.steps is not None:
            for step in self.steps:
                value = step(value)
            return {"logits": value}
        with self._resumed(value):
            return self.model(**self._placeholders(inputs, value))

    @contextmanager
    def _resumed(self, value: Tensor) -> Iterator[None]:
        """Within it the network's forward goes on from a value, whatever it is given for its frozen part."""
        changed: list[tuple[nn.Module, Callable[..., Any]]]
        changed = [(module, partial(self._stand_in, shape, value)) for module, shape in self.stubs[:-1]]
        changed.append((self.module, partial(_in_its_place, self.stubs[-1][1], value)))
        before = [module.__dict__.get("forward") for module, _ in changed]  # what others put there stays
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
        """What a frozen module gives within `_resumed`: zeros that take no memory, of the batch's own size."""
        rows, tokens = self.sizes

        def zeros(size: torch.Size) -> Tensor:
            now = [len(value) if size[0] == rows else size[0], *size[1:]]
            if self.per_token and len(now) > 1 and now[1] == tokens:
                now[1] = value.shape[1]
            return value.new_zeros(()).expand(now)

        return _filled(shape, zeros)

    def _placeholders(self, inputs: Mapping[str, Any], value: Tensor) -> dict[str, Any]:
        """The network's inputs; for images and sounds stands what only has their shape."""
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
        if self.memory_format != torch.contiguous_format:
            known.append(str(self.memory_format))  # in which convolutions round otherwise
        digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
        for name, tensor in sorted(tensors, key=lambda item: item[0]):
            if anatomy.group(name) < lowest:
                owner = model.get_submodule(name.rpartition(".")[0])
                digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{owner.extra_repr()}".encode())
                digest.update(cast(Any, tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        return digest.hexdigest()


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


def emptied(output: Any) -> Any:
    """What a module returned, with the shape of its one tensor in the tensor's place."""
    if torch.is_tensor(output):
        return output.shape
    return type(output)(item.shape if torch.is_tensor(item) else item for item in output)


def _filled(emptied: Any, make: Callable[[torch.Size], Tensor]) -> Any:
    """What `emptied` made, with a tensor in its place."""
    if isinstance(emptied, torch.Size):
        return make(emptied)
    return type(emptied)(make(item) if isinstance(item, torch.Size) else item for item in emptied)


def _in_its_place(emptied: Any, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _filled(emptied, lambda _: value)
