"""A teacher's answers on disk: written once by any number of processes, read by example_id and view.

Augmentation is a function of (seed, epoch, example_id): with V views, epoch e shows what the teacher saw in view
e % V. So the answers are right for augmented rows too, which matters: a teacher has to see what the student sees
(Beyer et al. 2021, arXiv:2106.05237). A cache is refused where teacher, rows, transform or views are others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..data.columns import EXAMPLE_ID
from ..errors import TransferError
from . import cache_files as files
from .base import Teacher
from .cache_files import CacheKey as CacheKey
from .cache_files import IncompleteCache as IncompleteCache
from .cache_reading import TeacherCache as TeacherCache
from .cache_records import Kept

if TYPE_CHECKING:
    from .signal import TeacherSignal

Batch = Mapping[str, Tensor]
T = TypeVar("T")


def write_cache(
    folder: str | os.PathLike[str],
    key: CacheKey,
    teacher: Callable[[Batch], TeacherSignal],
    batches: Callable[[int], Iterable[Batch]],
    *,
    top_k: int | None = None,
    temperatures: Sequence[float] = (1.0,),
    dtype: torch.dtype = torch.float16,
    features: bool = False,
    rank: int = 0,
    world_size: int = 1,
    wait: Callable[[], None] | None = None,
) -> TeacherCache:
    """Writes the teacher's answers to every view of every row; opens the cache instead where it is there already.

    Called by all processes at once. Each writes what it was given; the cache counts as complete only once all have
    written all. What an interrupted run left is replaced. Two runs should not write to one folder at once: one of
    them may then fail, and what is complete is still right.

    Args:
        folder: On a file system that all processes share; made where it does not exist.
        key: Whose answers to what; the same on all processes.
        teacher: A collated batch -> its signal, with logits of all classes.
        batches: view -> this process's collated batches of that view, with `example_id`; the caller sets the data's
            epoch to the view. The processes together must give every row, and may give some twice.
        top_k: Keep only so many of the largest logits, and the mass of all others; all logits by default.
        temperatures: With top_k: those at which terms will ask.
        dtype: Of logits and features: torch.float16 or torch.float32.
        features: Keep the input of the teacher's classifier too.
        rank: Of this process, in [0, world_size).
        world_size: Number of processes.
        wait: Returns once all processes have called it, e.g. `torch.distributed.barrier`; one process needs none.

    Raises:
        TransferError: If the folder holds a cache of another key or other contents, no space is left, the teacher's
            answers cannot be kept, or another process failed. The folder then holds no complete cache.
    """
    path, kept = Path(folder).expanduser(), Kept.of(top_k, tuple(temperatures), dtype, features)
    if not 0 <= rank < world_size or (world_size > 1 and wait is None):
        raise TransferError(
            f"rank={rank}, world_size={world_size}, wait={wait}: rank must be in [0, world_size), and several "
            "processes need a barrier to wait at, e.g. wait=torch.distributed.barrier."
        )
    found = _together(lambda: _existing(path, key, kept), wait)  # nothing is changed before all have looked
    if found is not None:
        return found
    first = rank == 0
    _together(lambda: files.clear(path) if first else None, wait)
    _together(lambda: _write_shard(path, key, kept, teacher, batches, rank), wait)
    missing = files.missing_shards(path, world_size)
    if missing:  # seen by all alike, so that none waits
        raise TransferError(
            f"The teacher cache in {str(path)!r} is incomplete: processes {missing} of {world_size} wrote nothing. "
            "See their errors; all processes must share the folder."
        )
    _together(lambda: _complete(path, key, kept, world_size) if first else None, wait)
    return TeacherCache.open(path, key)


def _together(work: Callable[[], T], wait: Callable[[], None] | None) -> T:
    """Works, then waits for the other processes, also after a failure: none is left waiting for one that is gone."""
    try:
        result = work()
    except Exception:
        if wait is not None:
            wait()
        raise
    if wait is not None:
        wait()
    return result


def _existing(folder: Path, key: CacheKey, kept: Kept) -> TeacherCache | None:
    """The cache that is there; None where there is none or a part of one."""
    if files.read_manifest(folder) is None:
        return None
    try:
        found = TeacherCache.open(folder, key)
    except IncompleteCache:
        return None
    if found.kept != kept:
        raise TransferError(
            f"The teacher cache in {str(folder)!r} keeps {asdict(found.kept)}, and {asdict(kept)} is asked for. Ask "
            "for what it keeps, choose another folder, or delete this one."
        )
    return found


def _write_shard(
    folder: Path,
    key: CacheKey,
    kept: Kept,
    teacher: Callable[[Batch], TeacherSignal],
    batches: Callable[[int], Iterable[Batch]],
    rank: int,
) -> None:
    with files.shard_writer(folder, rank) as writer:
        for view in range(key.views):
            writer.begin_view()
            for batch in batches(view):
                ids = _example_ids(batch)
                arrays, classes = kept.arrays(teacher(batch), batch.get("attention_mask"))
                answered = len(arrays.get("lengths", next(iter(arrays.values()))))
                if answered != len(ids):
                    raise TransferError(f"The teacher answered for {answered} rows of a batch of {len(ids)}.")
                writer.append({"ids": ids.cpu().numpy().astype(np.int64), **arrays}, classes)


def _complete(folder: Path, key: CacheKey, kept: Kept, world_size: int) -> None:
    manifest = files.assemble(folder, key, asdict(kept), world_size)
    TeacherCache(folder, manifest)  # reads every row's place: views that differ are refused before they count
    files.write_manifest(folder, manifest)


def _example_ids(batch: Batch) -> Tensor:
    if EXAMPLE_ID not in batch:
        raise TransferError(
            f"A teacher cache is keyed by {EXAMPLE_ID!r}, and the batch has {', '.join(batch)}. Prepare the data with "
            "hf_transfer.data.transforms.prepare() and collate it with collator_for()."
        )
    return batch[EXAMPLE_ID]


class CachedTeacher(Teacher):
    """Answers from a cache.

    Args:
        cache: A complete one.
        labels: Names of its classes, in the student's order.

    Attributes:
        view: Which view the batches are of; the trainer sets it to epoch % views, as it does the data's epoch.

    Raises:
        TransferError: If there are not as many names as classes.
    """

    def __init__(self, cache: TeacherCache, labels: Sequence[str] | None = None) -> None:
        if labels is not None and cache.classes not in (None, len(labels)):
            raise TransferError(f"{len(labels)} labels were given for a teacher cache of {cache.classes} classes.")
        self.cache, self.view = cache, 0
        self.labels = None if labels is None else list(labels)

    @property
    def views(self) -> int:
        """How many views of each row there are."""
        return self.cache.key.views

    def __call__(self, batch: Batch) -> TeacherSignal:
        ids = _example_ids(batch)
        return self.cache.signal(ids, self.view, batch.get("attention_mask")).to(ids.device)

    def fingerprint(self) -> str:
        return self.cache.key.teacher

    def watch(self, layers: Sequence[str] = (), features: bool = False) -> None:
        if layers:
            raise TransferError(
                f"A term compares layers {', '.join(layers)} of the teacher, and a teacher cache keeps logits"
                f"{' and features' if self.cache.kept.features else ''} only. Use the teacher live, or drop the term."
            )
        if features and not self.cache.kept.features:
            raise TransferError(
                "A term compares features, and the teacher cache keeps none: write it with features=True, or use the "
                "teacher live."
            )
