"""Whether a cache is worth writing: both ways in seconds, the cheaper one taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..disk import SPARE


@dataclass(frozen=True)
class Costs:
    """What was measured before the first step, on this process.

    Attributes:
        live: Seconds an epoch that a cache saves.
        writing: Seconds that it takes to write one.
        reading: Seconds an epoch that it takes to read.
        epochs: Epochs that are trained.
        size: Bytes of the cache.
        free: Bytes free on its disk.
    """

    live: float
    writing: float
    reading: float
    epochs: float
    size: int
    free: int

    @property
    def cached(self) -> float:
        """Seconds of all epochs with a cache."""
        return self.writing + self.epochs * self.reading

    @property
    def fits(self) -> bool:
        """Whether the disk holds it."""
        return self.size <= SPARE * self.free

    @property
    def worth(self) -> bool:
        """Whether to cache."""
        return self.fits and self.cached < self.epochs * self.live

    def __str__(self) -> str:
        size = f"{self.size / 2**20:,.1f} MiB"
        if not self.fits:
            return f"a cache would take {size} and only {self.free / 2**20:,.0f} MiB are free"
        return (
            f"{self.epochs * self.live:,.1f} s live over {self.epochs:g} epochs, {self.cached:,.1f} s with a cache of "
            f"{size}"
        )


def epochs_of(args: Any, rows: int) -> float:
    """How many epochs the Trainer's arguments train for.

    Args:
        args: TrainingArguments.
        rows: Of the training data.
    """
    if args.max_steps <= 0:
        return float(args.num_train_epochs)
    return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size / rows
