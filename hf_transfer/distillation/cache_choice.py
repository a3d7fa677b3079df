"""Whether a teacher's answers are worth writing down: both ways measured in seconds, the cheaper one taken."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..disk import SPARE


@dataclass(frozen=True)
class CacheCosts:
    """What was measured before the first step, on this process.

    Attributes:
        teacher: Seconds that the teacher takes for a batch.
        loading: Seconds that it takes to load a batch, which a cache does once more for each view.
        batches: Batches in an epoch.
        epochs: Epochs that are trained.
        views: Augmented versions of each row that a cache holds.
        size: Bytes of the cache.
        free: Bytes free on its disk.
    """

    teacher: float
    loading: float
    batches: int
    epochs: float
    views: int
    size: int
    free: int

    @property
    def live(self) -> float:
        """Seconds of asking the teacher in every epoch."""
        return self.epochs * self.batches * self.teacher

    @property
    def cached(self) -> float:
        """Seconds of asking it once for each view; reading the answers back is not worth counting."""
        return self.views * self.batches * (self.teacher + self.loading)


def prefers_cache(costs: CacheCosts) -> tuple[bool, str]:
    """The cheaper way, and why.

    Args:
        costs: What was measured.

    Returns:
        Whether to cache, and the reason as a sentence.
    """
    size, free = costs.size / 2**20, costs.free / 2**20
    if costs.size > SPARE * costs.free:
        return False, f"live: a cache would take {size:,.0f} MiB and only {free:,.0f} MiB are free"
    numbers = (
        f"the teacher takes {1000 * costs.teacher:.1f} ms a batch and loading {1000 * costs.loading:.1f} ms: "
        f"{costs.live:,.0f} s live over {costs.epochs:g} epochs, {costs.cached:,.0f} s to cache {costs.views} "
        f"view{'s' if costs.views > 1 else ''} ({size:,.1f} MiB)"
    )
    return costs.cached < costs.live, f"{'cached' if costs.cached < costs.live else 'live'}: {numbers}"


def cache_bytes(rows: int, numbers: int, views: int, width: int = 2) -> int:
    """Bytes of so many numbers for each view of each row.

    Args:
        rows: Rows of the data.
        numbers: Numbers a row.
        views: Views a row.
        width: Bytes a number.
    """
    return math.ceil(rows * views * (numbers * width + 8))
