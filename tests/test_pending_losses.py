"""Losses are looked at once, in order, and only then."""

from __future__ import annotations

import math

import pytest
import torch

from hf_transfer.pending_losses import PendingLosses


def test_the_first_bad_one_is_named_and_all_are_forgotten() -> None:
    losses = PendingLosses()
    for i, value in enumerate([1.0, math.inf, math.nan]):
        losses.add(torch.tensor(value), i)
    assert losses.first_bad() == (math.inf, 1)
    assert losses.first_bad() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_finite_losses_pass(dtype: torch.dtype) -> None:
    losses = PendingLosses()
    losses.add(torch.tensor(3.0, dtype=dtype), None)
    assert losses.first_bad() is None
