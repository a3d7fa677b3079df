"""Training on a GPU: rows a second with bf16 and torch.compile, and the share of the chip's matrix rate.

    python benchmarks/accelerator.py                       # all cases: some minutes
    python benchmarks/accelerator.py resnet50 --rounds 20

Absolute figures, of a GPU alone: without one every case is left out. Networks start from random weights, and images
are noise. Three kinds of cases, each beside a hand-written loop that does the same by the same fused optimizer:

- full fine-tuning of ResNet-50 and ViT-B/16 at 224 px, from images that lie on the GPU: it is the training step that
  is measured, not the reading of data (input_pipeline.py is about that);
- distillation of ResNet-50 into ResNet-18, the teacher live;
- the head of a MobileNetV2 from its prefix cache, in float32, as it is and as a CUDA graph
  (torch_compile_mode="reduce-overhead").

A round is one epoch, between two synchronisations; the epochs before do not count, in which networks are compiled.

The rate is that of the multiply-accumulates of the forward passes, counted by PyTorch, times 2 operations, times 3 for
forward and backward of what trains. The share is of the dense bf16 rate that the maker states for the chip.
"""

import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hf_transfer._torchvision import make_torchvision_importable

make_torchvision_importable()

import torch  # noqa: E402
import transformers  # noqa: E402
from command import main  # noqa: E402
from paired import SEED  # noqa: E402
from results import Cases, markdown, measured_on, section  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from hf_transfer import (  # noqa: E402
    DistillationConfig,
    DistillationTrainer,
    TransferConfig,
    TransferTrainer,
    load_backbone,
    load_data,
)
from hf_transfer.config import RunConfig  # noqa: E402
from hf_transfer.data.collate import collator_for  # noqa: E402
from hf_transfer.data.transforms import prepare  # noqa: E402
from hf_transfer.distillation.costs import macs  # noqa: E402
from hf_transfer.evaluation.figure import Figure  # noqa: E402
from hf_transfer.frozen.choice import cached_data  # noqa: E402
from hf_transfer.objectives import CrossEntropy, SoftTargets  # noqa: E402
from hf_transfer.objectives.logits import soft_targets  # noqa: E402
from hf_transfer.tuning import LinearProbe  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
ROUNDS, WARM_UP = 7, 2
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "T4": 65e12}
"""Dense bf16 (T4: fp16) operations a second by what is in the device's name, from NVIDIA's data sheets."""
TITLES = {"ours": "ours", "graph": "ours, as a CUDA graph", "bare": "bare loop"}
GRAPH = {"torch_compile": True, "torch_compile_mode": "reduce-overhead"}
TEMPERATURE, HARD = 4.0, 0.1


@dataclass(frozen=True)
class Case:
    """Ways to train one epoch.

    Attributes:
        label: What it is, for the table.
        batch_size: Rows a step.
        steps: Of an epoch.
        macs_a_row: Multiply-accumulates of a row's forward pass that is followed by a backward pass, plus a third of
            those of one that is not; None where their rate is not of interest.
        arms: By a name in TITLES; rounds -> the seconds of each.
        device: Where it trains.
    """

    label: str
    batch_size: int
    steps: int
    macs_a_row: int | None
    arms: Mapping[str, Callable[[int], list[float]]]
    device: str = "cuda"


@dataclass(frozen=True)
class Setting:
    """How the arms of a case train.

    Attributes:
        size: Side of the images in pixels.
        batch_size: Rows a step.
        steps: Of an epoch.
        device: Where.
        precise: Whether in float32 and uncompiled.
    """

    size: int
    batch_size: int
    steps: int
    device: str = "cuda"
    precise: bool = False

    def arguments(self, folder: str, rounds: int, kind: type[TransferConfig] = TransferConfig, **more: Any) -> Any:
        """The Trainer's, for the warm-up and so many rounds."""
        given = {"bf16": not self.precise, "torch_compile": not self.precise, **more}
        return kind(
            output_dir=folder, max_steps=(WARM_UP + rounds) * self.steps, per_device_train_batch_size=self.batch_size,
            learning_rate=1e-4, use_cpu=self.device == "cpu", optim="adamw_torch_fused", save_strategy="no",
            report_to="none", disable_tqdm=True, logging_steps=10**6, max_grad_norm=1.0,
            lr_scheduler_type="constant", seed=SEED, dataloader_pin_memory=False, **given,
        )  # fmt: skip

    def autocast(self) -> Any:
        return nullcontext() if self.precise else torch.autocast(self.device, torch.bfloat16)

    def compiled(self, model: nn.Module) -> Any:
        return model if self.precise else torch.compile(model)

    def wait(self) -> None:
        """Returns once the device has done its work."""
        if self.device != "cpu":
            torch.accelerator.synchronize()


class Noise(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """Batches that are there already."""

    def __init__(self, setting: Setting, classes: int) -> None:
        draw = torch.Generator().manual_seed(SEED)
        images = torch.randn(setting.batch_size, 3, setting.size, setting.size, generator=draw)
        labels = torch.arange(setting.batch_size) % classes
        self.steps = setting.steps
        self.batch = {"pixel_values": images.to(setting.device), "labels": labels.to(setting.device)}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter([self.batch] * self.steps)


class Rounds(transformers.TrainerCallback):
    """Seconds of each epoch, between two synchronisations."""

    def __init__(self, setting: Setting) -> None:
        self.wait, self.seconds = setting.wait, []

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.wait()
        self.start = time.perf_counter()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.wait()
        self.seconds.append(time.perf_counter() - self.start)


class ReadyBatches:
    """Of a Trainer: its batches are made already."""

    def get_train_dataloader(self) -> Any:
        return self.train_dataset  # type: ignore[attr-defined]


class NoiseTrainer(ReadyBatches, TransferTrainer):
    """A TransferTrainer whose batches are made already."""


class NoiseDistillationTrainer(ReadyBatches, DistillationTrainer):
    """A DistillationTrainer whose batches are made already."""


# ---- the arms -----------------------------------------------------------------------------------------------------


def timed(trainer: TransferTrainer, setting: Setting, rounds: int) -> list[float]:
    """Seconds of each epoch of a trainer, of whose arguments `rounds` is."""
    watch = Rounds(setting)
    trainer.add_callback(watch)
    trainer.train()
    assert len(watch.seconds) == WARM_UP + rounds
    return watch.seconds[WARM_UP:]


def ours(model: Any, setting: Setting, rounds: int) -> list[float]:
    """Full fine-tuning by TransferTrainer."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = NoiseTrainer(
            model=deepcopy(model), args=setting.arguments(folder, rounds), objectives=[CrossEntropy()],
            train_dataset=Noise(setting, model.config.num_labels),
        )  # fmt: skip
        return timed(trainer, setting, rounds)


def bare(model: Any, setting: Setting, rounds: int, teacher: Any = None) -> list[float]:
    """The same, or with a teacher distillation, by a loop as one would write it."""
    model = deepcopy(model).to(setting.device).train()
    forward = setting.compiled(model)
    answer = None
    if teacher is not None:
        teacher = deepcopy(teacher).to(setting.device, torch.float32 if setting.precise else torch.bfloat16).eval()
        answer = setting.compiled(teacher)

    def loss(batch: Mapping[str, Tensor]) -> Tensor:
        images, labels = batch["pixel_values"], batch["labels"]
        with setting.autocast():
            logits = forward(pixel_values=images).logits.float()
        hard = nn.functional.cross_entropy(logits, labels)
        if answer is None:
            return hard
        with torch.inference_mode():
            said = answer(pixel_values=images.to(next(teacher.parameters()).dtype)).logits.float()
        return HARD * hard + (1 - HARD) * soft_targets(logits, said.clone(), TEMPERATURE).mean()

    return loop(model, list(Noise(setting, model.config.num_labels)), loss, setting, rounds)


def loop(
    model: nn.Module, batches: list[Any], loss: Callable[[Any], Tensor], setting: Setting, rounds: int
) -> list[float]:
    """Seconds of each epoch of a hand-written loop."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    seconds = []
    for _ in range(WARM_UP + rounds):
        setting.wait()
        start = time.perf_counter()
        for batch in batches:
            loss(batch).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        setting.wait()
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP:]


def distilled(student: Any, teacher: Any, setting: Setting, rounds: int) -> list[float]:
    """Distillation by DistillationTrainer, its teacher live."""
    own = {"hard_weight": HARD, "teacher_cache": "never", "teacher_compile": not setting.precise}
    own |= {} if setting.precise else {"teacher_dtype": "bfloat16"}
    with tempfile.TemporaryDirectory() as folder:
        trainer = NoiseDistillationTrainer(
            model=deepcopy(student), teacher=deepcopy(teacher),
            train_dataset=Noise(setting, student.config.num_labels),
            objectives=[SoftTargets(temperature=TEMPERATURE, weight=1 - HARD)],
            args=setting.arguments(folder, rounds, DistillationConfig, **own),
        )  # fmt: skip
        return timed(trainer, setting, rounds)


# ---- the head of a cached network ---------------------------------------------------------------------------------


def head(backbone: Any, prepared: Any, setting: Setting, rounds: int, graph: bool = False) -> list[float]:
    """A linear probe from the prefix cache, by finetune()'s own parts."""
    more = {"bf16": False, **(GRAPH if graph else {"torch_compile": False})}
    with tempfile.TemporaryDirectory() as folder:
        args = setting.arguments(folder, rounds, **more)
        run = RunConfig(model="", dataset="", cache="always", cache_dir=f"{folder}/caches")
        collator = collator_for(backbone)
        cached = cached_data(backbone, {"train": prepared}, collator, args, [CrossEntropy()], run)
        assert cached is not None
        trainer = cached.trainer(
            model=backbone.model, args=args, train_dataset=prepared, data_collator=collator,
            objectives=[CrossEntropy()],
        )  # fmt: skip
        return timed(trainer, setting, rounds)


def bare_head(backbone: Any, setting: Setting, rounds: int) -> list[float]:
    """The same by a loop over features that lie on the device."""
    layer = backbone.model.get_submodule(backbone.anatomy.classifiers[0]).to(setting.device)
    features = torch.randn(setting.steps, setting.batch_size, layer.in_features, device=setting.device)
    labels = torch.arange(setting.batch_size, device=setting.device) % layer.out_features

    def loss(batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(layer(batch), labels)

    return loop(layer, list(features), loss, setting, rounds)


# ---- figures ------------------------------------------------------------------------------------------------------


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Times the ways, one after the other: their compiled networks would not fit beside each other."""
    seconds = {}
    for name, arm in case.arms.items():
        seconds[name] = [round(s, 5) for s in arm(rounds)]
        gc.collect()
        print(f"{case.label}: {name}: {case.steps} steps in {min(seconds[name]):.3f} s", file=sys.stderr, flush=True)
    return {
        "label": case.label,
        "device": torch.cuda.get_device_name() if case.device == "cuda" else case.device,
        "batch_size": case.batch_size,
        "steps": case.steps,
        "macs_a_row": case.macs_a_row,
        "wall": seconds,
    }


def rows_a_second(found: Mapping[str, Any], arm: str) -> Figure:
    """The rate of an arm, over its rounds."""
    return Figure.of(found["steps"] * found["batch_size"] / seconds for seconds in found["wall"][arm])


def share(found: Mapping[str, Any], arm: str) -> float | None:
    """The share of the chip's stated matrix rate; None where that is not in PEAK, or not of interest."""
    stated = next((rate for name, rate in PEAK.items() if name in found["device"]), None)
    if stated is None or found["macs_a_row"] is None:
        return None
    return rows_a_second(found, arm).value * found["macs_a_row"] * 2 * 3 / stated


@section(RESULTS)
def table(cases: Cases) -> list[str]:
    """The section of docs/benchmarks.md."""
    rows = []
    for found in cases.values():
        for arm in found["wall"]:
            part = share(found, arm)
            told = "" if part is None else f"{100 * part:.0f} %"
            rows.append((found["label"], found["device"], TITLES[arm], rows_a_second(found, arm), told))
    return [
        "## On a GPU",
        "",
        "Networks in bf16 with torch.compile, a cached head in float32; images of noise that lie on the device.",
        "",
        *markdown(["job", "device", "by", "rows a second", "share of the matrix rate"], rows),
        "",
        f"`python benchmarks/accelerator.py` on {measured_on(cases.values())}.",
    ]


# ---- cases --------------------------------------------------------------------------------------------------------


def fine_tuning(name: str, label: str, setting: Setting, classes: int = 1000) -> Case:
    """Of a network of timm's."""
    model = started(name, setting, classes).model
    each = macs(model, torch.zeros(1, 3, setting.size, setting.size))
    arms = {"ours": partial(ours, model, setting), "bare": partial(bare, model, setting)}
    title = f"full fine-tuning, {label}, {setting.size} px, {setting.batch_size} rows a step"
    return Case(title, setting.batch_size, setting.steps, each, arms, setting.device)


def distillation(names: tuple[str, str], label: str, setting: Setting, classes: int = 1000) -> Case:
    """Of timm's first network into its second."""
    teacher, student = (started(name, setting, classes).model for name in names)
    image = torch.zeros(1, 3, setting.size, setting.size)
    teacher.was_trained = True  # what its weights are is no matter here
    arms = {
        "ours": partial(distilled, student, teacher, setting),
        "bare": partial(bare, student, setting, teacher=teacher),
    }
    title = f"distillation, {label}, {setting.size} px, {setting.batch_size} rows a step"
    each = macs(student, image) + macs(teacher, image) // 3
    return Case(title, setting.batch_size, setting.steps, each, arms, setting.device)


def cached_head(name: str, label: str, setting: Setting, classes: int = 10) -> Case:
    """Of a network of timm's, over rows of noise."""
    backbone = started(name, setting, classes)
    LinearProbe().apply(backbone.model)
    prepared = prepare(*noise_rows(setting.steps * setting.batch_size, classes, backbone), train=False)
    arms = {
        "ours": partial(head, backbone, prepared, setting),
        "graph": partial(head, backbone, prepared, setting, graph=True),
        "bare": partial(bare_head, backbone, setting),
    }
    title = f"cached head, {label}, {setting.batch_size} rows a step"
    return Case(title, setting.batch_size, setting.steps, None, arms, setting.device)


def noise_rows(count: int, classes: int, backbone: Any) -> tuple[Any, Any, Any]:
    """What `prepare` takes: so many images of 32 px, the backbone, and what the columns mean."""
    import datasets
    import numpy as np

    draw = np.random.default_rng(SEED)
    images = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=classes))
    rows = {"image": list(images), "label": [number % classes for number in range(count)]}
    data = load_data(datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=features)))
    return data.splits["train"], backbone, data.columns


def started(name: str, setting: Setting, classes: int) -> Any:
    """A network of timm's from random weights."""
    labels = [str(number) for number in range(classes)]
    return load_backbone(name, labels=labels, pretrained=False, image_size=setting.size)


def on_a_gpu(make: Callable[..., Case], *args: Any) -> Callable[[], Case]:
    """What makes a case, or raises FileNotFoundError where there is no GPU."""

    def made() -> Case:
        if not torch.cuda.is_available():
            raise FileNotFoundError("it needs a GPU")
        return make(*args)

    return made


CASES: dict[str, Callable[[], Case]] = {
    "resnet50": on_a_gpu(fine_tuning, "resnet50", "ResNet-50", Setting(224, 256, steps=20)),
    "vit": on_a_gpu(fine_tuning, "vit_base_patch16_224", "ViT-B/16", Setting(224, 256, steps=20)),
    "distillation": on_a_gpu(
        distillation, ("resnet50", "resnet18"), "ResNet-50 into ResNet-18", Setting(224, 256, steps=20)
    ),
    "head": on_a_gpu(cached_head, "mobilenetv2_100", "MobileNetV2", Setting(224, 64, steps=64)),
}


if __name__ == "__main__":
    main(__doc__, CASES, measure, table, RESULTS, ROUNDS)
