"""Trainings of tiny models on two processes; each writes what it saw. Launched by test_two_processes.py.

torchrun --nproc_per_node 2 tests/invariants/two_processes.py FOLDER save
torchrun --nproc_per_node 2 tests/invariants/two_processes.py FOLDER stop
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_transfer._torchvision import make_torchvision_importable

make_torchvision_importable()

from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)

from hf_transfer import LoRA, TransferConfig, TransferTrainer  # noqa: E402
from hf_transfer.objectives import DANN, L2SP, CrossEntropy  # noqa: E402
from hf_transfer.trainer import NonFiniteLoss  # noqa: E402

ROWS, CLASSES, STEPS = 24, 3, 6  # 2 rows a process and step: step 0 reads 0, 1 and 2, 3
SPOILT = 15  # in the second process's share of step 3
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def text_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(**SIZE, vocab_size=50, max_position_embeddings=16, num_labels=CLASSES)
    )


def image_model() -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SIZE, image_size=8, patch_size=4, num_labels=CLASSES))


class PlainNet(torch.nn.Module):
    """A network whose forward takes no **kwargs: the stock Trainer scales the loss of these rightly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 16), torch.nn.Dropout(0.1))
        self.classifier = torch.nn.Linear(16, CLASSES)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.classifier(self.body(pixel_values))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows(modality: str, spoilt: bool = False) -> Dataset:
    """Labelled rows of two domains; the image of one is not a number if asked for."""
    draw = torch.Generator().manual_seed(1)
    columns: dict[str, list] = {
        "labels": torch.randint(0, CLASSES, (ROWS,), generator=draw).tolist(),
        "domain": [i % 2 for i in range(ROWS)],
        "example_id": list(range(ROWS)),
    }
    if modality == "text":
        columns["input_ids"] = torch.randint(1, 50, (ROWS, 12), generator=draw).tolist()
    else:
        pixels = torch.randn(ROWS, 3, 8, 8, generator=draw)
        pixels[SPOILT] = float("nan") if spoilt else pixels[SPOILT]
        columns["pixel_values"] = pixels.tolist()
    return Dataset.from_dict(columns)


def terms() -> list:
    torch.manual_seed(2)
    return [CrossEntropy(), DANN(weight=0.5), L2SP(weight=0.1)]


def config(folder: Path, **options: Any) -> TransferConfig:
    return TransferConfig(
        output_dir=str(folder), per_device_train_batch_size=2, num_train_epochs=1, learning_rate=1e-2, use_cpu=True,
        report_to="none", disable_tqdm=True, logging_steps=1, **options,
    )  # fmt: skip


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class Witness(TrainerCallback):
    """The models that callbacks were shown."""

    def __init__(self) -> None:
        self.models: list[Any] = []

    def on_event(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.models.append(model)

    on_train_begin = on_step_begin = on_step_end = on_save = on_evaluate = on_train_end = on_event


# ---- save: whose model it is, and what lies in the folders ----------------------------------------------------------


def adapted(folder: Path) -> Any:
    """LoRA on a base that is saved beside the run, so that the adapter can be loaded again."""
    if int(os.environ["RANK"]) == 0:
        text_model().save_pretrained(folder / "base")
    torch.distributed.barrier()
    model = BertForSequenceClassification.from_pretrained(folder / "base")
    torch.manual_seed(3)
    return LoRA(r=2).apply(model)


SAVED: dict[str, tuple[str, Callable[[Path], Any], bool]] = {
    "text": ("text", lambda folder: text_model(), False),
    "image, terms": ("image", lambda folder: image_model(), True),
    "LoRA, terms": ("text", adapted, True),
}


def saved(folder: Path, case: str) -> dict[str, Any]:
    """One run with a checkpoint in its middle, saved at its end as a user would."""
    modality, make, with_terms = SAVED[case]
    model, data, witness = make(folder), rows(modality), Witness()
    args = config(folder / "run", save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3)
    trainer = TransferTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, objectives=terms() if with_terms else None,
        callbacks=[witness],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    torch.distributed.barrier()
    column = "input_ids" if modality == "text" else "pixel_values"
    inputs = {column: torch.tensor(data[column])}
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    shown = {id(each) for each in witness.models}
    return {
        "same model": trainer.model is model and shown == {id(model)} and len(witness.models) > STEPS,
        "steps": trainer.state.global_step, "inputs": inputs, "logits": logits, "weights": weights(model),
    }  # fmt: skip


def trained(trainer_class: type, folder: Path) -> dict[str, Any]:
    """The weights and losses of a run without terms, of a network that the stock Trainer does right by."""
    model = PlainNet()
    args = config(folder, save_strategy="no", gradient_accumulation_steps=2, max_grad_norm=0.5, weight_decay=0.1)
    data = rows("image").remove_columns("domain")
    trainer = trainer_class(model=model, args=args, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"weights": weights(model), "losses": losses}


# ---- stop: the loss of one process is not finite --------------------------------------------------------------------

STOPPED = {"no terms": (False, 1), "terms": (True, 1), "accumulation": (True, 2)}


def stopped(folder: Path, case: str) -> dict[str, Any]:
    """A run over a spoilt row that only the second process reads."""
    with_terms, accumulation = STOPPED[case]
    model, data = image_model(), rows("image", spoilt=True)
    args = config(
        folder, save_strategy="steps", save_steps=1, train_sampling_strategy="sequential",
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    trainer = TransferTrainer(model=model, args=args, train_dataset=data, objectives=terms() if with_terms else None)
    try:
        trainer.train()
    except NonFiniteLoss as error:
        return {"said": str(error), "step": trainer.state.global_step, "weights": weights(model)}
    return {"said": None, "step": trainer.state.global_step, "weights": weights(model)}


def main() -> None:
    torch.set_num_threads(1)
    out, what = Path(sys.argv[1]), sys.argv[2]
    torch.distributed.init_process_group("gloo")
    results: dict[str, Any]
    if what == "save":
        results = {case: saved(out / case, case) for case in SAVED}
        results |= {kind.__name__: trained(kind, out / kind.__name__) for kind in (Trainer, TransferTrainer)}
    else:
        results = {case: stopped(out / case, case) for case in STOPPED}
    torch.save(results, out / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
