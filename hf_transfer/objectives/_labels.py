"""Which items of a batch carry a label: the one reading of the label column that the terms share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..objective import UNLABELLED


def labelled_items(labels: Tensor) -> Tensor:
    """Which items carry a label; an item is a row, or a token.

    Args:
        labels: Integers (N,) or (N, T), where -100 = unlabelled; or soft labels (N, C) or (N, T, C), floating, where a
            row of -100 = unlabelled.

    Returns:
        Bool, of the shape of the items: (N,) or (N, T).
    """
    labelled = labels != UNLABELLED
    return labelled.any(dim=-1) if labels.is_floating_point() and labels.dim() > 1 else labelled


def number_of(mask: Tensor | None) -> Tensor:
    """How many items a mask marks, 0-d float32; 0 where the batch has no such column."""
    return torch.zeros(()) if mask is None else mask.sum().float()


def items_of(batch: Mapping[str, Any]) -> Tensor | None:
    """`labelled_items` of a collated batch; None where it has no labels."""
    labels = batch.get("labels")
    return None if labels is None else labelled_items(labels)
