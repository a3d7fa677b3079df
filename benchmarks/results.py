"""What a benchmark leaves: one JSON file of cases, each with the machine, versions and seeds it was taken with.

save(path, "image", {"label": ..., **measured.facts()})
load(path)["image"]                                           # {} for a file that is not there
markdown(["job", "ratio"], [["probe", "12.1 [11.8, 12.5]"]])
"""

import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from hf_transfer.evaluation.figure import Figure

HOME = Path(__file__).resolve().parent
SHARED = HOME.parents[1] / "shared"
Cases = Mapping[str, Mapping[str, Any]]
"""What `load` gives: by name, what was measured."""
VERSIONS = ("torch", "transformers", "timm", "peft", "accelerate", "datasets", "hf-transfer-learning")


def shared(name: str) -> str:
    """A file or folder of the data and weights that lie beside the project.

    Raises:
        FileNotFoundError: If it is not there.
    """
    path = SHARED / name
    if not path.exists():
        raise FileNotFoundError(f"it needs {path}, which is not part of the project")
    return str(path)


def environment() -> dict[str, Any]:
    """The machine and the versions that a case is measured with."""
    import torch

    return {
        "machine": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: found for name in VERSIONS if (found := _version(name))},
    }


def _processor() -> str:
    """The processor as Linux names it, elsewhere its architecture."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def load(path: Path) -> dict[str, Any]:
    """The cases of a file by name; none where there is no file."""
    return json.loads(path.read_text())["cases"] if path.is_file() else {}


def save(path: Path, name: str, case: Mapping[str, Any]) -> None:
    """Writes a case, with the environment it was taken in, beside those that are in the file."""
    cases = {**load(path), name: {**case, "environment": environment()}}
    path.write_text(json.dumps({"cases": cases}, indent=1) + "\n")


def section(path: Path) -> Callable[[Callable[[Cases], list[str]]], Callable[..., list[str]]]:
    """Makes of a function of cases one of the file that they are in; it gives no lines where there is no file.

    Args:
        path: The file, unless the caller names another.
    """

    def of_cases(table: Callable[[Cases], list[str]]) -> Callable[..., list[str]]:
        @wraps(table)
        def of_file(path: Path = path) -> list[str]:
            cases = load(path)
            return table(cases) if cases else []

        return of_file

    return of_cases


def measured_on(cases: Iterable[Mapping[str, Any]]) -> str:
    """In words, where some cases were measured."""
    found = dict.fromkeys(_in_words(case["environment"]) for case in cases)
    return "; ".join(found)


def _in_words(environment: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    return f"{environment['threads']} thread(s) of {environment['machine']}, {versions}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table."""
    lines = [" | ".join(head), "|".join("---" for _ in head), *(" | ".join(map(str, row)) for row in rows)]
    return [f"|{line}|" if line.startswith("---") else f"| {line} |" for line in lines]


@dataclass(frozen=True)
class Judged:
    """A line of the table that docs/benchmarks.md opens with.

    Attributes:
        job: What is done.
        against: What by.
        target: What is to be reached.
        sense: Whether a figure is to be at most the target, or at least.
        figure: What was measured.
    """

    job: str
    against: str
    sense: Literal["<=", ">="]
    target: float
    figure: Figure

    @property
    def reached(self) -> str:
        """Whether, by the median and by the end of its interval that is worse."""
        worse = self.figure.high if self.sense == "<=" else self.figure.low
        if self._meets(worse):
            return "yes"
        return "by the median" if self._meets(self.figure.value) else "no"

    def _meets(self, value: float) -> bool:
        return value <= self.target if self.sense == "<=" else value >= self.target

    def cells(self) -> list[str]:
        """As cells of the table."""
        return [self.job, self.against, f"{self.sense} {self.target:g}", str(self.figure), self.reached]
