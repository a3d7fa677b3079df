"""A complete cache: the arrays of some rows, found by example_id and view, and read from memory-mapped shards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..data.identity import describe
from ..errors import TransferError
from .journal import read_parts
from .key import CacheKey, IncompleteCache, Kind
from .manifest import MANIFEST, PER_ROW, Manifest, read_manifest

Own = TypeVar("Own", bound="RowCache")


class RowCache:
    """A complete cache, memory-mapped. Made by `open`; a kind of cache is a subclass.

    Attributes:
        kind: What it is called.
        folder: Where it is.
        manifest: What it says of itself.
        key: What it holds the values of.
        example_ids: (R,) int64 ascending, the rows that it holds, in each view.
    """

    kind: ClassVar[Kind]

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest, self.key = folder, manifest, manifest.contents.key
        shards = [shard for shard in manifest.shards if sum(shard.rows)]
        self._shards = [shard.map(folder, manifest.layout, self.kind) for shard in shards]
        self._names = [name for name in manifest.layout if name not in PER_ROW]
        counts = [shard.rows for shard in shards]
        self._first_row = np.cumsum([0, *(sum(rows) for rows in counts)])[:-1]  # (shards,)
        self.example_ids, self._rows = _index([shard["ids"] for shard in self._shards], counts)
        self.per_token = "lengths" in manifest.layout
        if self.per_token:
            lengths = [shard["lengths"].astype(np.int64) for shard in self._shards]
            self._lengths = np.concatenate(lengths)  # by row
            self._starts = np.concatenate([np.cumsum(each) - each for each in lengths])  # within the shard

    @classmethod
    def open(cls: type[Own], folder: str | os.PathLike[str], key: CacheKey) -> Own:
        """Opens a cache.

        Args:
            folder: Where it was written.
            key: What it must hold the values of.

        Raises:
            IncompleteCache: If it was not written to the end, or a file is gone; a TransferError.
            TransferError: If there is none, or it is of something else.
        """
        path = Path(folder).expanduser()
        manifest = read_manifest(path, cls.kind)
        if manifest is None:
            if not (path / MANIFEST).exists() and not read_parts(path):
                raise TransferError(f"There is no {cls.kind.name} in {str(path)!r}.")
            raise IncompleteCache(
                f"The {cls.kind.name} in {str(path)!r} is incomplete: the run that wrote it was interrupted, or of an "
                "older version. Write it again; what is whole is kept."
            )
        key.check(manifest.contents.key, path, cls.kind)
        found = cls(path, manifest)
        with suppress(OSError):  # where it may only be read
            os.utime(path / MANIFEST)  # when it was last used
        return found

    @property
    def views(self) -> int:
        """How many views of each row there are."""
        return self.key.views

    def arrays(
        self, example_id: Tensor, view: int, attention_mask: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """What is kept of some rows.

        Args:
            example_id: (N,) integers, in any order.
            view: In [0, views).
            attention_mask: (N, T), where there is an entry a token: where the tokens of each row are.

        Returns:
            The arrays by name, each with M entries, and for tokens the mask (N, T) with M places where they belong
            (`padded` puts them there); None where M is N.

        Raises:
            TransferError: If a row or view is not in the cache, or a row has another number of tokens there.
        """
        rows = self._find(example_id.cpu().numpy(), view)  # (N,)
        shard = np.searchsorted(self._first_row, rows, side="right") - 1  # (N,)
        if not self.per_token:
            return self._read(shard, rows - self._first_row[shard]), None
        lengths = self._lengths[rows]
        mask = self._tokens(lengths, attention_mask, example_id)  # (N, T) with M tokens
        before = np.cumsum(lengths) - lengths
        items = np.arange(lengths.sum()) + np.repeat(self._starts[rows] - before, lengths)  # (M,)
        return self._read(np.repeat(shard, lengths), items), mask

    def _find(self, ids: np.ndarray, view: int) -> np.ndarray:
        """(N,) rows, numbered through all shards."""
        if not 0 <= view < self.views:
            raise TransferError(f"view={view}: the {self.kind.name} holds views 0 to {self.views - 1}.")
        places = np.searchsorted(self.example_ids, ids)
        places[places == len(self.example_ids)] = 0
        known = self.example_ids[places] == ids
        if not known.all():
            raise TransferError(
                f"The {self.kind.name} in {str(self.folder)!r} holds {len(self.example_ids)} rows, and "
                f"{describe(int(ids[~known][0]))} is not among them. Write one of all rows, or {self.kind.instead}."
            )
        return self._rows[view, places]

    def _read(self, shard: np.ndarray, items: np.ndarray) -> dict[str, Tensor]:
        """The entries of M items; both arguments (M,)."""
        if len(self._shards) == 1:
            found = {name: self._shards[0][name][items] for name in self._names}
        else:
            first = self._shards[0]
            found = {name: np.empty((len(items), *first[name].shape[1:]), first[name].dtype) for name in self._names}
            for i in np.unique(shard):
                chosen = shard == i
                for name in self._names:
                    found[name][chosen] = self._shards[i][name][items[chosen]]
        return {name: torch.from_numpy(array) for name, array in found.items()}

    def _tokens(self, lengths: np.ndarray, attention_mask: Tensor | None, example_id: Tensor) -> Tensor:
        """(N, T) bool: where the tokens are; checked to be as many as there are entries."""
        if attention_mask is None:
            mask = torch.ones(len(lengths), int(lengths.max()), dtype=torch.bool)
        else:
            mask = attention_mask.cpu().bool()
        differ = np.flatnonzero(mask.sum(1).numpy() != lengths)
        if len(differ):
            i = int(differ[0])
            raise TransferError(
                f"{describe(int(example_id[i]))} has {int(mask[i].sum())} tokens here, and {lengths[i]} in the "
                f"{self.kind.name}: pass the attention mask of the batch, made of the same rows."
            )
        return mask


def padded(values: Tensor, mask: Tensor) -> Tensor:
    """(M, ...) at the M places of a mask (N, T) -> (N, T, ...); 0 elsewhere."""
    result = values.new_zeros(*mask.shape, *values.shape[1:])
    result[mask] = values
    return result


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
