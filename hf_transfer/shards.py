"""Tensors that FSDP cuts into parts, one on each process: what stands beside them is cut alike, summed over, gathered.

FSDP2 (torch's `fully_shard`) turns a model's parameters into DTensors. Terms that read weights and averages of them
hold tensors of their own, which must follow. Every other tensor passes through these functions as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from .dissection.wrapping import is_instance


def is_sharded(tensor: Any) -> bool:
    """Whether this process holds a part of it only."""
    return is_instance(tensor, "torch.distributed.tensor", "DTensor")


def own_part(tensor: Any) -> Tensor:
    """The part that this process holds, in the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """All of it, with its gradient; each process must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def gathered(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict, its sharded tensors whole and on the CPU, nested ones' too; each process must call this."""
    return {name: _gathered(value) for name, value in state.items()}


def _gathered(value: Any) -> Any:
    if isinstance(value, Mapping):
        return gathered(value)
    return whole(value).cpu() if is_sharded(value) else value


def cut_like(value: Any, other: Any) -> Any:
    """A tensor that is whole on every process, on another's device and cut as that is; one that is cut stays so.

    What is no tensor, as a term's extra state, stays as it is.
    """
    if not isinstance(other, Tensor):
        return value
    tensor = value.to(other.device)
    if not is_sharded(other) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = cast(Any, other).device_mesh
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=cast(Any, other).placements)


def over_parts(function: Callable[..., Tensor], *weights: Sequence[Any]) -> Tensor:
    """A sum over the elements of weights, also of those whose parts lie on several processes.

    Args:
        function: Lists of tensors -> 0-d; a sum over their elements, so that those of parts add up to that of the
            whole.
        *weights: One list or several of the same length, cut alike; on every process the same.

    Returns:
        0-d, the same on every process; its gradient reaches each process's parts.
    """
    cut = [i for i, weight in enumerate(weights[0]) if is_sharded(weight)]
    if not cut:
        return function(*weights)
    from torch.distributed.tensor import DTensor, Partial

    mesh = weights[0][cut[0]].device_mesh
    own = function(*([own_part(each[i]) for i in cut] for each in weights))
    total = DTensor.from_local(own, mesh, [Partial()] * mesh.ndim, run_check=False).full_tensor()
    held = [i for i in range(len(weights[0])) if i not in set(cut)]
    return total + function(*([each[i] for i in held] for each in weights)) if held else total
