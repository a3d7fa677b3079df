"""How time and memory of a training grow: with rows, classes, image size, blocks trained, views and processes.

    OMP_NUM_THREADS=1 python benchmarks/cost_curves.py                 # all curves: a couple of minutes of one core
    OMP_NUM_THREADS=1 python benchmarks/cost_curves.py classes rows    # some; the others' figures stay

A point is a training of lcnet_050 from random weights on images of noise, from raw rows to trained weights; its time
is CPU time, its memory the peak of the process beyond what it held before. A curve's points run in turn. Its exponent
is the slope of log(time) over log(size), fitted to the points of each round: 1 is proportional growth, 0 none. It is
of the time of all epochs, without what comes before them; of the whole for views, which are computed before.

With processes the rows of a step stay as many; their seconds are of wall time, from the first step to the last, as
torchrun and gloo run them on the cores that there are.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from hf_transfer._torchvision import make_torchvision_importable

make_torchvision_importable()

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from command import main  # noqa: E402
from memory import peak  # noqa: E402
from paired import SEED, Clock, Outcome, each_round, interleave  # noqa: E402
from PIL import Image  # noqa: E402
from results import Cases, markdown, measured_on, section  # noqa: E402
from watch import Watch  # noqa: E402

from hf_transfer import TransferConfig, TransferTrainer, load_backbone, load_data  # noqa: E402
from hf_transfer.config import RunConfig  # noqa: E402
from hf_transfer.data.collate import collator_for  # noqa: E402
from hf_transfer.data.transforms import prepare  # noqa: E402
from hf_transfer.evaluation.figure import Figure  # noqa: E402
from hf_transfer.frozen.choice import cached_data  # noqa: E402
from hf_transfer.objectives import CrossEntropy  # noqa: E402
from hf_transfer.tuning import FullFineTune, LinearProbe, PartialFreeze, Tuning  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
PROCESS_ROUNDS = 3  # of processes, which take longer to start than to train


@dataclass(frozen=True)
class Training:
    """One point of a curve.

    Attributes:
        rows: Of noise.
        classes: C.
        size: Side of the images in pixels.
        tuning: What trains.
        views: Of the prefix cache; None without one.
        epochs: That are trained.
        batch_size: Rows a step, over all processes.
        processes: That train.
    """

    rows: int = 128
    classes: int = 10
    size: int = 32
    tuning: Tuning = field(default_factory=FullFineTune)
    views: int | None = None
    epochs: int = 1
    batch_size: int = 32
    processes: int = 1


class Job:
    """A training, ready to run any number of times.

    Args:
        training: What is trained.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        draw = np.random.default_rng(SEED)
        names = [str(number) for number in range(training.classes)]
        seen = names[:10]  # load_data wants rows of every class; the network may know more
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=seen)})
        pixels = draw.integers(0, 256, (training.rows, 32, 32, 3), dtype=np.uint8)
        labels = [i % len(seen) for i in range(training.rows)]
        rows = {"image": list(map(Image.fromarray, pixels)), "label": labels}
        split = datasets.Dataset.from_dict(rows, features=features)
        self.data = load_data(datasets.DatasetDict(train=split, validation=split.select([0])))
        torch.manual_seed(SEED)
        self.backbone = load_backbone("lcnet_050", labels=names, pretrained=False, image_size=training.size)

    def __call__(self) -> Outcome:
        with tempfile.TemporaryDirectory() as folder:
            start = Clock.now()
            trainer, watch = self.trainer(Path(folder)), Watch()
            trainer.add_callback(watch)
            trainer.train()
            return Outcome(trainer.state.global_step, {"": Clock.now().since(start), "epochs": watch.epochs})

    def trainer(self, folder: Path) -> TransferTrainer:
        """A trainer from the same weights."""
        job, terms = self.training, [CrossEntropy()]
        backbone = replace(self.backbone, model=job.tuning.apply(deepcopy(self.backbone.model)))
        args = TransferConfig(
            output_dir=str(folder / "run"), num_train_epochs=job.epochs, use_cpu=True, report_to="none",
            per_device_train_batch_size=job.batch_size // job.processes, save_strategy="no", eval_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=False, seed=SEED,
        )  # fmt: skip
        rows = prepare(self.data.splits["train"], backbone, self.data.columns, train=True, image_size=job.size)
        options: dict[str, Any] = {
            "model": backbone.model, "args": args, "train_dataset": rows, "data_collator": collator_for(backbone),
            "objectives": terms,
        }  # fmt: skip
        if job.views is None:
            return TransferTrainer(**options)
        run = RunConfig(model="", dataset="", cache="always", cache_views=job.views, cache_dir=str(folder / "caches"))
        cached = cached_data(backbone, {"train": rows}, options["data_collator"], args, terms, run)
        assert cached is not None
        return cached.trainer(**options)


def on_processes(training: Training) -> Outcome:
    """Trains by torchrun; the first process tells the seconds of its steps."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={training.processes}", __file__]
    given = json.dumps({name: getattr(training, name) for name in ("rows", "processes", "epochs")})
    told = subprocess.run([sys.executable, *command, "--worker", given], check=True, capture_output=True, text=True)
    seconds = json.loads(told.stdout.splitlines()[-1])
    return Outcome(seconds["steps"], {"": Clock(seconds["cpu"], seconds["wall"])})


def work(training: Training) -> None:
    """What a process of `on_processes` does."""
    torch.set_num_threads(1)
    outcome = Job(training)()
    if os.environ["RANK"] == "0":
        print(json.dumps({"steps": outcome.result, **vars(outcome.clocks["epochs"])}))


# ---- curves -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Trainings that differ in one thing.

    Attributes:
        axis: That.
        note: What else is to be known.
        points: By its value.
        part: Which time its exponent is of: "epochs", or "" for the whole.
    """

    axis: str
    note: str
    points: Mapping[int, Training]
    part: str = "epochs"


def measure(curve: Curve, rounds: int) -> dict[str, Any]:
    """Times the points of a curve in turn, then takes the peak of memory of each."""
    facts: dict[str, Any] = {"axis": curve.axis, "note": curve.note, "sizes": list(curve.points), "part": curve.part}
    if any(training.processes > 1 for training in curve.points.values()):
        arms = {str(size): partial(on_processes, training) for size, training in curve.points.items()}
        found = interleave(arms, label=curve.axis, rounds=min(rounds, PROCESS_ROUNDS), warm_up=0)
        return {**facts, "by": "wall", **found.facts()}
    jobs = {str(size): Job(training) for size, training in curve.points.items()}
    found = interleave(jobs, label=curve.axis, rounds=rounds)
    peaks = {size: round(peak(job), 1) for size, job in jobs.items()}
    return {**facts, "by": "cpu", "peak_mib": peaks, **found.facts()}


def exponent(found: Mapping[str, Any]) -> Figure:
    """The slope of log(time) over log(size), by least squares in each round."""
    logs = np.log(found["sizes"])
    return Figure.of(
        float(np.polyfit(logs, np.log([each[f"{size} {found['part']}".strip()] for size in found["sizes"]]), 1)[0])
        for each in each_round(found, found["by"])
    )


@section(RESULTS)
def table(cases: Cases) -> list[str]:
    """The section of docs/benchmarks.md."""
    rows = []
    for found in cases.values():
        seconds = [f"{median(found[found['by']][str(size)]):.2f}" for size in found["sizes"]]
        peaks = [f"{mib:.0f}" for mib in found.get("peak_mib", {}).values()]
        sizes = ", ".join(f"{size:,}" for size in found["sizes"])
        growing = (f"{found['axis']}: {sizes}", found["note"])
        rows.append((*growing, ", ".join(seconds), exponent(found), ", ".join(peaks)))
    return [
        "## How the cost grows",
        "",
        "Trainings of lcnet_050 on noise, from raw rows to trained weights; seconds of CPU time, of wall time for",
        "processes. The exponent is the slope of log(time of the epochs) over log(size), for views of the whole time.",
        "",
        *markdown(["what grows", "training", "seconds", "exponent", "peak of memory, MiB"], rows),
        "",
        f"`python benchmarks/cost_curves.py` on {measured_on(cases.values())}.",
    ]


def curve(
    axis: str, note: str, points: Sequence[int], make: Callable[[int], Training], part: str = "epochs"
) -> Callable[[], Curve]:
    """What makes a curve."""
    return lambda: Curve(axis, note, {point: make(point) for point in points}, part)


PARTIAL = "full fine-tune, 128 rows, 1 epoch"
CASES: dict[str, Callable[[], Curve]] = {
    "rows": curve("rows", "full fine-tune, 32 px, 1 epoch", (64, 128, 256, 512), lambda n: Training(rows=n)),
    "classes": curve("classes", f"{PARTIAL}, 32 px", (10, 100, 1000, 10_000), lambda n: Training(classes=n)),
    "size": curve("side of the images in px", PARTIAL, (32, 64, 128), lambda n: Training(size=n)),
    "blocks": curve(
        "last blocks trained",
        "128 rows, 64 px, 1 epoch",
        (1, 2, 4, 8, 13),
        lambda n: Training(size=64, tuning=PartialFreeze(n)),
    ),
    "views": curve(
        "views in the prefix cache",
        "linear probe, 128 rows, 64 px, 8 epochs",
        (1, 2, 4, 8),
        lambda n: Training(size=64, tuning=LinearProbe(), views=n, epochs=8),
        part="",
    ),
    "processes": curve(
        "processes",
        "full fine-tune, 256 rows, 32 px, 4 epochs",
        (1, 2),
        lambda n: Training(rows=256, processes=n, epochs=4),
        part="",  # the worker tells that of its epochs
    ),
}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Training(**json.loads(sys.argv[2])))
    else:
        main(__doc__, CASES, measure, table, RESULTS)
