"""`import hf_transfer` beside `import transformers` and `import torch`, each in a process of its own.

    OMP_NUM_THREADS=1 python benchmarks/import_time.py

An arm is the process from its start to its end; `python` is one that imports nothing. Files are in the page cache
after the rounds that do not count: what a cold disk adds is not in the figures.
"""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from command import main
from paired import interleave, ratio, timed
from results import HOME, Cases, Judged, load, markdown, measured_on, section

from hf_transfer.evaluation.figure import Figure

RESULTS = Path(__file__).with_suffix(".json")
ROUNDS = 15
MODULES = {"hf_transfer": "hf_transfer", "transformers": "transformers", "torch": "torch", "python": "sys"}
SECONDS = 0.3  # what `import hf_transfer` may take beyond Python's own start


def imported(module: str) -> int:
    """Imports a module in a new process, from the folder above this one."""
    return subprocess.run([sys.executable, "-c", f"import {module}"], cwd=HOME.parent, check=True).returncode


def measure(modules: dict[str, str], rounds: int) -> dict[str, Any]:
    """Times the processes."""
    arms = {name: timed(partial(imported, module)) for name, module in modules.items()}
    return interleave(arms, label="import", rounds=rounds).facts()


def judged(path: Path = RESULTS) -> list[Judged]:
    """The lines of the table of targets."""
    lines = []
    for found in load(path).values():
        beside, alone = ratio(found, "hf_transfer", "transformers"), seconds(found)
        lines.append(Judged("`import hf_transfer`", "`import transformers`", "<=", 1.0, beside))
        lines.append(Judged("`import hf_transfer`, seconds", "Python's own start taken off", "<=", SECONDS, alone))
    return lines


def seconds(found: Any, module: str = "hf_transfer") -> Figure:
    """Seconds of wall time that a module takes beyond Python's own start."""
    return Figure.of(own - bare for own, bare in zip(found["wall"][module], found["wall"]["python"], strict=True))


@section(RESULTS)
def table(cases: Cases) -> list[str]:
    """The section of docs/benchmarks.md."""
    rows = [
        (f"`import {name}`", f"{1000 * median(found['cpu'][name]):.0f}", len(found["cpu"][name]))
        for found in cases.values()
        for name in ("hf_transfer", "transformers", "torch")
    ]
    bare = 1000 * median(next(iter(cases.values()))["cpu"]["python"])
    return [
        "## Import",
        "",
        f"Processes that import one module and end; one that imports nothing takes {bare:.0f} ms of CPU time.",
        "",
        *markdown(["process", "ms of CPU time", "rounds"], rows),
        "",
        f"`python benchmarks/import_time.py` on {measured_on(cases.values())}.",
    ]


CASES: dict[str, Callable[[], dict[str, str]]] = {"import": lambda: MODULES}


if __name__ == "__main__":
    main(__doc__, CASES, measure, table, RESULTS, ROUNDS)
