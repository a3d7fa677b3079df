"""A complete teacher cache: the answers to some rows, found by example_id and read from memory-mapped shards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..data.identity import describe
from ..errors import TransferError
from .cache_files import PER_ROW, CacheKey, IncompleteCache, Manifest, has_leftovers, read_manifest
from .cache_records import Kept

if TYPE_CHECKING:
    from .signal import TeacherSignal


class TeacherCache:
    """A complete cache, memory-mapped. Made by `open` and `write_cache`.

    Attributes:
        key: Whose answers to what.
        kept: What of them is kept.
        classes: C; None where no logits are kept.
        example_ids: (R,) int64 ascending, the rows that it holds, in each view.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.key, self.classes = folder, manifest.key, manifest.classes
        self.kept = Kept(**{**manifest.kept, "temperatures": tuple(manifest.kept["temperatures"])})
        self._shards = manifest.maps(folder)
        self._per_token = "lengths" in manifest.arrays
        counts = [shard.rows for shard in manifest.shards if sum(shard.rows)]
        self._first_row = np.cumsum([0, *(sum(rows) for rows in counts)])[:-1]  # (shards,)
        self.example_ids, self._rows = _index([shard["ids"] for shard in self._shards], counts)
        if self._per_token:
            lengths = [shard["lengths"].astype(np.int64) for shard in self._shards]
            self._lengths = np.concatenate(lengths)  # by row
            self._starts = np.concatenate([np.cumsum(each) - each for each in lengths])  # within the shard

    @classmethod
    def open(cls, folder: str | os.PathLike[str], key: CacheKey) -> TeacherCache:
        """Opens a cache.

        Args:
            folder: Where `write_cache` wrote it.
            key: What it must be of.

        Raises:
            IncompleteCache: If it was not written to the end, or a file is gone; a TransferError.
            TransferError: If there is none, or it is of another teacher, data, transform or number of views.
        """
        path = Path(folder).expanduser()
        manifest = read_manifest(path)
        if manifest is None:
            if has_leftovers(path):
                raise IncompleteCache(
                    f"The teacher cache in {str(path)!r} is incomplete: the run that wrote it was interrupted. Write "
                    "it anew."
                )
            raise TransferError(f"There is no teacher cache in {str(path)!r}: it is written by write_cache().")
        key.check(manifest.key, path)
        return cls(path, manifest)

    def signal(self, example_id: Tensor, view: int, attention_mask: Tensor | None = None) -> TeacherSignal:
        """The teacher's answers to some rows.

        Args:
            example_id: (N,) integers, in any order.
            view: In [0, views).
            attention_mask: (N, T), where answers are a token's: where the tokens of each row are.

        Returns:
            The signal on the CPU, as it was kept (float16 by default); 0 at tokens that are not attended.

        Raises:
            TransferError: If a row or view is not in the cache, or a row has another number of tokens there.
        """
        rows = self._find(example_id.cpu().numpy(), view)  # (N,)
        shard = np.searchsorted(self._first_row, rows, side="right") - 1  # (N,)
        if not self._per_token:
            return self.kept.signal(self._read(shard, rows - self._first_row[shard]), None, self.classes)
        lengths = self._lengths[rows]
        mask = self._tokens(lengths, attention_mask, example_id)  # (N, T) with M tokens
        before = np.cumsum(lengths) - lengths
        items = np.arange(lengths.sum()) + np.repeat(self._starts[rows] - before, lengths)  # (M,)
        return self.kept.signal(self._read(np.repeat(shard, lengths), items), mask, self.classes)

    def _find(self, ids: np.ndarray, view: int) -> np.ndarray:
        """(N,) rows, numbered through all shards."""
        if not 0 <= view < self.key.views:
            raise TransferError(f"view={view}: the teacher cache holds views 0 to {self.key.views - 1}.")
        places = np.searchsorted(self.example_ids, ids)
        places[places == len(self.example_ids)] = 0
        known = self.example_ids[places] == ids
        if not known.all():
            raise TransferError(
                f"The teacher cache in {str(self.folder)!r} holds {len(self.example_ids)} rows, and "
                f"{describe(int(ids[~known][0]))} is not among them. Write one of all rows (drop_last=False), or use "
                "the teacher live."
            )
        return self._rows[view, places]

    def _read(self, shard: np.ndarray, items: np.ndarray) -> dict[str, np.ndarray]:
        """The entries of M items; both arguments (M,)."""
        names = [name for name in self._shards[0] if name not in PER_ROW]
        if len(self._shards) == 1:
            return {name: self._shards[0][name][items] for name in names}
        found = {name: np.empty((len(items), *(a := self._shards[0][name]).shape[1:]), a.dtype) for name in names}
        for i in np.unique(shard):
            chosen = shard == i
            for name in names:
                found[name][chosen] = self._shards[i][name][items[chosen]]
        return found

    def _tokens(self, lengths: np.ndarray, attention_mask: Tensor | None, example_id: Tensor) -> Tensor:
        """(N, T) bool: where the tokens are; checked to be as many as were answered."""
        if attention_mask is None:
            mask = torch.ones(len(lengths), int(lengths.max()), dtype=torch.bool)
        else:
            mask = attention_mask.cpu().bool()
        differ = np.flatnonzero(mask.sum(1).numpy() != lengths)
        if len(differ):
            i = int(differ[0])
            raise TransferError(
                f"{describe(int(example_id[i]))} has {int(mask[i].sum())} tokens here, and {lengths[i]} in the "
                "teacher cache: pass the attention mask of the batch, made of the same rows."
            )
        return mask


def _index(ids: Sequence[np.ndarray], counts: Sequence[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """Where each row is.

    Args:
        ids: Of each shard, (rows,), one view after the other.
        counts: Rows by view of each shard.

    Returns:
        The example_ids (R,) ascending, and (V, R) their rows, numbered through all shards. Of a row that is there
        more than once (processes pad the last batch) the first counts.

    Raises:
        TransferError: If views hold different rows.
    """
    every = np.concatenate(ids)
    view_of = np.concatenate([np.repeat(np.arange(len(rows)), rows) for rows in counts])
    known, places = None, []
    for view in range(len(counts[0])):
        rows = np.flatnonzero(view_of == view)
        found, first = np.unique(every[rows], return_index=True)
        if known is not None and not np.array_equal(found, known):
            row = int(np.setxor1d(found, known)[0])
            raise TransferError(
                f"View {view} has {len(found)} rows and view 0 {len(known)}: {describe(row)} is in one of them only. "
                "batches(view) must give every row in every view (drop_last=False, no sampling)."
            )
        known = found
        places.append(rows[first])
    assert known is not None
    return known, np.stack(places)
