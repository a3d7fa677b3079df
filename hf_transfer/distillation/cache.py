"""A teacher's answers on disk: written once by any number of processes, read by example_id and view.

Augmentation is a function of (seed, epoch, example_id): with V views, epoch e shows what the teacher saw in view
e % V. So the answers are right for augmented rows too, which matters: a teacher has to see what the student sees
(Beyer et al. 2021, arXiv:2106.05237). A cache is refused where teacher, rows, transform or views are others.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..data.columns import EXAMPLE_ID
from ..errors import TransferError
from ..store.key import CacheKey as CacheKey
from ..store.key import IncompleteCache as IncompleteCache
from ..store.key import Kind
from ..store.manifest import Contents, Manifest
from ..store.reading import RowCache
from ..store.writing import Entries, example_ids, write
from .base import Teacher
from .cache_records import Kept

if TYPE_CHECKING:
    from .signal import TeacherSignal

Batch = Mapping[str, Tensor]
KIND = Kind("teacher cache", source="teacher", instead="use the teacher live")


class TeacherCache(RowCache):
    """A complete cache of a teacher's answers, memory-mapped. Made by `open` and `write_cache`.

    Attributes:
        kept: What of the answers is kept.
        classes: C; None where no logits are kept.
    """

    kind = KIND

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__(folder, manifest)
        kept = dict(manifest.contents.kept)
        self.kept = Kept(**{**kept, "temperatures": tuple(kept["temperatures"])})
        self.classes: int | None = manifest.facts["classes"]

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
        arrays, mask = self.arrays(example_id, view, attention_mask)
        return self.kept.signal(arrays, mask, self.classes)


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
    about: str = "",
    rank: int = 0,
    world_size: int = 1,
    wait: Callable[[], None] | None = None,
) -> TeacherCache:
    """Writes the teacher's answers to every view of every row; opens the cache instead where it is there already.

    Called by all processes at once. Each writes what it was given; the cache counts as complete only once all have
    written all. An interrupted writing goes on: the teacher is asked about batches that hold a new row. A second run
    that is to write the same cache waits for the first.

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
        about: For people: of which teacher and rows.
        rank: Of this process, in [0, world_size).
        world_size: Number of processes.
        wait: Returns once all processes have called it, e.g. `torch.distributed.barrier`; one process needs none.

    Raises:
        TransferError: If the folder holds a cache of another key or other contents, no space is left, the teacher's
            answers cannot be kept, or another process failed. The folder then holds no complete cache.
    """
    kept = Kept.of(top_k, tuple(temperatures), dtype, features)

    def entries(view: int, there: np.ndarray) -> Entries:
        for batch in batches(view):
            ids = example_ids(batch, KIND)
            if np.isin(ids, there).all():
                continue
            arrays, classes = kept.arrays(teacher(batch), batch.get("attention_mask"))
            answered = len(arrays.get("lengths", next(iter(arrays.values()))))
            if answered != len(ids):
                raise TransferError(f"The teacher answered for {answered} rows of a batch of {len(ids)}.")
            yield {"ids": ids, **arrays}, {"classes": classes}

    contents = Contents(key, {**asdict(kept), "temperatures": list(kept.temperatures)}, about)
    return write(TeacherCache, folder, contents, entries, rank=rank, world_size=world_size, wait=wait)


def cache_bytes(rows: int, numbers: int, views: int, width: int = 2) -> int:
    """Bytes of so many numbers for each view of each row.

    Args:
        rows: Rows of the data.
        numbers: Numbers a row.
        views: Views a row.
        width: Bytes a number.
    """
    return math.ceil(rows * views * (numbers * width + 8))


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
        return self.cache.views

    def __call__(self, batch: Batch) -> TeacherSignal:
        ids = torch.from_numpy(example_ids(batch, KIND))
        return self.cache.signal(ids, self.view, batch.get("attention_mask")).to(batch[EXAMPLE_ID].device)

    def fingerprint(self) -> str:
        return self.cache.key.source

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
