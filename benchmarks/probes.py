"""Sixteen linear probes in one pass beside one probe, on the same features and batches.

    OMP_NUM_THREADS=1 python benchmarks/probes.py              # about a minute on one core
    OMP_NUM_THREADS=1 python benchmarks/probes.py --rounds 9 --steps 500

Three arms run once a round in one process, in an order drawn anew each round: `one`, one probe by fit_probes;
`sixteen`, 16 of them at once; and `loop`, one probe as one would write it: nn.Linear, autograd, torch.optim.SGD with a
cosine schedule, on features standardised before. Features and labels are noise, which no arm learns so well that it
would compute with denormal numbers; fit_probes avoids them.

That the work is equal is checked by results, in float64: each of the sixteen is the probe that was trained apart, and
the loop's probe is that of `one`.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from paired import SEED, UnequalWork, interleave, ratio, timed
from results import Cases, Judged, load, markdown, measured_on, save, section
from torch import Tensor, nn

from hf_transfer.frozen import linear_probes
from hf_transfer.frozen.linear_probes import GRID, Setting, fit_probes

RESULTS = Path(__file__).with_suffix(".json")
ROUNDS, WARM_UP, BATCH, TARGET = 15, 2, 256, 4.0
CASES = {"MiniLM, 2 classes": (384, 2), "MiniLM, 10 classes": (384, 10), "MobileNetV2, 10 classes": (1280, 10)}
ROWS = {  # ratio -> what it is, target
    "sixteen / loop": ("16 probes at once / one probe, bare loop", f"<= {TARGET:g}"),
    "sixteen / one": ("16 probes at once / one probe by the same code", ""),
    "one / loop": ("one probe / one probe, bare loop", ""),
}


@dataclass(frozen=True)
class Case:
    """Noise in the place of features of N rows.

    Attributes:
        x: (N, D).
        labels: (N,).
        classes: C.
        steps: Optimizer steps of a training.
    """

    x: Tensor
    labels: Tensor
    classes: int
    steps: int

    @classmethod
    def drawn(cls, width: int, classes: int, rows: int, steps: int, dtype: torch.dtype = torch.float32) -> "Case":
        draw = torch.Generator().manual_seed(SEED)
        x = torch.randn(rows, width, generator=draw, dtype=torch.float64)
        return cls(x.to(dtype), torch.arange(rows) % classes, classes, steps)

    def fitted(self, settings: Sequence[Setting]) -> Tensor:
        """(P, D, C) weights by fit_probes."""
        return fit_probes(
            self.x, self.labels, self.classes, settings=settings, steps=self.steps, batch_size=BATCH, seed=SEED
        ).weight

    def looped(self, setting: Setting) -> Tensor:
        """(D, C) weights by a bare loop."""
        mean, scale = linear_probes._standard(self.x)
        standard = (self.x - mean) / scale
        layer = nn.Linear(self.x.shape[1], self.classes, dtype=self.x.dtype)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        groups = [
            {"params": [layer.weight], "weight_decay": setting.weight_decay},
            {"params": [layer.bias], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(groups, lr=setting.learning_rate, momentum=linear_probes.MOMENTUM)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.steps)
        for rows in linear_probes._batches(len(self.x), BATCH, self.steps, SEED):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(standard[rows]), self.labels[rows]).backward()
            optimizer.step()
            schedule.step()
        return layer.weight.detach().T


CHOSEN = GRID[5]  # which of the sixteen is the one
ARMS: dict[str, Callable[[Case], Any]] = {
    "one": lambda case: case.fitted([CHOSEN]),
    "sixteen": lambda case: case.fitted(GRID),
    "loop": lambda case: case.looped(CHOSEN),
}


def check(width: int, classes: int) -> float:
    """The largest difference between weights that should be equal, in float64.

    Raises:
        UnequalWork: If it is above 1e-9.
    """
    case = Case.drawn(width, classes, rows=600, steps=20, dtype=torch.float64)
    together, one = case.fitted(GRID), case.fitted([CHOSEN])[0]
    apart = torch.cat([case.fitted([setting]) for setting in GRID])
    found = max(float((a - b).abs().max()) for a, b in ((together, apart), (case.looped(CHOSEN), one)))
    if not found <= 1e-9:
        raise UnequalWork(f"{width} features, {classes} classes: the arms end {found} apart")
    return found


def measure(case: Case, rounds: int, label: str) -> dict[str, Any]:
    """Times the arms of a case."""
    arms = {name: timed(lambda work=work: work(case)) for name, work in ARMS.items()}
    return interleave(arms, label=label, rounds=rounds, warm_up=WARM_UP).facts()


def judged(path: Path = RESULTS) -> list[Judged]:
    """The lines of the table of targets."""
    return [
        Judged(f"16 probes at once: {name}", "one probe, bare loop", "<=", TARGET, ratio(found, "sixteen", "loop"))
        for name, found in load(path).items()
    ]


@section(RESULTS)
def table(cases: Cases) -> list[str]:
    """The section of docs/benchmarks.md."""
    rows = [
        (name, title, target, ratio(found, *name_of.split(" / ")), len(found["cpu"]["one"]))
        for name, found in cases.items()
        for name_of, (title, target) in ROWS.items()
    ]
    return [
        "## Sixteen linear probes at once",
        "",
        *markdown(["features", "ratio", "target", "CPU time", "rounds"], rows),
        "",
        f"`python benchmarks/probes.py` on {measured_on(cases.values())}.",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all cases, writes the file, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    for name, (width, classes) in CASES.items():
        apart = check(width, classes)
        case = Case.drawn(width, classes, given.rows, given.steps)
        facts = {"features": width, "classes": classes, "rows": given.rows, "steps": given.steps, "apart": apart}
        save(given.results, name, {**facts, **measure(case, given.rounds, name)})
    print("\n".join(table(given.results)))


if __name__ == "__main__":
    main()
