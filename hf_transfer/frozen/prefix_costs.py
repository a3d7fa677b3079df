"""What frozen layers cost live and computed once, in seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """What was measured before the first step, on the first process.

    Attributes:
        loading: Seconds to load a batch.
        prefix: Seconds that the frozen layers take for it.
        reading: Seconds to copy what crosses the cut for it.
        batches: Batches in an epoch.
        epochs: Epochs that are trained.
        views: Versions of each row in the cache.
    """

    loading: float
    prefix: float
    reading: float
    batches: float
    epochs: float
    views: int

    @property
    def live(self) -> float:
        """Seconds of loading and computing in every epoch."""
        return self.epochs * self.batches * (self.loading + self.prefix)

    @property
    def cached(self) -> float:
        """Seconds of doing so once for each view, of writing, and of reading in every epoch."""
        once = self.views * (self.loading + self.prefix + self.reading)
        return self.batches * (once + self.epochs * self.reading)

    def __str__(self) -> str:
        return (
            f"loading takes {1000 * self.loading:.1f} ms a batch and the frozen layers {1000 * self.prefix:.1f} ms: "
            f"{self.live:,.1f} s over {self.epochs:g} epochs, {self.cached:,.1f} s with a cache"
        )
