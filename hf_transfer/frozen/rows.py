"""Rows that are read from a prefix cache, and the batches that they make: what crosses the cut in place of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from ..data.columns import EXAMPLE_ID
from ..data.replay import Replayable
from ..data.stored_rows import StoredRows
from .cache import PrefixCache

if TYPE_CHECKING:
    from datasets import Dataset

    from ..data.collate import Collator

ACTIVATION = "prefix_activation"
"""The column of a batch with what crosses the cut, (N, ...)."""
PLACE = "prefix_place"
"""The column of a row with its cache and view."""
_IMAGES = "pixel_values"
_BLANK = torch.zeros(())


class CachedBatch(dict[str, Tensor]):
    """A whole batch, as `CachedRows` gives it where its columns can be cut from tensors."""


class CachedRows(TorchDataset[dict[str, Any]], Replayable):
    """A prepared dataset whose images are read from a cache of activations; a collator of its kind makes the batches.

    The trainer sets its epoch; epoch e shows view e % views, as augmented as the uncached rows are in that epoch.

    Args:
        rows: What `data.transforms.prepare` returned, or its images' store. Its inputs are not read, those of texts
            excepted.
        cache: Of these rows.
        number: Which of the collator's caches it is.
        collator: Of the uncached rows, where batches need nothing but their labels, `domain`, `example_id` and what
            crosses the cut: they are then cut from tensors. Without it a batch is made row by row.
    """

    def __init__(
        self, rows: Dataset | StoredRows, cache: PrefixCache, number: int, collator: Collator | None = None
    ) -> None:
        Replayable.__init__(self)
        self.number, self.views, self.cache = number, cache.views, cache
        self._columns = rows.columns if isinstance(rows, StoredRows) else _columns(rows)
        self.images = "input_ids" not in self._columns
        self._whole: dict[str, Tensor] | None = None
        if collator is not None:
            rows_of_columns = [{n: values[i] for n, values in self._columns.items()} for i in range(len(self))]
            self._whole = collator.targets(rows_of_columns)
            ids = np.asarray(self._columns[EXAMPLE_ID])
            self._places = [] if cache.per_token else [cache.places(ids, view) for view in range(self.views)]

    @property
    def random(self) -> bool:
        return self.views > 1

    def __len__(self) -> int:
        return len(self._columns[EXAMPLE_ID])

    def __getitem__(self, row: int) -> dict[str, Any]:
        found = {name: values[row] for name, values in self._columns.items()}
        if self.images:
            found[_IMAGES] = _BLANK  # which the collator stacks at no cost
        return {**found, PLACE: (self.number, self.epoch.value % self.views)}

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]] | CachedBatch:
        if self._whole is None:
            return [self[row] for row in rows]
        places = np.array(rows)  # torch takes four times as long over a list
        chosen = torch.from_numpy(places)
        batch = CachedBatch({name: values.index_select(0, chosen) for name, values in self._whole.items()})
        view = self.epoch.value % self.views if self.views > 1 else 0
        if self._places:
            batch[ACTIVATION] = self.cache.at(self._places[view][places])
        else:
            batch[ACTIVATION] = self.cache.values(batch[EXAMPLE_ID], view)
        return batch


def _columns(rows: Dataset) -> dict[str, list[Any]]:
    kept = [name for name in rows.column_names if rows.features[name].__class__.__name__ not in ("Image", "Audio")]
    columns = rows.with_format(None).select_columns(kept).to_dict()
    return {name: list(values) for name, values in columns.items()}


class CachedCollator:
    """Batches of cached rows, with what crosses the cut under ACTIVATION; of other rows those that they always gave.

    Args:
        collator: Of the uncached rows.
        caches: In the order of the rows' `number`.
    """

    def __init__(self, collator: Collator, caches: Sequence[PrefixCache]) -> None:
        self.collator, self.caches = collator, list(caches)

    def __call__(self, rows: Sequence[dict[str, Any]] | CachedBatch) -> dict[str, Tensor]:
        if isinstance(rows, CachedBatch):
            return dict(rows)
        place = rows[0].get(PLACE)
        batch = self.collator(rows)
        if place is None:
            return batch
        if batch.get(_IMAGES) is not None:
            del batch[_IMAGES]
        number, view = place
        batch[ACTIVATION] = self.caches[number].values(batch[EXAMPLE_ID], view, batch.get("attention_mask"))
        return batch
