"""How a term's weight moves with training progress, which is global_step / max_steps and so survives a resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .errors import TransferError

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class LinearSchedule:
    """A weight that moves on a straight line with training progress, and stays flat outside `[begin, until]`.

    Args:
        start: Value up to progress `begin`.
        end: Value from progress `until` on.
        begin: Progress in [0, 1) at which the line starts.
        until: Progress in (begin, 1] at which the line ends.

    Raises:
        TransferError: If not 0 <= begin < until <= 1.
    """

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.until <= 1:
            raise TransferError(
                f"A schedule needs 0 <= begin < until <= 1, got begin={self.begin}, until={self.until}."
            )

    def __call__(self, progress: float) -> float:
        share = min(max((progress - self.begin) / (self.until - self.begin), 0.0), 1.0)
        return self.start + (self.end - self.start) * share


@dataclass(frozen=True)
class CosineSchedule:
    """A weight that moves from `start` to `end` along half a cosine over the whole training."""

    start: float
    end: float

    def __call__(self, progress: float) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


@dataclass(frozen=True)
class SigmoidSchedule:
    """The warm-up of domain-adversarial training: 2 / (1 + exp(-gamma * progress)) - 1, times `peak`.

    Source: Ganin et al. 2016, "Domain-Adversarial Training of Neural Networks", arXiv:1505.07818, section 5.2.2.
    """

    peak: float = 1.0
    gamma: float = 10.0

    def __call__(self, progress: float) -> float:
        return self.peak * (2 / (1 + math.exp(-self.gamma * progress)) - 1)
