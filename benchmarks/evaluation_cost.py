"""Evaluating logits of 1,000 classes: the trainer's metrics beside a bare loop that computes the same, and its memory.

    OMP_NUM_THREADS=1 python benchmarks/evaluation_cost.py

`ours` is TransferTrainer.evaluate with the metrics of finetune (accuracy, balanced accuracy, macro F1, top-5 accuracy,
the loss); `bare` a loop over the same loader that counts the same; `stock` transformers.Trainer, which keeps all
logits, with a compute_metrics of the same metrics on them. The network is one layer: what a real one takes for its
forward passes comes on top in all of them. All give the same metrics.

The peak of memory is that of the process while it evaluates, beyond what it held before.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_transfer._torchvision import make_torchvision_importable

make_torchvision_importable()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from command import main  # noqa: E402
from memory import peak  # noqa: E402
from paired import SEED, Same, interleave, ratio, timed  # noqa: E402
from results import Cases, Judged, load, markdown, measured_on, section  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from hf_transfer import TransferConfig, TransferTrainer  # noqa: E402
from hf_transfer.evaluation import compute_metrics_for  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
WIDTH, EQUAL, TARGET = 64, 1e-5, 1.2


@dataclass(frozen=True)
class Case:
    """An evaluation.

    Attributes:
        rows: That are evaluated in the timed rounds.
        classes: C.
        batch_size: Rows a batch.
        growth: Rows at which the peak of memory is measured.
        stock_growth: Likewise, for the Trainer that keeps all logits.
    """

    rows: int = 10_000
    classes: int = 1_000
    batch_size: int = 128
    growth: tuple[int, ...] = (10_000, 50_000, 100_000)
    stock_growth: tuple[int, ...] = (10_000, 20_000)


class Layer(nn.Module):
    """(N, WIDTH) -> logits (N, C), and the loss."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(x)
        return {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """So many rows, of which a thousand differ: they take no memory that grows. The layer is right on some of them."""

    def __init__(self, count: int, layer: Layer) -> None:
        draw = torch.Generator().manual_seed(SEED)
        self.count, self.labels = count, torch.arange(1000) % layer.head.out_features
        self.x = 5 * layer.head.weight.detach()[self.labels] + torch.randn(1000, WIDTH, generator=draw)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"x": self.x[row % 1000], "labels": int(self.labels[row % 1000])}


# ---- the arms -----------------------------------------------------------------------------------------------------


def arms(case: Case, folder: Path) -> dict[str, Callable[[int], dict[str, float]]]:
    """Each evaluates a number of rows, and gives the metrics."""
    torch.manual_seed(SEED)
    model = Layer(case.classes)
    settings: dict[str, Any] = {
        "output_dir": str(folder), "per_device_eval_batch_size": case.batch_size, "use_cpu": True, "report_to": "none",
        "disable_tqdm": True, "dataloader_pin_memory": False, "remove_unused_columns": False,
    }  # fmt: skip
    streaming = compute_metrics_for("image-classification", case.classes)
    args = TransferConfig(**settings, batch_eval_metrics=True)
    ours = TransferTrainer(model=model, args=args, compute_metrics=streaming)
    args = transformers.TrainingArguments(**settings)
    stock = transformers.Trainer(model=model, args=args, compute_metrics=whole_metrics)
    stock.remove_callback(transformers.PrinterCallback)

    def by_trainer(trainer: transformers.Trainer, rows: int) -> dict[str, float]:
        found = trainer.evaluate(Rows(rows, model))
        return {name: found[f"eval_{name}"] for name in NAMES}

    return {
        "ours": lambda rows: by_trainer(ours, rows),
        "stock": lambda rows: by_trainer(stock, rows),
        "bare": lambda rows: bare(model, Rows(rows, model), case.classes, case.batch_size),
    }


NAMES = ("loss", "accuracy", "balanced_accuracy", "macro_f1", "top5_accuracy")


@torch.no_grad()
def bare(model: nn.Module, rows: Rows, classes: int, batch_size: int) -> dict[str, float]:
    """A loop as one would write it, that keeps counts."""
    model.eval()
    loader = torch.utils.data.DataLoader(rows, batch_size, collate_fn=transformers.default_data_collator)
    right, predicted, true = (torch.zeros(classes, dtype=torch.int64) for _ in range(3))
    top5, loss = 0, 0.0
    for batch in loader:
        outputs, labels = model(**batch), batch["labels"]
        guess = outputs["logits"].argmax(-1)
        right += torch.bincount(labels[guess == labels], minlength=classes)
        predicted += torch.bincount(guess, minlength=classes)
        true += torch.bincount(labels, minlength=classes)
        top5 += int((outputs["logits"].topk(5).indices == labels[:, None]).sum())
        loss += float(outputs["loss"]) * len(labels)
    return {"loss": loss / len(rows), **from_counts(right.numpy(), predicted.numpy(), true.numpy(), top5)}


def whole_metrics(found: Any) -> dict[str, float]:
    """The same of all logits at once."""
    logits, labels = found.predictions, found.label_ids
    classes, guess = logits.shape[1], logits.argmax(-1)
    counts = [np.bincount(ids, minlength=classes) for ids in (labels[guess == labels], guess, labels)]
    top5 = int((np.argpartition(logits, -5)[:, -5:] == labels[:, None]).sum())
    return from_counts(counts[0], counts[1], counts[2], top5)


def from_counts(right: np.ndarray, predicted: np.ndarray, true: np.ndarray, top5: int) -> dict[str, float]:
    """Metrics from three counts a class."""
    seen, occurring = true > 0, true + predicted > 0
    return {
        "accuracy": float(right.sum() / true.sum()),
        "balanced_accuracy": float((right[seen] / true[seen]).mean()),
        "macro_f1": float((2 * right[occurring] / (true + predicted)[occurring]).mean()),
        "top5_accuracy": top5 / int(true.sum()),
    }


# ---- rounds and figures -------------------------------------------------------------------------------------------


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Times the arms of a case, then takes the peaks of memory."""
    with tempfile.TemporaryDirectory() as folder:
        works = arms(case, Path(folder))
        found = interleave(
            {name: timed(lambda work=work: work(case.rows)) for name, work in works.items()},
            label=f"{case.rows} x {case.classes}", rounds=rounds, repeats=EQUAL,
            same=[Same("ours", "bare", EQUAL), Same("stock", "bare", EQUAL)],
        )  # fmt: skip
        growth = {"ours": case.growth, "bare": case.growth, "stock": case.stock_growth}
        memory = {
            name: {str(rows): round(peak(lambda work=works[name], rows=rows: work(rows)), 1) for rows in counts}
            for name, counts in growth.items()
        }
    facts = {"rows": case.rows, "classes": case.classes, "batch_size": case.batch_size, "peak_mib": memory}
    return {**facts, **found.facts()}


def judged(path: Path = RESULTS) -> list[Judged]:
    """The lines of the table of targets."""
    return [
        Judged(f"evaluation, {_size(found)}", "bare loop, same metrics", "<=", TARGET, ratio(found, "ours", "bare"))
        for found in load(path).values()
    ]


def _size(found: Mapping[str, Any]) -> str:
    return f"{found['rows']:,} x {found['classes']:,} logits"


@section(RESULTS)
def table(cases: Cases) -> list[str]:
    """The section of docs/benchmarks.md."""
    rows, peaks = [], []
    for found in cases.values():
        for over in ("ours", "stock"):
            both = ratio(found, over, "bare"), ratio(found, over, "bare", "wall")
            rows.append((_size(found), f"{TITLES[over]} / bare loop", *both, len(found["cpu"]["ours"])))
        for name, by_rows in found["peak_mib"].items():
            told = ", ".join(f"{mib:,.0f} at {int(count):,} rows" for count, mib in by_rows.items())
            peaks.append(f"- {TITLES[name]}: {told}")
    return [
        "## Evaluation",
        "",
        "One layer, the loss and four metrics of its logits.",
        "",
        *markdown(["logits", "ratio", "CPU time", "wall time", "rounds"], rows),
        "",
        "Peak of memory in MiB, beyond what the process held before:",
        "",
        *peaks,
        "",
        f"`python benchmarks/evaluation_cost.py` on {measured_on(cases.values())}.",
    ]


TITLES = {"ours": "TransferTrainer, streaming metrics", "stock": "transformers.Trainer", "bare": "bare loop"}
CASES: dict[str, Callable[[], Case]] = {"1000 classes": Case}


if __name__ == "__main__":
    main(__doc__, CASES, measure, table, RESULTS)
