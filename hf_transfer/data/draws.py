"""Random numbers by counter: a function of (seed, epoch, example_id, purpose) and of nothing else, a batch at a time.

Integer arithmetic (splitmix64, as `replay.key`), so the bits are the same on every device and in whatever batch a row
is. Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", is the idea.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .replay import key

_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Draws:
    """What a batch of rows draws in an epoch.

    Args:
        seed: Of the augmentation.
        epoch: Counted from 0; a number, or (N,) int64.
        example_ids: (N,) int64.
    """

    def __init__(self, seed: int, epoch: int | Tensor, example_ids: Tensor) -> None:
        self.seed, self.epoch, self.example_ids = seed, epoch, example_ids
        if isinstance(epoch, int):
            state = torch.full_like(example_ids, _signed(key(seed, epoch)))
        else:
            state = _mixed(torch.full_like(example_ids, _signed(key(seed))), epoch)
        self._rows = _mixed(state, example_ids)  # (N,)

    def __len__(self) -> int:
        return len(self.example_ids)

    def __getitem__(self, rows: slice) -> Draws:
        """Those of some of the rows."""
        return Draws(
            self.seed, self.epoch if isinstance(self.epoch, int) else self.epoch[rows], self.example_ids[rows]
        )

    def bits(self, purpose: int, count: int) -> Tensor:
        """(N, count) int64, 64 random bits: `replay.key(seed, epoch, example_id[n], purpose << 32 | i)` at [n, i]."""
        counters = torch.arange(purpose << 32, (purpose << 32) + count, device=self._rows.device)
        return _mixed(self._rows[:, None], counters)

    def uniform(self, purpose: int, count: int) -> Tensor:
        """(N, count) float64 in [0, 1)."""
        return _shifted(self.bits(purpose, count), 11).double().mul_(2.0**-53)


def _mixed(state: Tensor, part: int | Tensor) -> Tensor:
    """One step of `replay.key` on int64, whose products wrap around as those of uint64 do."""
    state = state + part + _signed(_GAMMA)
    state = (state ^ _shifted(state, 30)) * _signed(_FIRST)
    state = (state ^ _shifted(state, 27)) * _signed(_SECOND)
    return state ^ _shifted(state, 31)


def _shifted(value: Tensor, by: int) -> Tensor:
    """The logical shift to the right; that of int64 drags the sign along."""
    return (value >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
