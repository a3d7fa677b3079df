"""Training a head, or the last blocks, of a frozen network: from a prefix cache, beside the plain Trainer.

    OMP_NUM_THREADS=1 python benchmarks/frozen_training.py                       # all cases: see docs/benchmarks.md
    OMP_NUM_THREADS=1 python benchmarks/frozen_training.py probe-text --rounds 7 # one; the others' figures stay

`plain` is transformers.Trainer on the same network with the same parameters frozen by requires_grad, and data as
transformers' example scripts make it: timm's transform in `with_transform`; texts padded to 128 tokens. `plain, short`
pads them to the longest of their batch instead. `cached` is what finetune(cache="always") does, in an empty folder.
All are timed from raw rows to trained weights: tokenising or decoding, extraction, the making of the trainer, every
step. They take the same rows in the same order with the same batch size, rate and schedule; dropout is off, nothing is
augmented, and frozen layers are in eval mode in all of them, so that they end with the same logits on rows held out.

An epoch of the plain arms costs as much as any other. Where a case trains more epochs than `plain_epochs`, the arm
trains those, and what the rest would take is added from its own epochs: such figures are marked.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from command import main
from frozen_arms import PADDED, Case, HeldOut, cached, fresh_maps, plain
from paired import Arm, Same, UnequalWork, each_round, interleave, largest_difference
from results import Cases, Judged, load, markdown, measured_on, section, shared
from torch import nn

from hf_transfer import Backbone, load_backbone, load_data
from hf_transfer.data.sources import Data
from hf_transfer.evaluation.figure import Figure
from hf_transfer.tuning import LinearProbe, PartialFreeze, Tuning

RESULTS = Path(__file__).with_suffix(".json")
EQUAL = 1e-3  # the most that logits of held-out rows may differ


# ---- rounds -------------------------------------------------------------------------------------------------------


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Times all arms of a case.

    Raises:
        UnequalWork: If logits or accuracies of held-out rows differ after as many epochs as the plain arms train.
    """
    held_out, whole = HeldOut(case), case.plain_epochs in case.epochs
    arms: dict[str, Arm] = {arm: partial(plain, case, arm, case.plain_epochs, held_out) for arm in case.plain_arms}
    arms |= {f"cached {epochs}": partial(cached, case, epochs, held_out) for epochs in case.epochs}
    with fresh_maps():
        apart = compare(case, 1 if whole else case.plain_epochs, held_out)  # and a warm-up
        same = [Same(arm, f"cached {case.plain_epochs}", EQUAL) for arm in case.plain_arms] if whole else []
        found = interleave(arms, label=case.label, rounds=rounds, warm_up=0, repeats=EQUAL, same=same)
    found.apart.update({name: max(value, found.apart.get(name, 0.0)) for name, value in apart.items()})
    return {
        "label": case.label,
        "rows": len(case.data.splits["train"]),
        "batch_size": case.batch_size,
        "epochs": list(case.epochs),
        "plain_epochs": case.plain_epochs,
        "targets": list(case.targets),
        "accuracy": {arm: held_out.accuracy(logits) for arm, logits in found.results.items()},
        **found.facts(),
    }


def compare(case: Case, epochs: int, held_out: HeldOut) -> dict[str, float]:
    """How far the logits of plain arms and cached arm are apart after some epochs.

    Raises:
        UnequalWork: If it is more than EQUAL, or accuracies differ by more than a point.
    """
    own, apart = cached(case, epochs, held_out).result, {}
    for arm in case.plain_arms:
        logits = plain(case, arm, epochs, held_out).result
        apart[f"{arm}, cached"] = largest_difference(logits, own)
        points = 100 * abs(held_out.accuracy(logits) - held_out.accuracy(own))
        if not apart[f"{arm}, cached"] <= EQUAL or points > 1:
            raise UnequalWork(f"{case.label}: {arm} and cached end {apart} and {points:.1f} points apart.")
    return apart


# ---- figures ------------------------------------------------------------------------------------------------------


def speedups(found: Mapping[str, Any], epochs: int, kind: str = "cpu") -> dict[str, Figure]:
    """How many times as long each plain arm takes, by its name.

    Args:
        found: What `measure` gave.
        epochs: That are trained; the plain arms' own are lengthened to so many.
        kind: "cpu" or "wall".
    """
    longer = epochs / found["plain_epochs"] - 1
    return {
        arm: Figure.of(
            (each[arm] + longer * each[f"{arm} epochs"]) / each[f"cached {epochs}"] for each in each_round(found, kind)
        )
        for arm in found[kind]
        if arm in ("plain", "plain, short")
    }


AGAINST = {"plain": "plain Trainer", "plain, short": "plain Trainer, padded to the batch's longest"}


def judged(path: Path = RESULTS) -> list[Judged]:
    """The lines of the table of targets."""
    return [
        Judged(f"{found['label']}, {epochs} epochs", AGAINST[arm], ">=", target, figure)
        for found in load(path).values()
        for epochs, target in zip(found["epochs"], found["targets"], strict=True)
        for arm, figure in speedups(found, epochs).items()
    ]


@section(RESULTS)
def table(cases: Cases) -> list[str]:
    """The section of docs/benchmarks.md."""
    rows = []
    for found in cases.values():
        for epochs in found["epochs"]:
            cpu, wall = speedups(found, epochs), speedups(found, epochs, "wall")
            own = median(found["cpu"][f"cached {epochs}"])
            rest = own - median(found["cpu"][f"cached {epochs} epochs"])
            mark = "" if epochs == found["plain_epochs"] else f" (from {found['plain_epochs']})"
            for arm, figure in cpu.items():
                seconds = (f"{own:.2f}", f"{rest:.2f}")
                rows.append((found["label"], f"{epochs}{mark}", AGAINST[arm], figure, wall[arm], *seconds))
    head = [
        "job",
        "epochs",
        "against",
        "times as long, CPU",
        "wall",
        "cached: seconds of CPU",
        "before its first step",
    ]
    told = [_in_words(found) for found in cases.values()]
    return [
        "## Frozen layers computed once",
        "",
        "From raw rows to trained weights, by finetune's prefix cache in an empty folder, and by the plain Trainer",
        "with the same parameters frozen. (from n): the plain arm trained n epochs, and its others are taken to be as",
        "long.",
        "",
        *markdown(head, rows),
        "",
        *told,
        "",
        "Where one of six like blocks trains, 10 epochs can take 10 x (6 + 2) / (6 + 10 x 3) = 2.2 times as long at",
        "most, a backward pass being two forward passes: more is padding that the cached arm leaves out.",
        "",
        f"`python benchmarks/frozen_training.py` on {measured_on(cases.values())}.",
    ]


def _in_words(found: Mapping[str, Any]) -> str:
    """Rows and results of one case."""
    apart = max(value for name, value in found["checks"].items() if name != "rounds")
    return (
        f"- {found['label']}: {found['rows']} rows, {found['batch_size']} a step, {len(found['cpu']['plain'])} rounds."
        f" Logits of held-out rows end at most {apart:.1e} apart; their accuracy is "
        f"{100 * found['accuracy']['plain']:.1f} % after {found['plain_epochs']} epochs."
    )


# ---- cases --------------------------------------------------------------------------------------------------------


def image(tuning: Tuning, label: str, rows: int = 96, **options: Any) -> Case:
    """MobileNetV2 at 224 px on CIFAR-10."""
    data = load_data(shared("data/cifar10"), max_train_samples=2 * rows, max_eval_samples=32)
    backbone = load_backbone(shared("weights/mobilenetv2_100.coral_tf2_in1k"), labels=data.labels)
    return _case(f"{label}: mobilenetv2, 224 px", backbone, data, tuning, rows, **options)


def text(tuning: Tuning, label: str, rows: int = 96, **options: Any) -> Case:
    """MiniLM on SST-2."""
    data = load_data(shared("data/sst2"), max_train_samples=2 * rows, max_eval_samples=100)
    backbone = load_backbone(shared("weights/all-MiniLM-L6-v2"), labels=data.labels)
    return _case(f"{label}: MiniLM, {PADDED} tokens", backbone, data, tuning, rows, **options)


def _case(label: str, backbone: Backbone, data: Data, tuning: Tuning, rows: int, **options: Any) -> Case:
    for module in backbone.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    data.splits["train"] = data.splits["train"].select(range(rows))
    return Case(label, backbone, data, tuning, **options)


PROBE: dict[str, Any] = {"epochs": (10, 100), "plain_epochs": 10, "targets": (10, 50), "learning_rate": 5e-3}
LAST: dict[str, Any] = {"epochs": (10,), "plain_epochs": 3, "targets": (3,)}
CASES: dict[str, Callable[[], Case]] = {
    "probe-image": lambda: image(LinearProbe(), "linear probe", **PROBE),
    "probe-text": lambda: text(LinearProbe(), "linear probe", rows=256, **PROBE),
    "last-image": lambda: image(PartialFreeze(2), "last 2 blocks", **LAST, learning_rate=5e-3, optim="sgd"),
    "last-text": lambda: text(PartialFreeze(1), "last of 6 blocks", **LAST, learning_rate=2e-4),
}


if __name__ == "__main__":
    main(__doc__, CASES, measure, table, RESULTS)
