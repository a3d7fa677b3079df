"""Balance: weights for rare classes, and a sampler that shows every class or domain equally often."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..errors import TransferError
from .columns import DOMAIN, LABELS, values
from .labels import UNLABELLED
from .replay import key

if TYPE_CHECKING:
    from datasets import Dataset


def class_weights(labels: Iterable[Any], num_classes: int) -> Tensor:
    """Weights that make every class count equally: N / (C * N_c), scikit-learn's "balanced".

    Args:
        labels: Labels in 0..C-1, one a row or a list of them a row; -100 is not counted.
        num_classes: C.

    Returns:
        (C,) float32, whose mean over the labelled rows is 1.

    Raises:
        TransferError: If a label is out of range, or a class has no row.
    """
    rows = list(labels)
    flat = np.asarray(list(chain.from_iterable(rows)) if rows and np.ndim(rows[0]) else rows).reshape(-1)
    flat = flat[flat != UNLABELLED]
    if len(flat) and not 0 <= flat.min() <= flat.max() < num_classes:
        raise TransferError(f"class_weights: labels {flat.min()}..{flat.max()} are outside 0..{num_classes - 1}.")
    counts = np.bincount(flat.astype(np.int64), minlength=num_classes)
    if not counts.all():
        raise TransferError(f"class_weights: class {int(np.argmin(counts))} has no row, so no weight balances it.")
    return torch.from_numpy(len(flat) / (num_classes * counts)).float()


class BalancedSampler(Sampler[int]):
    """Every group equally often: rounds of one row of each group, each round in a random order.

    So a batch whose size is a multiple of the number of groups holds each equally often, exactly; also when processes
    take whole batches in turn, or equal slices of each batch. The order is a function of (seed, epoch): a run that
    resumes by skipping the batches it has seen continues as if uninterrupted.

    Args:
        groups: (N,) integers, the group of each row: its class, or its domain.
        mode: "over" shows every row of the largest group once an epoch and repeats the others' rows; "under" shows as
            many rows of each group as the smallest has, other ones each epoch.
        seed: Seed of the order.
        batch_size: Rows of a micro-batch, if every one must be exactly balanced: checked to be a multiple of the
            number of groups.

    Raises:
        TransferError: If there are no rows, or batch_size cannot hold the groups equally.
    """

    def __init__(
        self,
        groups: Sequence[int] | np.ndarray | Tensor,
        *,
        mode: Literal["over", "under"] = "over",
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        if mode not in ("over", "under"):
            raise TransferError(f'mode={mode!r}: valid are "over" and "under".')
        flat = np.asarray(groups).reshape(-1)
        if not len(flat):
            raise TransferError("BalancedSampler was given no rows.")
        self.members = [np.flatnonzero(flat == group) for group in np.unique(flat)]
        if batch_size is not None and batch_size % len(self.members):
            raise TransferError(
                f"A batch of {batch_size} rows cannot hold {len(self.members)} groups in equal number: make the batch "
                f"size a multiple of {len(self.members)}."
            )
        sizes = [len(members) for members in self.members]
        self.rounds = max(sizes) if mode == "over" else min(sizes)
        self.seed, self.epoch = seed, 0

    @classmethod
    def over_classes(cls, dataset: Dataset, *, seed: int = 0) -> BalancedSampler:
        """Shows every class of a prepared dataset equally often, by repeating the rows of the rarer ones."""
        return cls(_column(dataset, LABELS), seed=seed)

    @classmethod
    def over_domains(cls, dataset: Dataset, *, batch_size: int | None = None, seed: int = 0) -> BalancedSampler:
        """Shows every domain of a prepared dataset equally often; in every micro-batch, if its size is given."""
        return cls(_column(dataset, DOMAIN), seed=seed, batch_size=batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Moves to an epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rounds * len(self.members)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng(key(self.seed, self.epoch))
        drawn = np.stack([self._draw(members, generator) for members in self.members], axis=1)  # (rounds, groups)
        yield from generator.permuted(drawn, axis=1).reshape(-1).tolist()

    def _draw(self, members: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """`rounds` rows of one group: whole shuffles of it one after another, the last cut short."""
        shuffles = -(-self.rounds // len(members))
        return np.concatenate([generator.permutation(members) for _ in range(shuffles)])[: self.rounds]


def _column(dataset: Dataset, name: str) -> np.ndarray:
    if name not in dataset.column_names:
        raise TransferError(
            f"Balanced sampling needs the column {name!r}; the dataset has {', '.join(dataset.column_names)}. "
            + ("Build it with splits.combine()." if name == DOMAIN else "Prepare it with transforms.prepare().")
        )
    column = values(dataset, name)
    if np.ndim(column[0]) or isinstance(column[0], float):
        raise TransferError(
            f"Balanced sampling needs one whole number a row, and column {name!r} holds {column[0]!r}."
        )
    return np.asarray(column)
