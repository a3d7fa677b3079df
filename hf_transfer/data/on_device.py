"""Stored images whose random operations run on an accelerator: the collator hands over 8-bit pixels of the final size.

A quarter of the bytes is copied, and the processes that load do no more than to crop and resize. `finished` is a pure
function of what is in the batch: draws are integer arithmetic on (seed, epoch, example_id), the same on every device.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from .collate import Collator, Row
from .columns import EPOCH, EXAMPLE_ID
from .draws import Draws
from .stored_rows import PIXEL_VALUES, StoredRow, StoredRows, are_of_one_batch


def handing_over(collator: Any, dataset: Any, device: torch.device) -> Any:
    """The collator of a training loader.

    Args:
        collator: As it was made.
        dataset: The training rows.
        device: Where the model is.

    Returns:
        One that leaves `on_device`'s part to `finished`, where there is an accelerator, stored images, and nothing
        that blends them in the collator; else the same.
    """
    rows = _stored(dataset)
    plain = type(collator) is Collator and collator.mixing is None
    return HandOver(collator) if rows is not None and rows.random and plain and worth_it(device) else collator


def worth_it(device: torch.device) -> bool:
    """Whether the work is better done there."""
    return device.type != "cpu"


class HandOver:
    """A Collator that gives `pixel_values` as (N, C, H, W) uint8 and the `epoch` of each row (N,) int64.

    Args:
        collator: Of the same rows.
    """

    def __init__(self, collator: Collator) -> None:
        self.collator = copy.copy(collator)
        self.collator.inputs = _host_pixels

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = self.collator(rows)
        return {**batch, EPOCH: torch.tensor([row[EPOCH] for row in rows])}


def finished(batch: dict[str, Any], dataset: Any) -> dict[str, Any]:
    """A batch with `pixel_values` as the model takes them; one that was not handed over as it is.

    Args:
        batch: On the device.
        dataset: The training rows.
    """
    rows = _stored(dataset)
    if rows is None or EPOCH not in batch or PIXEL_VALUES not in batch:
        return batch
    rest = {name: value for name, value in batch.items() if name != EPOCH}
    draws = Draws(rows.seed, batch[EPOCH], batch[EXAMPLE_ID])
    return {**rest, PIXEL_VALUES: rows.transform.on_device(batch[PIXEL_VALUES], draws)}


def _host_pixels(rows: Sequence[StoredRow]) -> dict[str, Tensor]:
    assert are_of_one_batch(rows)
    stored, places = rows[0].rows, [row.place for row in rows]
    return {PIXEL_VALUES: stored.host_pixels(places, Draws(stored.seed, rows[0].epoch, stored.ids[places]))}


def _stored(dataset: Any) -> StoredRows | None:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset if isinstance(dataset, StoredRows) else None
