"""What the Trainer costs: a training step beside a bare loop's, and an evaluation beside a bare one with its metrics.

    OMP_NUM_THREADS=1 python benchmarks/trainer_cost.py                        # all cases
    OMP_NUM_THREADS=1 python benchmarks/trainer_cost.py head-text --rounds 9   # one; the others' figures stay

Both arms of a case run once a round in one process, in an order drawn anew each round, from the same weights over the
same batches. The bare loop reads them from memory, and does what the Trainer's arguments ask for: the same forward
pass in the same modes, cross-entropy, the backward pass, the norm of the gradients clipped to 1, AdamW in the two
groups that transformers makes, a linear schedule. That the work is equal is checked by its results: both end with the
same weights, and report the same metrics. Times are CPU times of the process; a figure is the median of the rounds'
ratios.
"""

import argparse
import gc
import json
import platform
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hf_transfer._torchvision import make_torchvision_importable

make_torchvision_importable()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from hf_transfer import Backbone, TransferConfig, TransferTrainer, load_backbone  # noqa: E402
from hf_transfer.config import RunConfig  # noqa: E402
from hf_transfer.data.collate import collator_for  # noqa: E402
from hf_transfer.data.sources import load_data  # noqa: E402
from hf_transfer.data.transforms import prepare  # noqa: E402
from hf_transfer.evaluation import compute_metrics_for  # noqa: E402
from hf_transfer.frozen.choice import cached_data  # noqa: E402
from hf_transfer.objectives import CrossEntropy  # noqa: E402
from hf_transfer.tuning import tuning_from_name  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
RESULTS = ROOT / "benchmarks" / "trainer_cost.json"
ROUNDS, WARM_UP, SEED = 9, 1, 0
RATE, DECAY, CLIP = 1e-3, 0.01, 1.0

Result = dict[str, Tensor]
Arm = Callable[[], tuple[float, Result]]
"""Does its work once; gives the seconds of CPU time that it took, and what it ended with."""


@dataclass(frozen=True)
class Case:
    """Two arms that do equal work.

    Attributes:
        label: What it is, for the table.
        target: What the ratio is to be.
        steps: Steps, or rows, that the seconds are divided by.
        arms: "trainer" and "bare".
        tolerance: How far their results may differ; 0 is bit for bit.
    """

    label: str
    target: str
    steps: int
    arms: Mapping[str, Arm]
    tolerance: float = 0.0


# ---- training -----------------------------------------------------------------------------------------------------


class Watch(transformers.TrainerCallback):
    """Takes the CPU time of training proper, from its same seed to its end."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        transformers.set_seed(SEED)
        self.start = time.process_time()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = time.process_time() - self.start


def arguments(folder: str, **more: Any) -> TransferConfig:
    return TransferConfig(
        output_dir=folder, learning_rate=RATE, weight_decay=DECAY, max_grad_norm=CLIP, save_strategy="no",
        use_cpu=True, disable_tqdm=True, report_to="none", logging_steps=50, seed=SEED, **more,
    )  # fmt: skip


def weights(model: nn.Module) -> Result:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def trainer_arm(make: Callable[[], TransferTrainer], start: Mapping[str, Tensor]) -> Arm:
    def arm() -> tuple[float, Result]:
        trainer, watch = make(), Watch()
        trainer.model.load_state_dict(start)
        trainer.add_callback(watch)
        trainer.train()
        return watch.seconds, weights(trainer.model)

    return arm


def bare_arm(
    model: Any, start: Mapping[str, Tensor], epochs: int, batches: Callable[[int], Iterator[tuple[Any, Tensor]]],
    forward: Callable[[Any], Tensor], steps: int,
) -> Arm:  # fmt: skip
    """The hand-written loop.

    Args:
        model: The network; its training modules run in train mode, as `forward` finds them.
        start: Its weights at the start.
        epochs: How often the data is seen.
        batches: Epoch -> what `forward` takes, and labels (N,).
        forward: Gives logits (N, C).
        steps: In all.
    """

    def arm() -> tuple[float, Result]:
        model.load_state_dict(start)
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        decayed = set(transformers.Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if name in decayed], "weight_decay": DECAY},
            {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
        ]
        transformers.set_seed(SEED)
        start_time = time.process_time()
        optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, (steps - step) / steps))
        seen = torch.zeros(())
        for epoch in range(epochs):
            torch.empty((), dtype=torch.int64).random_()  # as a DataLoader draws the seed of its workers
            for inputs, labels in batches(epoch):
                loss = F.cross_entropy(forward(inputs), labels)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, CLIP)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                seen += loss.detach()
        return time.process_time() - start_time, weights(model)

    return arm


def orders(trainer: TransferTrainer, epochs: int) -> list[list[Tensor]]:
    """The example_ids of each batch of each epoch, as the trainer will draw them."""
    loader: Any = trainer.get_train_dataloader()
    found = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        found.append([batch["example_id"] for batch in loader])
    return found


# ---- the head of a cached network ---------------------------------------------------------------------------------


def head(kind: str, batch_size: int, folder: str, rows: int = 2048, epochs: int = 5) -> Case:
    """A linear probe that reads the prefix cache, through finetune()'s own parts."""
    if kind == "text":
        data = load_data(_shared("data/sst2"), max_train_samples=2 * rows)
        backbone = load_backbone(_shared("weights/all-MiniLM-L6-v2"), labels=data.labels)
        title = "MiniLM 384 -> 2"
    else:
        data = load_data(_shared("data/cifar10"), max_train_samples=2 * rows)
        weights_of = _shared("weights/mobilenetv2_100.coral_tf2_in1k")
        backbone = load_backbone(weights_of, labels=data.labels, image_size=32)
        title = "MobileNetV2 1280 -> 10"
    tuning_from_name("linear_probe").apply(backbone.model)  # type: ignore[arg-type]
    prepared = {"train": prepare(data.splits["train"], backbone, data.columns, train=False).select(range(rows))}
    more = {"per_device_train_batch_size": batch_size, "num_train_epochs": epochs}
    run = RunConfig(model="", dataset="", cache="always", cache_dir=f"{folder}/caches")
    args, collator = arguments(folder, **more), collator_for(backbone)
    cached = cached_data(backbone, prepared, collator, args, [CrossEntropy()], run)
    assert cached is not None and cached.cut.steps is not None
    model: Any = backbone.model

    def make() -> TransferTrainer:
        return cached.trainer(
            model=model, args=arguments(folder, **more), train_dataset=prepared["train"], data_collator=collator,
            objectives=[CrossEntropy()],
        )  # fmt: skip

    everything = list(make().get_train_dataloader())
    ids = torch.cat([batch["example_id"] for batch in everything])
    labels = torch.cat([batch["labels"] for batch in everything])
    values = torch.cat([batch["prefix_activation"] for batch in everything])
    place = {int(each): i for i, each in enumerate(ids)}
    drawn = [[torch.tensor([place[int(i)] for i in batch]) for batch in epoch] for epoch in orders(make(), epochs)]
    layers = nn.Sequential(*cached.cut.steps)
    start = deepcopy(model.state_dict())

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in drawn[epoch]:
            yield values[chosen], labels[chosen]

    steps = sum(map(len, drawn))
    bare = bare_arm(model, start, epochs, batches, layers, steps)
    arms = {"trainer": trainer_arm(make, start), "bare": bare}
    return Case(f"cached head, {title}, batch {batch_size}", "<= 1.30", steps, arms)


# ---- whole networks -----------------------------------------------------------------------------------------------


def full(backbone: Backbone, rows: Any, batch_size: int, title: str, folder: str) -> Case:
    """Full fine-tuning from random weights."""
    tuning_from_name("full").apply(backbone.model)  # type: ignore[arg-type]
    model: Any = backbone.model
    start = deepcopy(model.state_dict())

    def make() -> TransferTrainer:
        return TransferTrainer(
            model=model, args=arguments(folder, per_device_train_batch_size=batch_size, num_train_epochs=1),
            train_dataset=rows, objectives=[CrossEntropy()],
        )  # fmt: skip

    drawn = [
        ({name: value for name, value in batch.items() if name not in ("labels", "example_id")}, batch["labels"])
        for batch in make().get_train_dataloader()
    ]
    bare = bare_arm(model, start, 1, lambda epoch: iter(drawn), lambda inputs: model(**inputs).logits, len(drawn))
    arms = {"trainer": trainer_arm(make, start), "bare": bare}
    return Case(f"full fine-tuning, {title}, batch {batch_size}", "<= 1.05", len(drawn), arms)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows in memory."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: values[row] for name, values in self.columns.items()}


def resnet(size: int, batch_size: int, steps: int, folder: str) -> Case:
    """ResNet-18 from random weights, on noise."""
    backbone = load_backbone("resnet18", labels=[str(i) for i in range(10)], pretrained=False, image_size=size)
    draw = torch.Generator().manual_seed(SEED)
    n = batch_size * steps
    images = torch.randn(n, 3, size, size, generator=draw)
    rows = Rows(pixel_values=images, labels=torch.randint(0, 10, (n,), generator=draw), example_id=torch.arange(n))
    return full(backbone, rows, batch_size, f"ResNet-18 at {size} px", folder)


def bert(batch_size: int, steps: int, folder: str) -> Case:
    """BERT with 12 layers of width 768 from random weights, on 32 random tokens a row."""
    from hf_transfer.distillation.teacher import backbone_of

    torch.manual_seed(SEED)
    config = transformers.BertConfig(num_labels=2, vocab_size=1000)
    model = transformers.BertForSequenceClassification(config)
    draw = torch.Generator().manual_seed(SEED)
    n = batch_size * steps
    rows = Rows(
        input_ids=torch.randint(5, 1000, (n, 32), generator=draw), labels=torch.randint(0, 2, (n,), generator=draw),
        example_id=torch.arange(n),
    )  # fmt: skip
    return full(backbone_of(model, None), rows, batch_size, "BERT with 12 layers, 32 tokens", folder)


# ---- evaluation ---------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    """A network whose logits are its input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": pixel_values}


class Scored(Rows):
    """Rows of logits and labels, made from a few as they are read, so that memory holds no more."""

    def __init__(self, rows: int, classes: int = 1000) -> None:
        draw = torch.Generator().manual_seed(SEED)
        self.rows = rows
        few = torch.randn(1000, classes, generator=draw)
        super().__init__(pixel_values=few, labels=torch.randint(0, classes, (1000,), generator=draw))

    def __len__(self) -> int:
        return self.rows

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        chosen = torch.tensor(rows) % 1000
        return {name: values[chosen] for name, values in self.columns.items()}


def evaluation(rows: int, batch_size: int, folder: str, classes: int = 1000) -> Case:
    """An evaluation with the metrics of compute_metrics_for, beside a loop that computes them by the batch."""
    data = Scored(rows, classes)
    args = arguments(
        folder, per_device_eval_batch_size=batch_size, batch_eval_metrics=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = TransferTrainer(
        model=Logits(), args=args, eval_dataset=data, data_collator=lambda batch: batch,
        compute_metrics=compute_metrics_for("image-classification", classes), objectives=[CrossEntropy()],
    )  # fmt: skip

    def by_trainer() -> tuple[float, Result]:
        start = time.process_time()
        found = trainer.evaluate()
        seconds = time.process_time() - start
        return seconds, {name: torch.tensor(found[f"eval_{name}"], dtype=torch.float64) for name in METRICS}

    def bare() -> tuple[float, Result]:
        start = time.process_time()
        found = bare_evaluation(trainer.model, data, batch_size, classes)
        return time.process_time() - start, {n: torch.tensor(v, dtype=torch.float64) for n, v in found.items()}

    arms: dict[str, Arm] = {"trainer": by_trainer, "bare": bare}
    return Case(f"evaluation, {rows:,} x {classes:,} logits, batch {batch_size}", "<= 1.20", rows, arms, 1e-6)


METRICS = ("loss", "accuracy", "balanced_accuracy", "macro_f1", "top5_accuracy")


@torch.no_grad()
def bare_evaluation(model: nn.Module, data: Scored, batch_size: int, classes: int) -> dict[str, float]:
    """The hand-written loop of the same metrics."""
    model.eval()
    right, guessed, true = (torch.zeros(classes, dtype=torch.int64) for _ in range(3))
    loss, top5 = 0.0, 0
    for start in range(0, len(data), batch_size):
        batch = data.__getitems__(range(start, min(start + batch_size, len(data))))
        logits, labels = model(batch["pixel_values"])["logits"], batch["labels"]
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        guess = logits.argmax(dim=1)
        right += torch.bincount(labels[guess == labels], minlength=classes)
        guessed += torch.bincount(guess, minlength=classes)
        true += torch.bincount(labels, minlength=classes)
        top5 += int((logits.topk(5, dim=1).indices == labels[:, None]).sum())
    seen = true > 0
    occurring = true + guessed > 0
    return {
        "loss": loss / len(data),
        "accuracy": float(right.sum() / len(data)),
        "balanced_accuracy": float((right[seen].double() / true[seen]).mean()),
        "macro_f1": float((2 * right[occurring].double() / (true + guessed)[occurring]).mean()),
        "top5_accuracy": top5 / len(data),
    }


def memory(folder: str, sizes: Sequence[int] = (10_000, 50_000, 100_000)) -> dict[str, float]:
    """Peak resident memory in MiB after an evaluation of so many rows, the smallest first; it can only grow."""
    found = {}
    for rows in sizes:
        evaluation(rows, 128, folder).arms["trainer"]()
        found[f"{rows:,} rows"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    return found


# ---- rounds -------------------------------------------------------------------------------------------------------


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Runs the arms of a case in turn; gives each round's seconds.

    Raises:
        SystemExit: If the arms did not do the same work.
    """
    order, names = random.Random(SEED), list(case.arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    ends: dict[str, Result] = {}
    apart = 0.0
    for i in range(-WARM_UP, rounds):
        for name in order.sample(names, len(names)):
            gc.collect()
            taken, ends[name] = case.arms[name]()
            if i >= 0:
                seconds[name].append(round(taken, 5))
        apart = max(apart, difference(ends["trainer"], ends["bare"]))
        if apart > case.tolerance:
            raise SystemExit(f"{case.label}: the arms end {apart:.3g} apart, and may {case.tolerance:g}.")
    return {"label": case.label, "target": case.target, "steps": case.steps, "apart": apart, "cpu": seconds}


def difference(a: Result, b: Result) -> float:
    """The largest absolute difference."""
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def ratios(found: Mapping[str, Any]) -> tuple[float, float, float]:
    """The median of the rounds' ratios, with the lowest and the highest but one: of 9 rounds 96 % of cases."""
    pairs = zip(found["cpu"]["trainer"], found["cpu"]["bare"], strict=True)
    ranked = sorted(trainer / bare for trainer, bare in pairs)
    return median(ranked), ranked[1], ranked[-2]


def table(path: Path = RESULTS) -> list[str]:
    """The section of docs/benchmarks.md, from the file that a run wrote; empty without one."""
    if not path.is_file():
        return []
    measured = json.loads(path.read_text())
    lines = [
        "## What the Trainer costs: a step of training, an evaluation, beside a bare loop",
        "",
        "Median of paired rounds with its interval, CPU time. The bare loop reads the same batches from memory, and",
        "ends with the same weights bit for bit, or reports the same metrics.",
        "",
        "| job | target | Trainer / bare loop | bare loop |",
        "|---|---|---|---|",
    ]
    for found in measured["cases"].values():
        value, low, high = ratios(found)
        each = median(found["cpu"]["bare"]) / found["steps"] * 1e6
        what = "row" if "evaluation" in found["label"] else "step"
        told = f"{each:,.0f} us a {what}" if each < 1e4 else f"{each / 1000:,.0f} ms a {what}"
        lines.append(f"| {found['label']} | {found['target']} | {value:.3f} [{low:.3f}, {high:.3f}] | {told} |")
    if peaks := measured.get("memory"):
        told = ", ".join(f"{size}: {mebibytes:,.0f} MiB" for size, mebibytes in peaks.items())
        lines += ["", f"Peak memory of the process after an evaluation of 1,000 classes: {told}."]
    return [*lines, "", f"`python benchmarks/trainer_cost.py` on {measured['machine']}."]


CASES: dict[str, Callable[[str], Case]] = {
    "head-text-32": lambda folder: head("text", 32, folder),
    "head-text-64": lambda folder: head("text", 64, folder),
    "head-image-32": lambda folder: head("image", 32, folder),
    "head-image-64": lambda folder: head("image", 64, folder),
    "resnet-32": lambda folder: resnet(32, 32, 6, folder),
    "resnet-224": lambda folder: resnet(224, 16, 2, folder),
    "bert": lambda folder: bert(16, 1, folder),
    "evaluation": lambda folder: evaluation(10_000, 128, folder),
}


def _shared(name: str) -> str:
    path = SHARED / name
    if not path.exists():
        raise FileNotFoundError(f"it needs {path}, which is not part of the project")
    return str(path)


def run(names: Sequence[str], rounds: int, path: Path = RESULTS) -> None:
    """Measures cases and writes them into the file, beside those that are there.

    Args:
        names: Of CASES, or "memory"; a case whose data is missing says so and is left out.
        rounds: That count.
        path: The file.
    """
    measured: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"cases": {}}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                if name == "memory":
                    measured["memory"] = memory(folder)
                else:
                    found = measured["cases"][name] = measure(CASES[name](folder), rounds)
                    print(name, *(f"{value:.3f}" for value in ratios(found)), file=sys.stderr, flush=True)
            except FileNotFoundError as missing:
                print(f"{name}: skipped, {missing}", file=sys.stderr)
                continue
        measured["machine"] = (
            f"{torch.get_num_threads()} thread(s) of a shared {platform.machine()} CPU, torch {torch.__version__}, "
            f"transformers {transformers.__version__}"
        )
        path.write_text(json.dumps(measured, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the cases named on the command line, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=["memory", *CASES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    names = ["memory", *CASES] if "all" in given.cases else given.cases  # memory first: its peak only grows
    run(names, given.rounds, given.results)
    print("\n".join(table(given.results)))


if __name__ == "__main__":
    main()
