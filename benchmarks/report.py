"""Writes docs/benchmarks.md from the JSON files of all benchmarks: first what was to be reached, then the figures.

python benchmarks/report.py
"""

from pathlib import Path

import accelerator
import accuracy
import cost_curves
import distillation_cost
import evaluation_cost
import frozen_training
import import_time
import input_pipeline
import memory_formats
import peers
import probes
import trainer_cost
from results import Judged, markdown

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
JUDGED = (frozen_training, trainer_cost, input_pipeline, distillation_cost, evaluation_cost, probes, import_time)
"""The benchmarks with targets: `judged()` are their lines of the first table, `table()` their section of the page."""
OTHERS = (memory_formats, cost_curves, peers, accelerator)
"""Those that have a section only."""


def judged() -> list[Judged]:
    """Every target of speed that was measured."""
    return [line for benchmark in JUDGED for line in benchmark.judged()]


def page() -> str:
    """The page."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `python benchmarks/report.py` from the JSON files beside that script; `make bench` measures all",
        "of them. The real data and weights lie beside the project (`../shared`).",
        "",
        "## What was to be reached",
        "",
        "Ratios of CPU time. The arms of a comparison do equal work, which is checked by equal results; they run in",
        "turn in one process, in an order drawn anew each round. A figure is the median of the rounds' ratios with",
        "its 95 % interval. A target is reached if that end of the interval meets it which is worse.",
        "",
        *markdown(["job", "against", "to reach", "measured", "reached"], [line.cells() for line in judged()]),
    ]
    for benchmark in (*JUDGED, *OTHERS):
        if section := benchmark.table():
            lines += ["", *section]
    lines += [
        "",
        "## Accuracy",
        "",
        "Of the recipes, on 2 CPU cores. Scores are percentages, of the last step unless the table's title says",
        "otherwise; nothing was selected on the split that is shown. CIFAR-10 is a lossy JPEG copy: published",
        "accuracies do not carry over to it. The seconds were taken on one thread beside other work: they say what a",
        "run costs, and are no claim of speed.",
        "",
        *accuracy.table(),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
