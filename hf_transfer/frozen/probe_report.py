"""What a probe found: backbones in the order of what their features are worth, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A share or a difference of shares, and its standard error over rows."""

    value: float
    error: float

    @classmethod
    def of(cls, each: np.ndarray) -> Estimate:
        """The mean of one number a row."""
        return cls(float(each.mean()), float(each.std() / len(each) ** 0.5))

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ± {100 * self.error:.1f}"


@dataclass(frozen=True)
class BackboneProbe:
    """One backbone's worth.

    Attributes:
        name: As it was named.
        width: Number of features.
        right: By method, (N,) whether each judged row was told right by a classifier that never saw it.
        settings: By method, the setting that is best over all judged rows, in words.
        logme: LogME of the training features.
        h_score: Their H-score, with shrinkage.
        leep: LEEP of the backbone's own classes; None where it has no trained head.
        seconds: What "extract" and "probe" took.
    """

    name: str
    width: int
    right: Mapping[str, np.ndarray]
    settings: Mapping[str, str]
    logme: float
    h_score: float
    leep: float | None
    seconds: Mapping[str, float]

    @property
    def accuracy(self) -> dict[str, Estimate]:
        """By method, the share of judged rows told right, with its standard error."""
        return {method: Estimate.of(right) for method, right in self.right.items()}

    @property
    def method(self) -> str:
        """The method that tells most of the rows right; the first of equals."""
        return max(self.right, key=lambda method: self.right[method].sum())

    @property
    def rows_right(self) -> int:
        """How many of the judged rows its best method tells right."""
        return int(self.right[self.method].sum())


@dataclass(frozen=True)
class ProbeReport:
    """Backbones ranked for one data set; `print(report)` is a table.

    Attributes:
        data: Name of the data.
        judged: On which rows, and how, in words.
        majority: Share of the judged rows that are of the most frequent class: what knowing nothing gives.
        backbones: Best first, by the accuracy of each one's best method.
        test: Of the best backbone with its best method, on the test split; None where the data has none.
    """

    data: str
    judged: str
    majority: float
    backbones: tuple[BackboneProbe, ...]
    test: Estimate | None

    @property
    def best(self) -> BackboneProbe:
        """The first of the ranking."""
        return self.backbones[0]

    def behind(self, backbone: BackboneProbe) -> Estimate:
        """How much less accurate a backbone is than the best, on the same rows.

        Its error is that of the paired difference: two backbones that fail on the same rows differ less than their
        own errors say.
        """
        mine, its = self.best.right[self.best.method], backbone.right[backbone.method]
        return Estimate.of(mine.astype(np.float64) - its)

    def __str__(self) -> str:
        methods = list(self.best.right)
        head = ["backbone", *methods, "behind", "LogME", "H-score", "LEEP", "features", "seconds"]
        lines = [head, *(self._line(each, methods) for each in self.backbones)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(cells))
            for cells in (list(zip(line, widths, strict=True)) for line in lines)
        ]
        setting = self.best.settings[self.best.method]
        chosen = f"{self.best.name}, {self.best.method}{f' ({setting})' if setting else ''}"
        tested = "there is no test split" if self.test is None else f"test accuracy {self.test} %"
        return "\n".join(
            [
                f"{self.data}: accuracy in %, {self.judged}; the most frequent class alone gives "
                f"{100 * self.majority:.1f}",
                *(line.rstrip() for line in table),
                f"chosen: {chosen}; {tested}",
            ]
        )

    def _line(self, each: BackboneProbe, methods: list[str]) -> list[str]:
        scores = [f"{each.logme:.3f}", f"{each.h_score:.2f}", "-" if each.leep is None else f"{each.leep:.3f}"]
        behind = "" if each is self.best else str(self.behind(each))
        found = each.accuracy
        accuracies = [f"{found[method]}{' *' if method == each.method else '  '}" for method in methods]
        return [each.name, *accuracies, behind, *scores, str(each.width), f"{sum(each.seconds.values()):.1f}"]
