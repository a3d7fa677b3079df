"""What crosses a cut of a network, on disk: computed once for every row and view, read by example_id.

Any number of processes write it, an interrupted writing goes on, and a cache of other weights, rows or transforms is
refused (store/). Of texts only attended tokens are kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import TransferError
from ..store.key import CacheKey as CacheKey
from ..store.key import IncompleteCache as IncompleteCache
from ..store.key import Kind
from ..store.manifest import Contents, Manifest
from ..store.numbers import BYTES, numbers, restored
from ..store.reading import RowCache, padded
from ..store.writing import Entries, example_ids, write

KIND = Kind("prefix cache", source="weights", instead="pass cache='never'")
_VALUES = "activations"


class PrefixCache(RowCache):
    """A complete cache of activations, memory-mapped. Made by `open` and `write_prefix_cache`.

    Attributes:
        dtype: Which of BYTES the values are kept in.
    """

    kind = KIND

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__(folder, manifest)
        self.dtype: str = manifest.contents.kept["dtype"]

    def values(self, example_id: Tensor, view: int, attention_mask: Tensor | None = None) -> Tensor:
        """What crosses the cut for some rows.

        Args:
            example_id: (N,) integers, in any order.
            view: In [0, views).
            attention_mask: (N, T), where there is a value a token: where the tokens of each row are.

        Returns:
            (N, ...) on the CPU in the dtype it was kept in; 0 at tokens that are not attended.

        Raises:
            TransferError: If a row or view is not in the cache, or a row has another number of tokens there.
        """
        arrays, mask = self.arrays(example_id, view, attention_mask)
        found = restored(arrays[_VALUES], self.dtype)
        return found if mask is None else padded(found, mask)

    def places(self, example_ids: np.ndarray, view: int) -> np.ndarray:
        """Where rows are, for `at`.

        Args:
            example_ids: (N,) integers, in any order.
            view: In [0, views).

        Returns:
            (N,) integers.

        Raises:
            TransferError: If a row or view is not in the cache, or it holds a value for each token.
        """
        if self.per_token:
            raise TransferError(f"The cache in {str(self.folder)!r} holds tokens: read it by values().")
        return self._find(example_ids, view)

    def at(self, places: np.ndarray) -> Tensor:
        """What crosses the cut for rows that `places` found: as `values`, without looking for them again.

        Args:
            places: (N,) of its integers.

        Returns:
            (N, ...) on the CPU in the dtype it was kept in.
        """
        if len(self._shards) == 1:
            found = torch.from_numpy(self._shards[0][_VALUES][places])
        else:
            shard = np.searchsorted(self._first_row, places, side="right") - 1  # (N,)
            found = self._read(shard, places - self._first_row[shard])[_VALUES]
        return restored(found, self.dtype)

    def __reduce__(self) -> Any:
        return type(self).open, (self.folder, self.key)  # a worker maps the files, rather than receive what is in them


def write_prefix_cache(
    folder: str | os.PathLike[str],
    key: CacheKey,
    computed: Callable[[int, np.ndarray], Iterable[tuple[Mapping[str, Tensor], Tensor]]],
    *,
    dtype: str = "float32",
    about: str = "",
    rank: int = 0,
    world_size: int = 1,
    wait: Callable[[], None] | None = None,
) -> PrefixCache:
    """Writes what crosses the cut for every view of every row; opens the cache instead where it is there already.

    Called by all processes at once. Each writes what it was given; the cache counts as complete only once all have
    written all. An interrupted writing goes on.

    Args:
        folder: On a file system that all processes share; made where it does not exist.
        key: Of which weights, rows, transform, and of how many views; the same on all processes.
        computed: (view, the example_ids (K,) that are there already) -> this process's collated batches of that view,
            with `example_id`, each with what crosses the cut, (N, ...); of (N, T, D) with an `attention_mask` (N, T)
            in the batch, attended tokens are kept. The processes together must give every other row, and may give
            some twice.
        dtype: One of `store.numbers.BYTES`.
        about: For people: of which network and rows.
        rank: Of this process, in [0, world_size).
        world_size: Number of processes.
        wait: Returns once all processes have called it; one process needs none.

    Returns:
        The complete cache.

    Raises:
        TransferError: If the folder holds a cache of another key or dtype, no space is left, a value is not finite in
            the dtype, or another process failed. The folder then holds no complete cache.
    """
    if dtype not in BYTES:
        raise TransferError(f"dtype={dtype!r}: a prefix cache keeps one of {', '.join(BYTES)}.")

    def entries(view: int, there: np.ndarray) -> Entries:
        for batch, value in computed(view, there):
            yield {"ids": example_ids(batch, KIND), **_arrays(value, batch.get("attention_mask"), dtype)}, {}

    contents = Contents(key, {"dtype": dtype}, about)
    return write(PrefixCache, folder, contents, entries, rank=rank, world_size=world_size, wait=wait)


def _arrays(value: Tensor, attention_mask: Tensor | None, dtype: str) -> dict[str, np.ndarray]:
    if attention_mask is None or value.dim() != 3:
        return {_VALUES: numbers(value, dtype, "frozen layers' values")}
    mask = attention_mask.to(value.device, torch.bool)  # (N, T)
    lengths = mask.sum(1).to(torch.int32).cpu().numpy()
    return {"lengths": lengths, _VALUES: numbers(value[mask], dtype, "frozen layers' values")}


def row_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of one row's value and its entry.

    Args:
        shape: Of the value.
        dtype: One of `store.numbers.BYTES`.
    """
    return int(np.prod(shape)) * BYTES[dtype] + 8
