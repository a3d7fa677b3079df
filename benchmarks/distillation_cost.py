"""What a teacher costs: an epoch of distillation beside an epoch of plain training of the same student.

    OMP_NUM_THREADS=1 python benchmarks/distillation_cost.py                # all cases: about 8 minutes of one core
    OMP_NUM_THREADS=1 python benchmarks/distillation_cost.py text --rounds 7  # one; the others' figures stay

Four ways to train one epoch run once a round in one process, in an order drawn anew each round, all from the same
weights over the same batches: the stock transformers.Trainer, TransferTrainer with cross-entropy, DistillationTrainer
with a warm cache, and with a live teacher. The forward passes of student and teacher on those batches are timed in the
same round: with them 1 + F_T / (3 F_S) is what a live teacher costs at least, a training step being three forward
passes of the student. F_S is that of a training step, which makes a graph; F_T is in inference mode.

That the work is equal is checked by the weights that the arms end with: see `measure_in`.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from hf_transfer._torchvision import make_torchvision_importable

make_torchvision_importable()

import torch  # noqa: E402
import transformers  # noqa: E402
from command import main  # noqa: E402
from paired import SEED, Clock, Outcome, Same, UnequalWork, each_round, interleave, ratio  # noqa: E402
from results import Cases, Judged, load, markdown, measured_on, section, shared  # noqa: E402
from watch import Watch  # noqa: E402

from hf_transfer import (  # noqa: E402
    Backbone,
    DistillationConfig,
    DistillationTrainer,
    TransferConfig,
    TransferTrainer,
    load_backbone,
    load_data,
)
from hf_transfer.data.collate import collator_for  # noqa: E402
from hf_transfer.data.replay import dataset_epoch  # noqa: E402
from hf_transfer.data.transforms import prepare  # noqa: E402
from hf_transfer.distillation.live import LiveTeacher  # noqa: E402
from hf_transfer.distillation.student import carve  # noqa: E402
from hf_transfer.evaluation.figure import Figure  # noqa: E402
from hf_transfer.objective import CONTRACT_COLUMNS, model_inputs  # noqa: E402
from hf_transfer.objectives import CrossEntropy, SoftTargets  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
ROUNDS = 7
ARMS = ("stock", "plain", "cached", "live")
TARGET = 1.05
ROWS = {
    "cached / plain": ("warm cache / TransferTrainer", f"<= {TARGET:g}"),
    "cached / stock": ("warm cache / transformers.Trainer", ""),
    "plain / stock": ("TransferTrainer / transformers.Trainer", ""),
    "live / plain": ("live teacher / TransferTrainer", ""),
    "floor": ("floor of a live teacher", ""),
    "live / plain / floor": ("live teacher / TransferTrainer / floor", "<= 1.10"),
    "(live - plain) / teacher": ("(live teacher - TransferTrainer) / F_T", ""),
}
EQUAL = 0.01  # two runs of the same work end at least so near each other, in units of how far they went


@dataclass(frozen=True)
class Case:
    """A student, its teacher, and the rows of an epoch.

    Attributes:
        label: What it is, for the table.
        student: From whose weights each epoch starts.
        teacher: What it knows does not matter here.
        rows: Prepared training rows.
        batch_size: Rows a step.
    """

    label: str
    student: Backbone
    teacher: Backbone
    rows: Any
    batch_size: int


# ---- the arms -----------------------------------------------------------------------------------------------------


def trainer_of(arm: str, case: Case, folder: Path, *, soft: float = 0.9, hard: float = 0.1) -> transformers.Trainer:
    """A trainer of one epoch from the case's weights."""
    student = replace(case.student, model=deepcopy(case.student.model))
    collator = collator_for(student)
    settings: dict[str, Any] = {
        "output_dir": str(folder / arm), "per_device_train_batch_size": case.batch_size, "num_train_epochs": 1,
        "learning_rate": 1e-4, "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "report_to": "none", "logging_steps": 10, "seed": SEED, "data_seed": SEED,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    if arm == "stock":
        args = transformers.TrainingArguments(**settings, remove_unused_columns=False)
        trainer = transformers.Trainer(
            model=student.model, args=args, train_dataset=case.rows, data_collator=_WithoutIds(collator)
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer
    if arm == "plain":
        return TransferTrainer(
            model=student.model, objectives=[CrossEntropy()], args=TransferConfig(**settings),
            train_dataset=case.rows, data_collator=collator,
        )  # fmt: skip
    mode = {"cached": "always", "live": "never"}[arm]
    caches = {"teacher_cache": mode, "teacher_cache_dir": str(folder / "caches")}
    return DistillationTrainer(
        model=student, teacher=LiveTeacher(case.teacher, student), objectives=[SoftTargets(4.0, weight=soft)],
        args=DistillationConfig(**settings, **caches, hard_weight=hard), train_dataset=case.rows,
        data_collator=collator,
    )  # fmt: skip


class _WithoutIds:
    """A collator whose batches the stock Trainer can hand to the model."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, rows: Any) -> dict[str, Any]:
        batch = self.collator(rows)
        return {name: value for name, value in batch.items() if name == "labels" or name not in CONTRACT_COLUMNS}


def train(arm: str, case: Case, folder: Path, **weights: float) -> tuple[Watch, torch.Tensor]:
    """One epoch of one arm: its times, and the weights that it ends with."""
    trainer = trainer_of(arm, case, folder, **weights)
    counter = dataset_epoch(case.rows)
    if counter is not None:
        counter.set(0)  # the stock Trainer leaves it where it is
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    return watch, flat(trainer.model)


def forward_times(case: Case, batches: Iterable[Mapping[str, Any]]) -> tuple[Clock, Clock]:
    """Teacher's and student's forward passes over some batches, one after the other batch by batch."""
    student, teacher = replace(case.student, model=deepcopy(case.student.model)), case.teacher
    bridge = LiveTeacher(teacher, student).bridge
    student.model.train()
    totals = [Clock(0, 0), Clock(0, 0)]
    for batch in batches:
        own, seen = model_inputs(batch), bridge(batch)
        start = Clock.now()
        with torch.inference_mode():
            teacher.model(**seen)
        middle = Clock.now()
        outputs = student.model(**own)
        end = Clock.now()
        del outputs  # its graph goes in the backward pass, which is not part of this
        totals = [totals[0].plus(middle.since(start)), totals[1].plus(end.since(middle))]
    return totals[0], totals[1]


# ---- rounds -------------------------------------------------------------------------------------------------------


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Runs the arms of a case in a folder that is gone afterwards; see `measure_in`."""
    with tempfile.TemporaryDirectory() as folder:
        return measure_in(Path(folder), case, rounds)


def measure_in(folder: Path, case: Case, rounds: int) -> dict[str, Any]:
    """Runs the arms of a case; gives each round's seconds, and that the arms did the same work.

    That is told by how far apart the weights are that they end with, in units of how far plain training moved them; 0
    is the same bit for bit. Plain training ends where the stock Trainer does, and where distillation does with a
    teacher of weight 0. With a teacher the weights end elsewhere, live or from a cache; between those two lies the
    rounding of the cache to half precision.

    Raises:
        UnequalWork: If it is not so.
    """
    batches = list(trainer_of("plain", case, folder).get_train_dataloader())
    train("cached", case, folder)  # writes the cache
    plain, silent = train("plain", case, folder)[1], train("cached", case, folder, soft=0.0, hard=1.0)[1]
    moved = float((plain - flat(case.student.model)).norm())

    def distance(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).norm()) / moved

    def epoch(arm: str) -> Outcome:
        watch, end = train(arm, case, folder)
        return Outcome(end, {"": watch.epochs, "setup": watch.setup})

    def forward() -> Outcome:
        teacher, student = forward_times(case, batches)
        return Outcome(plain, {"teacher": teacher, "student": student})

    found = interleave(
        {**{arm: partial(epoch, arm) for arm in ARMS}, "forward": forward},
        label=case.label, rounds=rounds, repeats=EQUAL, same=[Same("stock", "plain", EQUAL)], distance=distance,
    )  # fmt: skip
    teacher_s = {
        "live, cached": distance(found.results["live"], found.results["cached"]),
        "cached, plain": distance(found.results["cached"], plain),
    }
    found.apart.update(teacher_s, **{"silent teacher, plain": distance(silent, plain)})
    if found.apart["silent teacher, plain"] > EQUAL or teacher_s["live, cached"] > 0.1 * teacher_s["cached, plain"]:
        raise UnequalWork(f"{case.label}: the arms did not do the work that they should have: {found.apart}")
    facts = {"label": case.label, "rows": len(case.rows), "batch_size": case.batch_size, "steps": len(batches)}
    return {**facts, **found.facts()}


def flat(model: Any) -> torch.Tensor:
    """All weights as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


# ---- figures ------------------------------------------------------------------------------------------------------


def figures(found: Mapping[str, Any], kind: str = "cpu") -> dict[str, Figure]:
    """What a case's seconds amount to.

    Args:
        found: What `measure` gave.
        kind: "cpu" or "wall".

    Returns:
        By name (as in ROWS): ratios of epochs; the floor of a live teacher, and its epoch over the floor of its
        round; what it adds to a plain epoch, over its forward passes alone.
    """
    rounds = each_round(found, kind)

    def floor(each: Mapping[str, float]) -> float:
        return 1 + each["forward teacher"] / (3 * each["forward student"])

    return {
        "cached / plain": ratio(found, "cached", "plain", kind),
        "cached / stock": ratio(found, "cached", "stock", kind),
        "plain / stock": ratio(found, "plain", "stock", kind),
        "live / plain": ratio(found, "live", "plain", kind),
        "floor": Figure.of(map(floor, rounds)),
        "live / plain / floor": Figure.of(each["live"] / each["plain"] / floor(each) for each in rounds),
        "(live - plain) / teacher": Figure.of((r["live"] - r["plain"]) / r["forward teacher"] for r in rounds),
    }


def judged(path: Path = RESULTS) -> list[Judged]:
    """The lines of the table of targets."""
    return [
        Judged(
            f"distillation epoch, warm cache: {found['label']}", "epoch of the student alone, TransferTrainer", "<=",
            TARGET, figures(found)["cached / plain"],
        )
        for found in load(path).values()
    ]  # fmt: skip


@section(RESULTS)
def table(cases: Cases) -> list[str]:
    """The section of docs/benchmarks.md."""
    rows = []
    for found in cases.values():
        cpu, wall = figures(found), figures(found, "wall")
        for name, (title, target) in ROWS.items():
            rows.append((found["label"], title, target, cpu[name], wall[name], len(found["cpu"]["plain"])))
    return [
        "## What a teacher costs: an epoch of distillation over one of plain training of the same student",
        "",
        "SoftTargets and cross-entropy, against cross-entropy alone. The floor of a live teacher is",
        "1 + F_T / (3 F_S), from forward times of teacher and student in each round.",
        "",
        *markdown(["student, teacher", "epochs compared", "target", "CPU time", "wall time", "rounds"], rows),
        "",
        *(_in_words(found) for found in cases.values()),
        "",
        f"`python benchmarks/distillation_cost.py` on {measured_on(cases.values())}.",
    ]


def _in_words(found: Mapping[str, Any]) -> str:
    """What a step and a run cost more, of one case."""
    cpu = found["cpu"]

    def more(suffix: str) -> list[float]:
        return [cached - plain for cached, plain in zip(cpu["cached" + suffix], cpu["plain" + suffix], strict=True)]

    a_step = 1000 * median(cpu["plain"]) / found["steps"]
    step = Figure.of(1000 * seconds / found["steps"] for seconds in more(""))
    return (
        f"- {found['label']}: {found['steps']} steps of {found['batch_size']} rows, each {a_step:.0f} ms of CPU time. "
        f"The warm cache adds {step.value:.1f} [{step.low:.1f}, {step.high:.1f}] ms to a step, and to a run the "
        f"{median(more(' setup')):.2f} s in which it is found and checked."
    )


# ---- cases --------------------------------------------------------------------------------------------------------


def image(rows: int = 320, batch_size: int = 32) -> Case:
    """LCNet from random weights beside a MobileNetV2, at 96 px, on CIFAR-10 under light augmentation."""
    data = load_data(shared("data/cifar10"), max_train_samples=2 * rows)  # some are held out
    teacher = load_backbone(shared("weights/mobilenetv2_100.coral_tf2_in1k"), labels=data.labels, image_size=96)
    student = load_backbone("lcnet_050", labels=data.labels, pretrained=False, image_size=96)
    prepared = prepare(data.splits["train"], student, data.columns, train=True)
    label = "lcnet_050 beside mobilenetv2_100, 96 px, CIFAR-10"
    return Case(label, student, teacher, prepared.select(range(rows)), batch_size)


def text(rows: int = 160, batch_size: int = 32) -> Case:
    """Three layers of MiniLM beside all six, on SST-2."""
    data = load_data(shared("data/sst2"), max_train_samples=2 * rows)
    teacher = load_backbone(shared("weights/all-MiniLM-L6-v2"), labels=data.labels)
    prepared = prepare(data.splits["train"], teacher, data.columns, train=True)
    label = "3 layers of MiniLM beside all 6, SST-2"
    return Case(label, carve(teacher, layers=3), teacher, prepared.select(range(rows)), batch_size)


CASES: dict[str, Callable[[], Case]] = {"image": image, "text": text}


if __name__ == "__main__":
    main(__doc__, CASES, measure, table, RESULTS, ROUNDS)
