"""Where a partly frozen network can be cut in two, so that what is below the cut runs once for each row.

cut = find_cut(model, batch)                 # the value that crosses the cut, and how to go on from it
value = cut.capture(batch)                   # runs the network up to the cut
logits = logits_of(cut.rest(batch, value))   # runs the rest of it

Candidates come from a recorded forward pass, the latest first; the first is taken that `trust.py` finds to be right. A
network that uses more of its frozen part than crosses a cut has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..batch_sizes import largest_output
from ..data.replay import borrowed_generators
from ..objective import logits_of
from .cut import Cut as Cut
from .cut import NoCut as NoCut
from .cut import emptied, lowest_trained
from .trace import Call, mode_of, only_tensor, trace
from .trust import difference

_TRIED = 3  # of the last frozen modules, whose output may cross


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


def _find(model: nn.Module, inputs: dict[str, Any], anatomy: Anatomy, lowest: int) -> Cut:
    with mode_of(model, training=True), torch.random.fork_rng(), torch.no_grad(), largest_output([model]) as seen:
        root, output = trace(model, inputs)
    first = next((call for call in root.inside() if not call.children and not call.frozen), None)
    if first is None:
        raise NoCut("no module of it trains.")
    units = _units(root, first.index)
    units = [unit for unit in units if all(_is_below(name, anatomy, lowest) for name in _parameters(unit))]
    if not any(True for unit in units for _ in unit.module.parameters()):
        raise NoCut(f"nothing is frozen below {first.name!r}, the first module that trains.")
    found: list[str] = []
    for candidate in _candidates(model, inputs, root, first, units, logits_of(output), seen.bytes):
        why = difference(candidate, inputs)
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
    model: nn.Module,
    inputs: Mapping[str, Any],
    root: Call,
    first: Call,
    units: Sequence[Call],
    logits: Tensor,
    largest: int,
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
        if mask is not None and per_token and value.shape[:2] != mask.shape:
            return
        if mask is not None and not per_token and steps is None:
            return  # the length of a batch's texts, which placeholders need, does not cross
        yield Cut(
            model, call.name, at_input, tuple(value.shape[1:]), value.dtype, per_token, steps, stubs, floats,
            (rows, mask.shape[1] if mask is not None else None), largest // rows, _memory_format(value),
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
        stubs = {unit.module: emptied(unit.output) for unit in units if unit.index <= last.index}
        yield from made(last, value, False, None, tuple(stubs.items()))
        # again with small frozen modules at work, as biases by relative position are needed by all blocks
        alike = {module: shape for module, shape in stubs.items() if shape == emptied(last.output)}
        if len(alike) < len(stubs):
            yield from made(last, value, False, None, tuple(alike.items()))


def _memory_format(value: Tensor) -> torch.memory_format:
    last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not value.is_contiguous() else torch.contiguous_format


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
