"""The median of repeated measurements, with an interval that assumes nothing of how they scatter."""

from __future__ import annotations

from collections.abc import Iterable
from math import comb
from statistics import median
from typing import NamedTuple


class Figure(NamedTuple):
    """A median, and an interval that holds it in at least 95 % of cases (from MIN_VALUES values).

    Attributes:
        value: The median.
        low: The lower end of the interval.
        high: The upper end.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Figure:
        """The figure of some measurements.

        The ends are order statistics: with n values, as many are left out on each side as a fair coin that is tossed n
        times shows heads at most, in 2.5 % of cases. It is the interval of the sign test (Conover, Practical
        Nonparametric Statistics, 3.2).

        Args:
            values: At least one. Of fewer than MIN_VALUES, the ends are the smallest and the largest.
        """
        ranked = sorted(values)
        n = len(ranked)
        outside = max((k for k in range(n // 2) if 2 * _at_most(k, n) <= 0.05), default=0)
        return cls(median(ranked), ranked[outside], ranked[-1 - outside])

    def __str__(self) -> str:
        value, low, high = (f"{x:#.3g}".rstrip(".") for x in self)  # three digits, trailing zeros too
        return f"{value} [{low}, {high}]"


MIN_VALUES = 6
"""The fewest whose smallest and largest enclose the median in 95 % of cases."""


def _at_most(heads: int, tosses: int) -> float:
    """The probability of so many heads or fewer."""
    return sum(comb(tosses, j) for j in range(heads + 1)) / 2**tosses
