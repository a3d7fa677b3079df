"""example_id: the stable identity of a row, which caches and error messages name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import TransferError
from .columns import EXAMPLE_ID, values

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "test")
_ROW_BITS, _SPLIT_BITS = 40, 4
_DOMAIN_SHIFT = _ROW_BITS + _SPLIT_BITS


def first_id(split: str, domain: int = 0) -> int:
    """The example_id of row 0 of a split: 2^40 apart by split, 2^44 apart by domain, so that none are shared."""
    return (domain << _DOMAIN_SHIFT) + (SPLITS.index(split) << _ROW_BITS)


def describe(example_id: int) -> str:
    """Where a row was when its split was loaded, e.g. `train row 5 (example_id 5)`."""
    domain, split = example_id >> _DOMAIN_SHIFT, (example_id >> _ROW_BITS) & ((1 << _SPLIT_BITS) - 1)
    row = example_id & ((1 << _ROW_BITS) - 1)
    where = f"{SPLITS[split] if split < len(SPLITS) else f'split {split}'} row {row}"
    return f"{where}{f' of domain {domain}' if domain else ''} (example_id {example_id})"


def add_example_id(dataset: Dataset, split: str = "train") -> Dataset:
    """Numbers the rows by their present position; a dataset that has the column keeps it.

    Raises:
        TransferError: If an `example_id` column is there that is not a unique whole number for each row.
    """
    if EXAMPLE_ID not in dataset.column_names:
        ids = np.arange(len(dataset), dtype=np.int64) + first_id(split)
        return dataset.add_column(EXAMPLE_ID, ids)
    ids = np.asarray(values(dataset, EXAMPLE_ID))
    if ids.dtype.kind not in "iu" or len(np.unique(ids)) != len(ids) or (len(ids) and ids.min() < 0):
        raise TransferError(
            f"The data has a column {EXAMPLE_ID!r} of its own that is not one unique whole number >= 0 a row. "
            f"Rename it: dataset.rename_column({EXAMPLE_ID!r}, ...)."
        )
    return dataset
