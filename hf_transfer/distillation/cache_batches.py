"""In which batches a teacher is asked about all rows of a cache: such as suit the machine, where that is right.

That a row's answer is the same in any batch, but for rounding, is not taken on trust: a few rows are asked about
together and each alone. A teacher that answers otherwise (statistics of the batch, int8 scales, padding that is not
masked) is asked in the batches of an evaluation, as they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch_sizes import a_few, in_parts, largest_output, longest_first, rows_at_once, rows_loaded
from .base import Teacher
from .signal import TeacherSignal

Batch = Mapping[str, Any]
_ROUNDING = 84  # of the dtype's epsilon, relative to the largest answer: 1e-5 in float32


@dataclass(frozen=True)
class CacheBatches:
    """The batches of a cache.

    Attributes:
        rows: How many a process loads at a time.
        largest: Bytes a row of the largest output of a module; None where batches run whole.
        tokens: Of the text that this was found with.
        most: Rows that run at a time at most; None for no bound.
    """

    rows: int
    largest: int | None = None
    tokens: int | None = None
    most: int | None = None

    def parts(self, batch: Batch) -> Iterator[Batch]:
        """What of a loaded batch runs at a time."""
        if self.largest is None:
            yield batch
            return
        tokens = _tokens(batch)
        each = self.largest if tokens is None or self.tokens is None else self.largest * tokens // self.tokens
        size = rows_at_once(_device(batch), each)
        yield from in_parts(batch, size if self.most is None else min(size, self.most))

    def order(self, rows: Any) -> list[int] | None:
        """Positions of all rows of a prepared dataset, in which they are loaded; None as they stand."""
        return None if self.largest is None else longest_first(rows).tolist()


def suited(
    teacher: Teacher,
    rows: Any,
    collated: Callable[[Sequence[int]], Batch],
    device: torch.device,
    size: int,
    most: int | None = None,
) -> CacheBatches:
    """The batches in which a teacher is asked.

    Args:
        teacher: Who is asked.
        rows: A prepared dataset.
        collated: Positions in it -> their batch.
        device: Where batches will be.
        size: Rows of a batch of an evaluation.
        most: Rows that may run at a time.

    Returns:
        Those that suit the machine; those of an evaluation where answers depend on the batch, or that is not known.
    """
    networks, sample = teacher.networks(), a_few(rows)[:most]
    if not networks or len(sample) < 2:
        return CacheBatches(size)
    batch = collated(sample)
    together, each = teacher(batch), [collated([row]) for row in sample]
    with largest_output(networks) as seen:
        alone = [teacher(row) for row in each]
    for place, row in enumerate(each):
        if not _alike(_answers(alone[place], row, 0), _answers(together, batch, place)):
            return CacheBatches(size)
    return CacheBatches(rows_loaded(device, size), seen.bytes, _tokens(batch), most)


def _answers(signal: TeacherSignal, batch: Batch, place: int) -> Tensor:
    """What is said of one row of a batch; of a text without its padding."""
    logits = signal.logits if signal.top is None else signal.top.values
    assert logits is not None  # a network gives all, or the largest
    mask = batch.get("attention_mask")
    return logits[place] if mask is None or logits.dim() < 3 else logits[place][mask[place].bool()]


def _alike(a: Tensor, b: Tensor) -> bool:
    tolerance = _ROUNDING * torch.finfo(b.dtype).eps * max(float(b.abs().max()), 1.0)
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance)


def _tokens(batch: Batch) -> int | None:
    return batch["input_ids"].shape[1] if "input_ids" in batch else None


def _device(batch: Batch) -> torch.device:
    return next(value.device for value in batch.values() if torch.is_tensor(value))
