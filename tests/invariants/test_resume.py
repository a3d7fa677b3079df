"""Interrupt and resume anywhere = uninterrupted, bit for bit on a CPU (DESIGN, invariant 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from hf_transfer import Backbone, LoRA, TransferConfig, TransferTrainer, load_data
from hf_transfer.data.collate import collator_for
from hf_transfer.data.splits import combine
from hf_transfer.data.transforms import prepare
from hf_transfer.objectives import DANN, L2SP, CrossEntropy

ROWS, STEPS_AN_EPOCH = 24, 6


def tiny_bert(seed: int = 0) -> BertForSequenceClassification:
    """With dropout, so that the random state matters."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50, max_position_embeddings=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def rows() -> Dataset:
    generator = torch.Generator().manual_seed(1)
    domain = torch.arange(ROWS) % 2
    labels = torch.randint(0, 3, (ROWS,), generator=generator).masked_fill(domain == 1, -100)
    ids = torch.randint(0, 50, (ROWS, 12), generator=generator)
    return Dataset.from_dict(
        {"input_ids": [row[: 6 + i % 6].tolist() + [0] * (6 - i % 6) for i, row in enumerate(ids)],
         "labels": labels.tolist(), "domain": domain.tolist(), "example_id": list(range(ROWS))}
    )  # fmt: skip


class StopAt(TrainerCallback):
    """Ends the run at a step, as a pre-empted machine would, after its checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def run(folder: Path, options: dict[str, Any], tuning: Any, stop_at: int | None = None, resume: bool = False) -> Any:
    model = tiny_bert()
    if tuning is not None:
        torch.manual_seed(3)
        model = tuning.apply(model)
    torch.manual_seed(2)
    args = TransferConfig(
        output_dir=str(folder), per_device_train_batch_size=4, num_train_epochs=3, learning_rate=1e-2, use_cpu=True,
        save_strategy="steps", save_steps=1, save_total_limit=1, report_to="none", disable_tqdm=True, logging_steps=1,
        **options,
    )  # fmt: skip
    trainer = TransferTrainer(
        model=model, args=args, train_dataset=rows(),
        objectives=[CrossEntropy(), DANN(weight=0.5), L2SP(weight=0.1)],
        callbacks=[StopAt(stop_at)] if stop_at else None,
    )  # fmt: skip
    torch.manual_seed(100 + resume)  # a new process is in another random state; only the checkpoint may matter
    trainer.train(resume_from_checkpoint=resume)
    losses = {e["step"]: (e["loss"], e["dann"]) for e in trainer.state.log_history if "loss" in e}
    return trainer.learner.state_dict(), losses


CASES = {
    "plain": ({}, None, 9),
    "end of an epoch": ({}, None, STEPS_AN_EPOCH),
    "accumulation": ({"gradient_accumulation_steps": 2}, None, 4),
    "average of the weights": ({"ema_decay": 0.9}, None, 9),
    "length-grouped": ({"train_sampling_strategy": "group_by_length"}, None, 9),
    "balanced domains": ({"sampling": "balanced_domains"}, None, 9),
    "layer decay, multistep": ({"layer_decay": 0.7, "lr_scheduler_type": "multistep", "optim": "sgd"}, None, 9),
    "LoRA": ({}, LoRA(r=2, dropout=0.1), 9),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, case: str) -> None:
    options, tuning, stop_at = CASES[case]
    expected, expected_losses = run(tmp_path / "whole", options, tuning)
    run(tmp_path / "cut", options, tuning, stop_at=stop_at)
    state, losses = run(tmp_path / "cut", options, tuning, resume=True)
    assert losses == expected_losses
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        if torch.is_tensor(value):
            assert torch.equal(state[name], value), name


class DigitNet(torch.nn.Module):
    """Convolution, batch statistics, dropout, a classifier: what the recipe adapt_digits.py trains, but smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3, stride=2), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Dropout(0.1),
            torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(),
        )  # fmt: skip
        self.classifier = torch.nn.Linear(16, 10)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.classifier(self.body(pixel_values))}


def adapt(folder: Path, stop_at: int | None = None, resume: bool = False) -> dict[str, torch.Tensor]:
    """Digits to other writers' digits: two domains of images, augmented, in balanced batches, with DANN."""
    data = load_data("digits", validation=0, max_train_samples=40, max_eval_samples=32)
    torch.manual_seed(0)
    image = {"input_size": (1, 16, 16), "mean": (0.5,), "std": (0.5,), "interpolation": "bilinear", "crop_pct": 1.0}
    backbone = Backbone(DigitNet(), None, "image", "image-classification", "digit-net", data.labels, data_config=image)
    mixed = combine(source=data.splits["train"], target=data.splits["test"], columns=data.columns)
    args = TransferConfig(
        output_dir=str(folder), per_device_train_batch_size=8, num_train_epochs=3, learning_rate=1e-2, use_cpu=True,
        sampling="balanced_domains", save_strategy="steps", save_steps=1, save_total_limit=1, report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = TransferTrainer(
        model=backbone.model,
        args=args,
        train_dataset=prepare(mixed, backbone, data.columns, train=True, augment="geometric+noise"),
        data_collator=collator_for(backbone),
        objectives=[CrossEntropy(), DANN(hidden=(8,))],
        callbacks=[StopAt(stop_at)] if stop_at else None,
    )
    torch.manual_seed(100 + resume)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.learner.state_dict()


def test_an_adaptation_resumed_in_its_second_epoch_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    expected = adapt(tmp_path / "whole")
    adapt(tmp_path / "cut", stop_at=14)  # 10 steps an epoch
    state = adapt(tmp_path / "cut", resume=True)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert not torch.is_tensor(value) or torch.equal(state[name], value), name
