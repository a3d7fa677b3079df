"""The arms of frozen_training.py: frozen layers run by the plain Trainer in every epoch, and once into a cache."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_transfer._torchvision import make_torchvision_importable

make_torchvision_importable()

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from paired import SEED, Clock, Outcome  # noqa: E402
from timm.data import create_transform  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from watch import Watch  # noqa: E402

from hf_transfer import Backbone, TransferConfig  # noqa: E402
from hf_transfer.config import RunConfig  # noqa: E402
from hf_transfer.data.collate import collator_for  # noqa: E402
from hf_transfer.data.sources import Data  # noqa: E402
from hf_transfer.data.transforms import prepare  # noqa: E402
from hf_transfer.frozen.choice import cached_data  # noqa: E402
from hf_transfer.objectives import CrossEntropy  # noqa: E402
from hf_transfer.tuning import Tuning  # noqa: E402

PADDED = 128  # tokens, of the plain arm


@dataclass(frozen=True)
class Case:
    """One job, and how long it is trained.

    Attributes:
        label: What it is, for the table.
        backbone: From whose weights each training starts.
        data: Raw rows: `train`, and `test` to compare logits on.
        tuning: What trains.
        epochs: Of the cached arm; each is a row of the table.
        plain_epochs: Of the plain arms.
        targets: What is to be reached at `epochs`.
        batch_size: Rows a step.
        learning_rate: At the start; it decays linearly to 0.
        optim: The optimizer, by the Trainer's name. The first steps of AdamW go by the sign of the gradient, and make
            whole steps of what is rounding where a gradient is near 0.
    """

    label: str
    backbone: Backbone
    data: Data
    tuning: Tuning
    epochs: tuple[int, ...]
    plain_epochs: int
    targets: tuple[float, ...]
    batch_size: int = 32
    learning_rate: float = 1e-3
    optim: str = "adamw_torch"

    @property
    def plain_arms(self) -> tuple[str, ...]:
        return ("plain",) if self.backbone.modality == "image" else ("plain", "plain, short")

    def network(self) -> Any:
        """The network as each training starts."""
        return self.tuning.apply(deepcopy(self.backbone.model))

    def arguments(self, config: Callable[..., Any], epochs: int, folder: Path, **more: Any) -> Any:
        """The Trainer's arguments, the same for all."""
        return config(
            output_dir=str(folder / "run"), num_train_epochs=epochs, per_device_train_batch_size=self.batch_size,
            learning_rate=self.learning_rate, optim=self.optim, save_strategy="no", eval_strategy="no",
            report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=50, seed=SEED, data_seed=SEED,
            dataloader_pin_memory=False, **more,
        )  # fmt: skip


class HeldOut:
    """Rows that are not trained on, and what a network says of them.

    Args:
        case: Its `test` rows.
    """

    def __init__(self, case: Case) -> None:
        rows = prepare(case.data.splits["test"], case.backbone, case.data.columns, train=False)
        batch = collator_for(case.backbone)([rows[i] for i in range(len(rows))])
        self.labels = batch.pop("labels")
        self.inputs = {name: value for name, value in batch.items() if name != "example_id"}

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        """(N, C), of the network in eval mode."""
        return model.eval()(**self.inputs).logits

    def accuracy(self, logits: Tensor) -> float:
        """The share of rows whose largest logit is their label's."""
        return float((logits.argmax(-1) == self.labels).double().mean())


def cached(case: Case, epochs: int, held_out: HeldOut) -> Outcome:
    """As finetune(cache="always") trains."""
    backbone = replace(case.backbone, model=case.network())
    with tempfile.TemporaryDirectory() as folder:
        run = RunConfig(model="", dataset="", cache="always", cache_dir=folder)
        args = case.arguments(TransferConfig, epochs, Path(folder))
        collator, terms = collator_for(backbone), [CrossEntropy()]
        start = Clock.now()
        prepared = {
            "train": prepare(case.data.splits["train"], backbone, case.data.columns, train=True, augment="none")
        }
        found = cached_data(backbone, prepared, collator, args, terms, run)
        assert found is not None
        trainer = found.trainer(
            model=backbone.model, args=args, train_dataset=prepared["train"], data_collator=collator, objectives=terms
        )
        return _trained(trainer, start, epochs, held_out)


def plain(case: Case, arm: str, epochs: int, held_out: HeldOut) -> Outcome:
    """As the stock Trainer trains a network with frozen parameters."""
    model = deepcopy(case.backbone.model)
    trained = {name for name, parameter in case.network().named_parameters() if parameter.requires_grad}
    with tempfile.TemporaryDirectory() as folder:
        args = case.arguments(transformers.TrainingArguments, epochs, Path(folder), remove_unused_columns=False)
        start = Clock.now()
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name in trained
        rows, collator = stock_data(case, arm)
        trainer = StillTrainer(model=model, args=args, train_dataset=rows, data_collator=collator)
        trainer.remove_callback(transformers.PrinterCallback)
        return _trained(trainer, start, epochs, held_out)


class StillTrainer(transformers.Trainer):
    """A Trainer whose frozen layers stay in eval mode: their BatchNorm would move, and the arms would differ."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model=model, **options)
        own = {module: list(module.parameters(recurse=False)) for module in model.modules()}
        still = [m for m, parameters in own.items() if parameters and not any(p.requires_grad for p in parameters)]
        change_mode = model.train

        def train(mode: bool = True) -> nn.Module:
            change_mode(mode)
            for module in still:
                module.training = False
            return model

        model.train = train  # type: ignore[method-assign]


def _trained(trainer: Any, start: Clock, epochs: int, held_out: HeldOut) -> Outcome:
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    clocks = {"": Clock.now().since(start), "epochs": watch.epochs}
    assert trainer.state.epoch == epochs
    trainer.model.__dict__.pop("train", None)
    return Outcome(held_out.logits(trainer.model), clocks)


def stock_data(case: Case, arm: str) -> tuple[Any, Any]:
    """Rows and collator as transformers' example scripts have them: run_image_classification, run_classification."""
    rows, columns, processor = case.data.splits["train"], case.data.columns, case.backbone.processor
    if case.backbone.modality == "image":
        config = {name: case.backbone.data_config[name] for name in ("input_size", "mean", "std")}
        crop = {name: case.backbone.data_config[name] for name in ("interpolation", "crop_pct", "crop_mode")}
        transform = create_transform(**config, **crop, is_training=False)

        def pixels(batch: Mapping[str, Any]) -> dict[str, Any]:
            images = [transform(image.convert("RGB")) for image in batch[columns.input]]
            return {"pixel_values": images, "labels": batch[columns.label]}

        return rows.with_transform(pixels), transformers.DefaultDataCollator()
    how = {"padding": "max_length", "max_length": PADDED} if arm == "plain" else {"max_length": PADDED}

    def tokens(batch: Mapping[str, Any]) -> dict[str, Any]:
        return {**processor(batch[columns.input], truncation=True, **how), "labels": batch[columns.label]}

    collator = transformers.DataCollatorWithPadding(processor)
    return rows.map(tokens, batched=True, remove_columns=rows.column_names), collator


@contextmanager
def fresh_maps() -> Iterator[None]:
    """Datasets that are mapped anew each time, instead of found in a cache."""
    datasets.disable_caching()
    try:
        yield
    finally:
        datasets.enable_caching()
