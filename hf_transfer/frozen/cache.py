"""What crosses a cut of a network, on disk: computed once for every row and view, read by example_id.

The format is the teacher cache's (distillation/cache_files.py): any number of processes write shards, the manifest is
written when all are whole, a cache of other weights, rows or transforms is refused, an interrupted one is written
anew. Of texts only attended tokens are kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..distillation.cache import _complete, _existing, _together, _write_shard
from ..distillation.cache_files import CacheKey, Manifest, clear, missing_shards
from ..distillation.cache_reading import TeacherCache
from ..distillation.cache_records import Kept
from ..distillation.signal import TeacherSignal
from ..errors import TransferError

__all__ = ["DTYPES", "CacheKey", "PrefixCache", "row_bytes", "write_prefix_cache"]

DTYPES = ("float32", "bfloat16", "float16")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class _Numbers(Kept):
    """Activations as arrays; numpy has no bfloat16, so its bits are kept as int16."""

    def _numbers(self, values: Tensor, what: str) -> np.ndarray:
        if self.dtype == "bfloat16":
            return values.detach().to(torch.bfloat16).view(torch.int16).cpu().numpy()
        return super()._numbers(values, what)


class PrefixCache(TeacherCache):
    """A complete cache of activations, memory-mapped. Made by `open` and `write_prefix_cache`.

    Attributes:
        key: Of which weights (`key.teacher`), rows, transform and views.
        example_ids: (R,) int64 ascending, the rows that it holds, in each view.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__(folder, manifest)
        if self.kept.dtype not in DTYPES or not self.kept.features:
            raise TransferError(f"The cache in {str(folder)!r} holds a teacher's answers: choose another folder.")
        self._features = np.asarray(self._shards[0]["features"])  # still mapped; indexing a memmap costs more

    @property
    def views(self) -> int:
        """How many views of each row there are."""
        return self.key.views

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
        return self._as_kept(self.signal(example_id, view, attention_mask if self._per_token else None))

    @property
    def holds_tokens(self) -> bool:
        """Whether there is a number of values a row (of texts, of patches), which `values` alone puts together."""
        return self._per_token

    def places(self, example_ids: np.ndarray, view: int) -> np.ndarray:
        """Where rows are, for `at`.

        Args:
            example_ids: (N,) integers, in any order.
            view: In [0, views).

        Returns:
            (N,) integers.

        Raises:
            TransferError: If a row or view is not in the cache, or it `holds_tokens`.
        """
        if self._per_token:
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
            return self._as_kept(self.kept.signal({"features": self._features[places]}, None, self.classes))
        shard = np.searchsorted(self._first_row, places, side="right") - 1  # (N,)
        return self._as_kept(self.kept.signal(self._read(shard, places - self._first_row[shard]), None, self.classes))

    def _as_kept(self, signal: TeacherSignal) -> Tensor:
        found = signal.features
        assert found is not None
        return found.view(torch.bfloat16) if self.kept.dtype == "bfloat16" else found

    def __reduce__(self) -> Any:
        return type(self).open, (self.folder, self.key)  # a worker maps the files, rather than receive what is in them


def write_prefix_cache(
    folder: str | os.PathLike[str],
    key: CacheKey,
    prefix: Callable[[Mapping[str, Tensor]], Tensor],
    batches: Callable[[int], Iterable[Mapping[str, Tensor]]],
    *,
    dtype: str = "float32",
    rank: int = 0,
    world_size: int = 1,
    wait: Callable[[], None] | None = None,
) -> PrefixCache:
    """Writes what crosses the cut for every view of every row; opens the cache instead where it is there already.

    Called by all processes at once. Each writes what it was given; the cache counts as complete only once all have
    written all. What an interrupted run left is replaced.

    Args:
        folder: On a file system that all processes share; made where it does not exist.
        key: Of which weights, rows, transform, and of how many views; the same on all processes.
        prefix: A collated batch -> what crosses the cut, (N, ...); of (N, T, D) with an `attention_mask` (N, T) in the
            batch, attended tokens are kept.
        batches: view -> this process's collated batches of that view, with `example_id`. The processes together must
            give every row, and may give some twice.
        dtype: One of DTYPES.
        rank: Of this process, in [0, world_size).
        world_size: Number of processes.
        wait: Returns once all processes have called it; one process needs none.

    Returns:
        The complete cache.

    Raises:
        TransferError: If the folder holds a cache of another key or dtype, no space is left, a value is not finite in
            the dtype, or another process failed. The folder then holds no complete cache.
    """
    if dtype not in DTYPES:
        raise TransferError(f"dtype={dtype!r}: a prefix cache keeps one of {', '.join(DTYPES)}.")
    if world_size > 1 and wait is None:
        raise TransferError("Several processes need a barrier to wait at: wait=accelerator.wait_for_everyone.")
    path, kept = Path(folder).expanduser(), _Numbers(None, (), dtype, True)

    def answer(batch: Mapping[str, Tensor]) -> TeacherSignal:
        return TeacherSignal(features=prefix(batch))

    def open_existing() -> bool:
        return _existing(path, key, Kept(**asdict(kept))) is not None

    if _together(open_existing, wait):
        return cast(PrefixCache, PrefixCache.open(path, key))
    _together(lambda: clear(path) if rank == 0 else None, wait)
    _together(lambda: _write_shard(path, key, kept, answer, batches, rank), wait)
    if missing := missing_shards(path, world_size):  # seen by all alike, so that none waits
        raise TransferError(
            f"The cache in {str(path)!r} is incomplete: processes {missing} of {world_size} wrote nothing. See their "
            "errors; all processes must share the folder."
        )
    _together(lambda: _complete(path, key, kept, world_size) if rank == 0 else None, wait)
    return cast(PrefixCache, PrefixCache.open(path, key))


def row_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of one row's value and its entry.

    Args:
        shape: Of the value.
        dtype: One of DTYPES.
    """
    return int(np.prod(shape)) * _BYTES[dtype] + 8
