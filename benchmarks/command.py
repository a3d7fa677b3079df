"""The command line that the benchmarks share: `python benchmarks/X.py [case ...] [--rounds N] [--results FILE]`."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paired import ROUNDS, SEED
from results import save

Makers = Mapping[str, Callable[[], Any]]
Measure = Callable[[Any, int], Mapping[str, Any]]


def run(cases: Makers, measure: Measure, rounds: int, path: Path) -> None:
    """Measures cases and writes each into the file as it is done, beside those that are there.

    Args:
        cases: By name, what makes each; one whose data, device or peer is missing says so and is left out.
        measure: (case, rounds) -> what is kept of it.
        rounds: That count.
        path: The file.
    """
    for name, make in cases.items():
        try:
            case = make()
        except (FileNotFoundError, ImportError) as missing:
            print(f"{name}: skipped, {missing}", file=sys.stderr)
            continue
        save(path, name, measure(case, rounds))


def main(
    doc: str | None,
    cases: Makers,
    measure: Measure,
    table: Callable[[Path], list[str]],
    path: Path,
    rounds: int = ROUNDS,
    argv: Sequence[str] | None = None,
) -> None:
    """Runs the cases named on the command line, all by default, and prints the table.

    Args:
        doc: What --help says.
        cases: As for `run`.
        measure: As for `run`.
        table: The file -> the lines of its section in docs/benchmarks.md.
        path: The file, unless --results names another.
        rounds: How many, unless --rounds says so.
        argv: The arguments; those of the process by default.
    """
    import torch

    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*cases, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--results", type=Path, default=path)
    given = parser.parse_args(argv)
    torch.manual_seed(SEED)
    names = cases if "all" in given.cases else given.cases
    run({name: cases[name] for name in names}, measure, given.rounds, given.results)
    print("\n".join(table(given.results)))
