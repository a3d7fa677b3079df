"""Fine-tuning on a GPU: images a second with bf16 and torch.compile, and the share of the chip's matrix rate.

    python benchmarks/accelerator.py                       # ResNet-50 and ViT-B/16 at 224 px: some minutes
    python benchmarks/accelerator.py resnet50 --rounds 20

Absolute figures, of a GPU alone: without one every case is left out. Networks start from random weights, and images
are noise that lies on the GPU: it is the training step that is measured, not the reading of data (input_pipeline.py is
about that). `bare` is a hand-written loop that does the same: the same compiled network, autocast, the same fused
optimizer. A round is one epoch of `steps` steps, between two synchronisations; the epochs before do not count, in
which the network is compiled.

The rate is that of the multiply-accumulates of the forward pass, counted by PyTorch, times 2 operations, times 3 for
forward and backward. The share is of the dense bf16 rate that the maker states for the chip.
"""

import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
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

from hf_transfer import TransferConfig, TransferTrainer, load_backbone  # noqa: E402
from hf_transfer.distillation.costs import macs  # noqa: E402
from hf_transfer.evaluation.figure import Figure  # noqa: E402
from hf_transfer.objectives import CrossEntropy  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
ROUNDS, WARM_UP = 7, 2
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "T4": 65e12}
"""Dense bf16 (T4: fp16) operations a second by what is in the device's name, from NVIDIA's data sheets."""


@dataclass(frozen=True)
class Case:
    """A network and the steps of an epoch.

    Attributes:
        label: What it is, for the table.
        model: The network, on the CPU.
        size: Side of the images in pixels.
        batch_size: Rows a step.
        steps: Of an epoch.
        device: Where it trains.
        precise: Whether in float32 and uncompiled.
    """

    label: str
    model: Any
    size: int
    batch_size: int
    steps: int
    device: str = "cuda"
    precise: bool = False


class Noise(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """Batches that are there already."""

    def __init__(self, case: Case) -> None:
        draw = torch.Generator().manual_seed(SEED)
        images = torch.randn(case.batch_size, 3, case.size, case.size, generator=draw)
        labels = torch.arange(case.batch_size) % case.model.config.num_labels
        self.batch, self.steps = {"pixel_values": images.to(case.device), "labels": labels.to(case.device)}, case.steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter([self.batch] * self.steps)


class Rounds(transformers.TrainerCallback):
    """Seconds of each epoch, between two synchronisations."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait, self.seconds = wait, []

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.wait()
        self.start = time.perf_counter()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.wait()
        self.seconds.append(time.perf_counter() - self.start)


# ---- the arms -----------------------------------------------------------------------------------------------------


def waiting(case: Case) -> Callable[[], None]:
    """What returns once the device has done its work."""
    return torch.accelerator.synchronize if case.device != "cpu" else lambda: None


class NoiseTrainer(TransferTrainer):
    """A TransferTrainer whose batches are made already."""

    def get_train_dataloader(self) -> Any:
        return self.train_dataset


def ours(case: Case, rounds: int) -> list[float]:
    """Seconds of each epoch by TransferTrainer."""
    watch, data = Rounds(waiting(case)), Noise(case)
    with tempfile.TemporaryDirectory() as folder:
        args = TransferConfig(
            output_dir=folder, max_steps=(WARM_UP + rounds) * case.steps, per_device_train_batch_size=case.batch_size,
            learning_rate=1e-4, bf16=not case.precise, torch_compile=not case.precise, use_cpu=case.device == "cpu",
            optim="adamw_torch_fused", save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=10**6,
            max_grad_norm=1.0, lr_scheduler_type="constant", seed=SEED, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = NoiseTrainer(
            model=deepcopy(case.model), args=args, train_dataset=data, objectives=[CrossEntropy()], callbacks=[watch]
        )
        trainer.train()
    assert len(watch.seconds) == WARM_UP + rounds
    return watch.seconds[WARM_UP:]


def bare(case: Case, rounds: int) -> list[float]:
    """Seconds of each epoch by a loop as one would write it."""
    wait, seconds = waiting(case), []
    model = deepcopy(case.model).to(case.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    forward = model if case.precise else torch.compile(model)
    autocast = nullcontext() if case.precise else torch.autocast(case.device, torch.bfloat16)
    for _ in range(WARM_UP + rounds):
        wait()
        start = time.perf_counter()
        for batch in Noise(case):
            with autocast:
                logits = forward(pixel_values=batch["pixel_values"]).logits
            nn.functional.cross_entropy(logits.float(), batch["labels"]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        wait()
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP:]


# ---- figures ------------------------------------------------------------------------------------------------------


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Times both ways, one after the other: their compiled networks would not fit beside each other."""
    image = torch.zeros(1, 3, case.size, case.size)
    seconds = {}
    for name, arm in {"ours": ours, "bare": bare}.items():
        seconds[name] = [round(s, 5) for s in arm(case, rounds)]
        gc.collect()
        print(f"{case.label}: {name}: {case.steps} steps in {min(seconds[name]):.3f} s", file=sys.stderr, flush=True)
    return {
        "label": case.label,
        "device": torch.cuda.get_device_name() if case.device == "cuda" else case.device,
        "batch_size": case.batch_size,
        "steps": case.steps,
        "macs_an_image": macs(case.model, image),
        "wall": seconds,
    }


def images_a_second(found: Mapping[str, Any], arm: str) -> Figure:
    """The rate of an arm, over its rounds."""
    return Figure.of(found["steps"] * found["batch_size"] / seconds for seconds in found["wall"][arm])


def share(found: Mapping[str, Any], arm: str) -> float | None:
    """The share of the chip's stated matrix rate; None where it is not in PEAK."""
    stated = next((rate for name, rate in PEAK.items() if name in found["device"]), None)
    if stated is None:
        return None
    return images_a_second(found, arm).value * found["macs_an_image"] * 2 * 3 / stated


@section(RESULTS)
def table(cases: Cases) -> list[str]:
    """The section of docs/benchmarks.md."""
    rows = []
    for found in cases.values():
        for arm, title in {"ours": "TransferTrainer", "bare": "bare loop"}.items():
            part = share(found, arm)
            told = "" if part is None else f"{100 * part:.0f} %"
            rows.append((found["label"], found["device"], title, images_a_second(found, arm), told))
    return [
        "## On a GPU",
        "",
        "Full fine-tuning in bf16 with torch.compile; images of noise that lie on the device.",
        "",
        *markdown(["network", "device", "by", "images a second", "share of the matrix rate"], rows),
        "",
        f"`python benchmarks/accelerator.py` on {measured_on(cases.values())}.",
    ]


def network(name: str, label: str, batch_size: int) -> Case:
    """A network of timm's from random weights, at 224 px.

    Raises:
        FileNotFoundError: If there is no GPU.
    """
    if not torch.cuda.is_available():
        raise FileNotFoundError("it needs a GPU")
    labels = [str(number) for number in range(1000)]
    backbone = load_backbone(name, labels=labels, pretrained=False)
    return Case(f"{label}, 224 px, {batch_size} rows a step", backbone.model, 224, batch_size, steps=20)


CASES: dict[str, Callable[[], Case]] = {
    "resnet50": lambda: network("resnet50", "ResNet-50", 256),
    "vit": lambda: network("vit_base_patch16_224", "ViT-B/16", 256),
}


if __name__ == "__main__":
    main(__doc__, CASES, measure, table, RESULTS, ROUNDS)
