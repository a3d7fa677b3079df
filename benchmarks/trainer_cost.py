"""What the Trainer costs: a training step beside a bare loop's (evaluation_cost.py is about evaluations).

    OMP_NUM_THREADS=1 python benchmarks/trainer_cost.py                        # all cases
    OMP_NUM_THREADS=1 python benchmarks/trainer_cost.py head-text-32 --rounds 9   # one; the others' figures stay

Both arms start from the same weights over the same batches. The bare loop reads them from memory, and does what the
Trainer's arguments ask for: the same forward pass in the same modes, cross-entropy, the backward pass, the norm of the
gradients clipped to 1, AdamW in transformers' two groups, a linear schedule. Both end with the same weights.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from hf_transfer._torchvision import make_torchvision_importable

make_torchvision_importable()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from command import main  # noqa: E402
from paired import SEED, Arm, Clock, Outcome, Same, interleave, ratio  # noqa: E402
from results import Cases, Judged, load, markdown, measured_on, section, shared  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from hf_transfer import Backbone, TransferConfig, TransferTrainer, load_backbone  # noqa: E402
from hf_transfer.config import RunConfig  # noqa: E402
from hf_transfer.data.collate import collator_for  # noqa: E402
from hf_transfer.data.sources import load_data  # noqa: E402
from hf_transfer.data.transforms import prepare  # noqa: E402
from hf_transfer.frozen.choice import cached_data  # noqa: E402
from hf_transfer.objectives import CrossEntropy  # noqa: E402
from hf_transfer.tuning import tuning_from_name  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
ROUNDS = 9
RATE, DECAY, CLIP = 1e-3, 0.01, 1.0

Result = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Two arms that do equal work.

    Attributes:
        label: What it is, for the table.
        target: What the ratio is to be at most.
        steps: Steps, or rows, that the seconds are divided by.
        arms: "trainer" and "bare".
        tolerance: How far their results may differ; 0 is bit for bit.
        folder: What they write to, which goes with the case.
    """

    label: str
    target: float
    steps: int
    arms: Mapping[str, Arm]
    tolerance: float = 0.0
    folder: Any = None


# ---- training -----------------------------------------------------------------------------------------------------


class Watch(transformers.TrainerCallback):
    """Takes the time of training proper, from its same seed to its end."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        transformers.set_seed(SEED)
        self.start = Clock.now()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock = Clock.now().since(self.start)


def arguments(folder: str, **more: Any) -> TransferConfig:
    return TransferConfig(
        output_dir=folder, learning_rate=RATE, weight_decay=DECAY, max_grad_norm=CLIP, save_strategy="no",
        use_cpu=True, disable_tqdm=True, report_to="none", logging_steps=50, seed=SEED, **more,
    )  # fmt: skip


def weights(model: nn.Module) -> Result:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def trainer_arm(make: Callable[[], TransferTrainer], start: Mapping[str, Tensor]) -> Arm:
    def arm() -> Outcome:
        trainer, watch = make(), Watch()
        trainer.model.load_state_dict(start)
        trainer.add_callback(watch)
        trainer.train()
        return Outcome(weights(trainer.model), {"": watch.clock})

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

    def arm() -> Outcome:
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
        began = Clock.now()
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
        return Outcome(weights(model), {"": Clock.now().since(began)})

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
        data = load_data(shared("data/sst2"), max_train_samples=2 * rows)
        backbone = load_backbone(shared("weights/all-MiniLM-L6-v2"), labels=data.labels)
        title = "MiniLM 384 -> 2"
    else:
        data = load_data(shared("data/cifar10"), max_train_samples=2 * rows)
        weights_of = shared("weights/mobilenetv2_100.coral_tf2_in1k")
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
    return Case(f"cached head, {title}, batch {batch_size}", 1.3, steps, arms)


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
    return Case(f"full fine-tuning, {title}, batch {batch_size}", 1.05, len(drawn), arms)


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


# ---- rounds and figures -------------------------------------------------------------------------------------------


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Times the arms of a case, which must end with the same weights."""
    same = [Same("trainer", "bare", case.tolerance)]
    found = interleave(case.arms, label=case.label, rounds=rounds, repeats=case.tolerance, same=same)
    return {"label": case.label, "target": case.target, "steps": case.steps, **found.facts()}


def judged(path: Path = RESULTS) -> list[Judged]:
    """The lines of the table of targets."""
    return [
        Judged(found["label"], "bare loop doing the same", "<=", found["target"], ratio(found, "trainer", "bare"))
        for found in load(path).values()
    ]


@section(RESULTS)
def table(cases: Cases) -> list[str]:
    """The section of docs/benchmarks.md."""
    rows = []
    for found in cases.values():
        each = median(found["cpu"]["bare"]) / found["steps"] * 1e6
        told = f"{each:,.0f} us a step" if each < 1e4 else f"{each / 1000:,.0f} ms a step"
        both = (ratio(found, "trainer", "bare"), ratio(found, "trainer", "bare", "wall"))
        rows.append((found["label"], f"<= {found['target']:g}", *both, told))
    return [
        "## What the Trainer costs: a step of training beside a bare loop's",
        "",
        "The bare loop reads the same batches from memory, and ends with the same weights bit for bit.",
        "",
        *markdown(["job", "target", "CPU time", "wall time", "bare loop"], rows),
        "",
        f"`python benchmarks/trainer_cost.py` on {measured_on(cases.values())}.",
    ]


def in_a_folder(make: Callable[[str], Case]) -> Callable[[], Case]:
    """What makes a case with a folder that is gone when the case is."""

    def made() -> Case:
        folder = tempfile.TemporaryDirectory()
        return replace(make(folder.name), folder=folder)

    return made


CASES: dict[str, Callable[[], Case]] = {
    "head-text-32": in_a_folder(lambda folder: head("text", 32, folder)),
    "head-text-64": in_a_folder(lambda folder: head("text", 64, folder)),
    "head-image-32": in_a_folder(lambda folder: head("image", 32, folder)),
    "head-image-64": in_a_folder(lambda folder: head("image", 64, folder)),
    "resnet-32": in_a_folder(lambda folder: resnet(32, 32, 6, folder)),
    "resnet-224": in_a_folder(lambda folder: resnet(224, 16, 2, folder)),
    "bert": in_a_folder(lambda folder: bert(16, 2, folder)),
}


if __name__ == "__main__":
    main(__doc__, CASES, measure, table, RESULTS, ROUNDS)
