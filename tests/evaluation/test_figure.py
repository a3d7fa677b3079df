"""The median and its interval."""

from __future__ import annotations

from itertools import product

from hf_transfer.evaluation.figure import MIN_VALUES, Figure


def test_ends_are_order_statistics() -> None:
    assert Figure.of(float(i) for i in range(15, 0, -1)) == Figure(8.0, 4.0, 12.0)  # 3 of 15 beyond: 3.5 %
    assert Figure.of([3.0, 1.0]) == Figure(2.0, 1.0, 3.0)


def test_the_interval_holds_the_median_in_95_of_100_cases_and_could_not_be_narrower() -> None:
    """By counting all ways in which values fall on either side of the true median."""
    for n in (MIN_VALUES, 7, 9, 12):
        low = Figure.of(range(n)).low  # of the values 0 to n - 1: how many are left out on each side

        def missed(outside: float, n: int = n) -> float:
            sides = [sum(signs) for signs in product((0, 1), repeat=n)]
            return sum(above <= outside or n - above <= outside for above in sides) / 2**n

        assert missed(low) <= 0.05 < missed(low + 1)


def test_three_digits_are_shown() -> None:
    assert str(Figure(1.0, 0.97149, 123.4)) == "1.00 [0.971, 123]"
