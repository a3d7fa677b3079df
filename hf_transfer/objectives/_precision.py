"""Numbers that stay right: float32 at least, whatever the precision around, and no division by a vanishing spread."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..objective import wide

Function = TypeVar("Function", bound=Callable[..., Tensor])


def _wide(x: Any) -> Any:
    """A floating tensor in float32 at least; anything else as it is."""
    return wide(x) if torch.is_tensor(x) and x.is_floating_point() else x


def full_precision(function: Function) -> Function:
    """A function of tensors, the first argument being one, that computes in float32 at least, under autocast too."""

    @functools.wraps(function)
    def computed(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})

    return cast(Function, computed)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last axis: (..., C) each -> (...)."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def standardized(x: Tensor, dim: int = -1) -> Tensor:
    """(x - mean) / standard deviation along an axis, the deviation over all n (not n - 1).

    Where x is constant up to rounding the score is not defined: 0 there, without a gradient (dividing by a small
    number instead gives gradients of 1e7 at a classifier that starts at zero).
    """
    centred = x - x.mean(dim=dim, keepdim=True)
    variance = centred.square().mean(dim=dim, keepdim=True)
    rounding = 8 * torch.finfo(x.dtype).eps * x.detach().abs().amax(dim=dim, keepdim=True)
    constant = variance.detach() <= rounding.square()
    return torch.where(constant, 0, centred / torch.where(constant, 1, variance).sqrt())


def direction(x: Tensor, dim: int) -> Tensor:
    """x scaled to length 1 along an axis; where x is 0 it stays so, with the gradient of x itself."""
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / torch.where(length > 0, length, 1)


def correlation_distance(a: Tensor, b: Tensor, dim: int = -1) -> Tensor:
    """1 - Pearson's correlation along an axis, in [0, 2]; 0 where a and b are equal, constant ones included."""
    return (standardized(a, dim) - standardized(b, dim)).square().mean(dim=dim) / 2
