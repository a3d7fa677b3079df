"""TransferTrainer is transformers' Trainer: the same training without terms, the same checkpoints with them.

Gradients and resuming have their own tests, in tests/invariants.
"""

from __future__ import annotations

import errno
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_transfer import LoRA, TransferConfig, TransferTrainer, merge
from hf_transfer.errors import TransferError
from hf_transfer.evaluation import compute_metrics_for
from hf_transfer.objective import Objective
from hf_transfer.objectives import DANN, L2SP, CrossEntropy
from hf_transfer.trainer import STATE_FILE, NonFiniteLoss

ROWS, CLASSES, STEPS_AN_EPOCH = 24, 3, 6
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def text_model(**options: Any) -> BertForSequenceClassification:
    """With dropout: a stray draw from the global generator would show."""
    torch.manual_seed(0)
    size = {**SIZE, "vocab_size": 50, "max_position_embeddings": 16, "num_labels": CLASSES}
    return BertForSequenceClassification(BertConfig(**{**size, **options}))


def image_model() -> ViTForImageClassification:
    torch.manual_seed(0)
    options = {"image_size": 8, "patch_size": 4, "hidden_dropout_prob": 0.1, "num_labels": CLASSES}
    return ViTForImageClassification(ViTConfig(**SIZE, **options))


MODELS: dict[str, Callable[[], Any]] = {"text": text_model, "image": image_model}


def rows(modality: str = "text", n: int = ROWS) -> Dataset:
    """Labelled rows, ids from 1000."""
    draw = torch.Generator().manual_seed(1)
    columns: dict[str, list] = {
        "labels": torch.randint(0, CLASSES, (n,), generator=draw).tolist(),
        "example_id": list(range(1000, 1000 + n)),
    }
    if modality == "text":
        columns["input_ids"] = torch.randint(1, 50, (n, 12), generator=draw).tolist()
    else:
        columns["pixel_values"] = torch.randn(n, 3, 8, 8, generator=draw).tolist()
    return Dataset.from_dict(columns)


def two_domains() -> Dataset:
    """Every second row is of the target domain, and unlabelled."""
    data = rows()
    domain = [i % 2 for i in range(ROWS)]
    labels = [-100 if d else label for d, label in zip(domain, data["labels"], strict=True)]
    return data.remove_columns("labels").add_column("labels", labels).add_column("domain", domain)


def config(folder: Path, kind: type = TransferConfig, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": ROWS // STEPS_AN_EPOCH, "num_train_epochs": 1,
        "learning_rate": 1e-2, "use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "logging_steps": 1,
    }  # fmt: skip
    return kind(**{**defaults, **options})


def terms() -> list[Objective]:
    """A supervised term, one that owns parameters, and one that owns buffers."""
    return [CrossEntropy(), DANN(weight=0.5), L2SP(weight=0.1)]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


def log_of(trainer: Trainer) -> list[dict[str, float]]:
    """The log without timings."""
    timed = ("runtime", "per_second", "preparation_time")
    return [{k: v for k, v in e.items() if not k.endswith(timed)} for e in trainer.state.log_history]


class Record(TrainerCallback):
    """The weights after each step, and the models that callbacks were shown."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.models: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights.append(weights(model))

    def on_event(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.models.append(model)

    on_train_begin = on_epoch_begin = on_step_begin = on_evaluate = on_save = on_train_end = on_event


# ---- equal to transformers' Trainer ---------------------------------------------------------------------------------

SAME: dict[str, tuple[str, type, dict[str, Any]]] = {
    "plain": ("text", TrainingArguments, {}),
    "evaluation": ("image", TrainingArguments, {"eval_strategy": "steps", "eval_steps": 2, "num_train_epochs": 2}),
    "schedule": ("text", TransferConfig, {"warmup_steps": 2, "weight_decay": 0.1, "lr_scheduler_type": "cosine"}),
    "clipping": ("image", TransferConfig, {"max_grad_norm": 0.1}),
    "no clipping, sgd": ("text", TransferConfig, {"max_grad_norm": 0.0, "optim": "sgd"}),
    "activation checkpointing": ("text", TransferConfig, {"activation_checkpointing": True}),
    "bf16, evaluation": ("text", TransferConfig, {"bf16": True, "eval_strategy": "steps", "eval_steps": 2}),
    "bf16": ("image", TransferConfig, {"bf16": True}),
}


@pytest.mark.parametrize("case", SAME)
def test_trains_as_the_trainer_does_without_terms(tmp_path: Path, case: str) -> None:
    modality, ours, options = SAME[case]

    def run(trainer_class: type, arguments: type) -> Trainer:
        seed = {"data_seed": 42} if ours is TransferConfig else {}  # its default: the seed
        args = config(tmp_path, arguments, **seed, **options)
        data = rows(modality)
        trainer = trainer_class(model=MODELS[modality](), args=args, train_dataset=data, eval_dataset=data)
        trainer.train()
        return trainer

    trainer, stock = run(TransferTrainer, ours), run(Trainer, TrainingArguments)
    assert log_of(trainer) == log_of(stock)
    assert len(log_of(stock)) > STEPS_AN_EPOCH
    assert_equal(weights(trainer.model), weights(stock.model))


# ---- the user's model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objectives", [None, terms], ids=["no terms", "terms"])
def test_the_model_is_the_users_all_along(tmp_path: Path, objectives: Any) -> None:
    model, record = text_model(), Record()
    args = config(tmp_path, eval_strategy="epoch", save_strategy="epoch")
    data = two_domains() if objectives else rows()
    trainer = TransferTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, callbacks=[record],
        objectives=objectives() if objectives else None,
    )  # fmt: skip
    assert trainer.model is model
    for run in (1, 2):  # a second train() on the same Trainer, too
        before = weights(model)
        trainer.train()
        assert trainer.model is model
        assert trainer.state.global_step == STEPS_AN_EPOCH
        assert any(not torch.equal(before[name], value) for name, value in weights(model).items())
        assert len(record.models) == run * (1 + 1 + STEPS_AN_EPOCH + 1 + 1 + 1)
    assert all(shown is model for shown in record.models)
    evaluated = next(e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated, rel=1e-5)


def test_a_second_training_starts_its_schedule_anew(tmp_path: Path) -> None:
    trainer = TransferTrainer(
        model=text_model(), args=config(tmp_path), train_dataset=two_domains(), objectives=terms()
    )
    rates = []
    for _ in range(2):
        trainer.train()
        rates.append([e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e])
    assert rates[0] == rates[1] == pytest.approx([1e-2 * (1 - i / STEPS_AN_EPOCH) for i in range(STEPS_AN_EPOCH)])


def test_a_batch_size_found_by_trying_keeps_the_terms(tmp_path: Path) -> None:
    class OutOfMemory(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.train_batch_size >= 8:
                raise RuntimeError("CUDA out of memory.")

    model = text_model()
    args = config(tmp_path, per_device_train_batch_size=8, auto_find_batch_size=True, max_steps=2)
    trainer = TransferTrainer(
        model=model, args=args, train_dataset=two_domains(), objectives=terms(), callbacks=[OutOfMemory()]
    )
    trainer.train()
    assert trainer._train_batch_size < 8
    assert trainer.model is model
    first = log_of(trainer)[0]  # holds nothing of the attempt that was given up
    assert first["loss"] == pytest.approx(first["cross_entropy"] + 0.5 * first["dann"] + 0.1 * first["l2sp"], rel=1e-4)


# ---- checkpoints ----------------------------------------------------------------------------------------------------

ORDINARY = {
    "config.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json",
    "training_args.bin",
}  # fmt: skip


@pytest.mark.parametrize("objectives", [None, terms], ids=["no terms", "terms"])
def test_a_checkpoint_is_an_ordinary_one(tmp_path: Path, objectives: Any) -> None:
    args = config(tmp_path, save_strategy="steps", save_steps=3, max_steps=3)
    trainer = TransferTrainer(
        model=text_model(), args=args, train_dataset=two_domains() if objectives else rows(),
        objectives=objectives() if objectives else None,
    )  # fmt: skip
    trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    folder = tmp_path / "checkpoint-3"
    assert {path.name for path in folder.iterdir()} == ORDINARY | ({STATE_FILE} if objectives else set())
    assert_equal(load_file(folder / "model.safetensors"), weights(trainer.model))
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(loaded) is BertForSequenceClassification
    inputs = {"input_ids": torch.tensor(rows()["input_ids"])}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, trainer.model.eval()(**inputs).logits)


def test_saving_again_replaces_what_was_saved(tmp_path: Path) -> None:
    """As the Trainer does: a run that resumes from an early checkpoint writes the later ones once more."""
    model = image_model()
    trainer = TransferTrainer(model=model, args=config(tmp_path), train_dataset=rows("image"))
    trainer.save_model()
    trainer.train()
    model.config.id2label = {0: "cat", 1: "dog", 2: "owl"}
    trainer.save_model()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert_equal(weights(loaded), weights(model))


def test_the_collators_tokenizer_is_saved_where_no_processor_was_given(tmp_path: Path) -> None:
    class Collator:
        def __init__(self) -> None:
            self.tokenizer = Tokenizer()

    class Tokenizer:
        def save_pretrained(self, folder: Any) -> None:
            (Path(folder) / "tokenizer.json").write_text("{}")

    TransferTrainer(model=text_model(), args=config(tmp_path), data_collator=Collator()).save_model()
    assert (tmp_path / "tokenizer.json").is_file()


def test_adapters_train_save_and_merge(tmp_path: Path) -> None:
    text_model().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = LoRA(r=2).apply(base)
    args = config(tmp_path / "run", save_strategy="epoch", num_train_epochs=2)
    trainer = TransferTrainer(model=model, args=args, train_dataset=two_domains(), objectives=terms())
    trainer.train()
    assert trainer.model is model
    folder = tmp_path / "run" / f"checkpoint-{2 * STEPS_AN_EPOCH}"
    saved = load_file(folder / "adapter_model.safetensors")
    assert any("lora_" in name for name in saved)
    assert not any("discriminator" in name for name in saved)
    inputs = {"input_ids": torch.tensor(rows()["input_ids"])}
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        loaded = AutoModelForSequenceClassification.from_pretrained(
            folder, config=AutoConfig.from_pretrained(folder, subfolder="model_config"), ignore_mismatched_sizes=True
        )
        torch.testing.assert_close(loaded.eval()(**inputs).logits, expected)
        torch.testing.assert_close(merge(model).eval()(**inputs).logits, expected)


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def spoilt(with_ids: bool = True) -> Dataset:
    """The row of step 3 (of six) is not a number."""
    data = rows("image")
    pixels = torch.tensor(data["pixel_values"])
    pixels[9] = float("nan")
    data = data.remove_columns("pixel_values").add_column("pixel_values", pixels.tolist())
    return data if with_ids else data.remove_columns("example_id")


@pytest.mark.parametrize("objectives", [None, [CrossEntropy()]], ids=["no terms", "terms"])
def test_a_loss_that_is_not_finite_stops_training(tmp_path: Path, objectives: Any) -> None:
    record = Record()
    args = config(tmp_path, save_strategy="steps", save_steps=1, train_sampling_strategy="sequential")
    trainer = TransferTrainer(
        model=image_model(), args=args, train_dataset=spoilt(), objectives=objectives, callbacks=[record]
    )
    with pytest.raises(NonFiniteLoss, match=r"nan at step 2.*\[1008, 1009, 1010, 1011\].*checkpoint-2") as caught:
        trainer.train()
    assert "learning_rate" in str(caught.value)
    assert_equal(weights(trainer.model), record.weights[1])
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-2")
    assert_equal(weights(saved), record.weights[1])
    assert not (tmp_path / "checkpoint-3").exists()


def test_rows_without_an_id_are_said_to_be_unknown(tmp_path: Path) -> None:
    args = config(tmp_path, train_sampling_strategy="sequential")
    trainer = TransferTrainer(model=image_model(), args=args, train_dataset=spoilt(with_ids=False))
    with pytest.raises(NonFiniteLoss, match=r"unknown \(the data has no example_id column\).*none was saved"):
        trainer.train()


def test_a_loss_that_is_not_finite_can_be_let_pass(tmp_path: Path) -> None:
    args = config(tmp_path, train_sampling_strategy="sequential", stop_on_nonfinite_loss=False)
    trainer = TransferTrainer(model=image_model(), args=args, train_dataset=spoilt())
    trainer.train()
    assert trainer.state.global_step == STEPS_AN_EPOCH


def fill_disk(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """From now on, writing this file breaks off in the middle."""
    from transformers import modeling_utils

    def broken(path: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    if file == "model.safetensors":
        monkeypatch.setattr(modeling_utils, "safe_save_file", lambda tensors, path, **kwargs: broken(path))
        return
    save = torch.save
    monkeypatch.setattr(
        torch, "save", lambda value, path, *a, **k: broken(path) if str(path).endswith(file) else save(value, path)
    )


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", STATE_FILE])
def test_a_full_disk_costs_only_the_checkpoint_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    def trainer(folder: str, *callbacks: TrainerCallback) -> TransferTrainer:
        args = config(tmp_path / folder, save_strategy="steps", save_steps=2)
        return TransferTrainer(
            model=text_model(), args=args, train_dataset=two_domains(), objectives=terms(), callbacks=list(callbacks)
        )

    class FillDisk(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                fill_disk(monkeypatch, file)

    (whole := trainer("whole")).train()
    with pytest.raises((OSError, TransferError), match=r"[Ff]ree some space") as caught:
        trainer("full", FillDisk()).train()
    monkeypatch.undo()
    assert "checkpoint-4" in str(caught.value)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["checkpoint-2"]
    (resumed := trainer("full")).train(resume_from_checkpoint=True)
    assert_equal(weights(resumed.model), weights(whole.model))


def test_a_checkpoint_cut_short_by_a_kill_is_not_resumed_from(tmp_path: Path) -> None:
    def trainer() -> TransferTrainer:
        args = config(tmp_path, save_strategy="steps", save_steps=2)
        return TransferTrainer(model=text_model(), args=args, train_dataset=rows(), callbacks=[record])

    record = Record()
    (first := trainer()).train()
    whole = weights(first.model)
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"epoch": 0.6')
    record = Record()
    (second := trainer()).train(resume_from_checkpoint=True)
    assert len(record.weights) == 4  # steps 3 to 6
    assert_equal(weights(second.model), whole)


def test_nothing_to_resume_from_is_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-7").mkdir()
    trainer = TransferTrainer(model=text_model(), args=config(tmp_path), train_dataset=rows())
    with pytest.raises(TransferError, match="No valid checkpoint found in output directory"):
        trainer.train(resume_from_checkpoint=True)


# ---- the average of the weights -------------------------------------------------------------------------------------


def closed_form(start: dict, steps: list[dict], decay: float) -> dict[str, torch.Tensor]:
    """decay^n w0 + (1 - decay) sum of decay^(n - i) wi, in float64."""
    n = len(steps)
    return {
        name: decay**n * value.double()
        + (1 - decay) * sum(decay ** (n - i) * step[name].double() for i, step in enumerate(steps, 1))
        for name, value in start.items()
        if value.is_floating_point()
    }


class Scripted:
    """A metric whose values are given in advance; keeps the loss of what was evaluated."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def __call__(self, prediction: Any) -> dict[str, float]:
        return {"score": self.values.pop(0)}


@pytest.mark.parametrize("best", [False, True], ids=["last", "best"])
def test_the_average_is_evaluated_and_kept_but_not_saved(tmp_path: Path, best: bool) -> None:
    model, record, data = text_model(), Record(), rows()
    start = weights(model)
    args = config(
        tmp_path, max_steps=3, ema_decay=0.5, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=best, metric_for_best_model="score",
    )  # fmt: skip
    trainer = TransferTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, callbacks=[record],
        compute_metrics=Scripted(0.1, 0.9, 0.2),
    )  # fmt: skip
    trainer.train()
    inputs = {name: torch.tensor(data[name]) for name in ("input_ids", "labels")}
    other = text_model().eval()
    for step in (1, 2, 3):
        expected = closed_form(start, record.weights[:step], 0.5)
        other.load_state_dict({k: v.float() for k, v in expected.items()}, strict=False)
        with torch.no_grad():
            loss = float(other(**inputs).loss)
        evaluated = next(e for e in trainer.state.log_history if "eval_loss" in e and e["step"] == step)
        assert evaluated["eval_loss"] == pytest.approx(loss, rel=1e-5)
        assert_equal(load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors"), record.weights[step - 1])
    expected = closed_form(start, record.weights[: 2 if best else 3], 0.5)
    for name, value in weights(model).items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


# ---- the configuration ----------------------------------------------------------------------------------------------

WRONG = [
    ("layer_decay", 0.0, r"in \(0, 1\]"),
    ("layer_decay", 1.5, r"in \(0, 1\]"),
    ("head_learning_rate", 0.0, "above 0"),
    ("head_learning_rate", -1e-3, "above 0"),
    ("ema_decay", 0.0, r"in \(0, 1\)"),
    ("ema_decay", 1.0, r"in \(0, 1\)"),
    ("early_stopping_patience", 0, "from 1"),
    ("sampling", "balanced", "random, balanced_classes, balanced_domains"),
    ("lr_scheduler_type", "staircase", "linear.*cosine.*step, multistep"),
]


@pytest.mark.parametrize(("name", "value", "valid"), WRONG)
def test_a_value_out_of_range_is_named_with_the_valid_ones(tmp_path: Path, name: str, value: Any, valid: str) -> None:
    with pytest.raises(TransferError, match=f"{name}={value!r}.*{valid}"):
        config(tmp_path, **{name: value, "eval_strategy": "epoch"})


@pytest.mark.parametrize("options", [{"early_stopping_patience": 1}, {"ema_decay": 0.9, "save_only_model": True}])
def test_options_that_contradict_each_other_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(TransferError, match=next(iter(options))):
        config(tmp_path, **options)


def test_early_stopping_needs_its_evaluations_and_gets_the_best_model(tmp_path: Path) -> None:
    record, data = Record(), rows()
    args = config(
        tmp_path, max_steps=6, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        early_stopping_patience=2, metric_for_best_model="score",
    )  # fmt: skip
    trainer = TransferTrainer(
        model=text_model(), args=args, train_dataset=data, eval_dataset=data, callbacks=[record],
        compute_metrics=Scripted(0.1, 0.9, 0.2, 0.3, 1.0, 1.0),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 4
    assert_equal(weights(trainer.model), record.weights[1])


DECAYS = {
    "step": ({"gamma": 0.5, "step_size": 4}, lambda i: 0.5 ** (i // 4)),
    "step, a share": ({"gamma": 0.1, "step_size": 0.25}, lambda i: 0.1 ** (i // 3)),
    "multistep": ({"gamma": 0.1, "milestones": [0.5, 9]}, lambda i: 0.1 ** ((i >= 6) + (i >= 9))),
    "multistep, as it comes": ({}, lambda i: 0.1 ** ((i >= 6) + (i >= 9))),
}


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("case", DECAYS)
def test_learning_rate_of_every_step(tmp_path: Path, case: str, warmup: int) -> None:
    options, factor = DECAYS[case]
    args = config(
        tmp_path, lr_scheduler_type=case.split(",")[0], lr_scheduler_kwargs=options, warmup_steps=warmup,
        num_train_epochs=2, learning_rate=0.2,
    )  # fmt: skip
    trainer = TransferTrainer(model=text_model(), args=args, train_dataset=rows())
    trainer.train()
    rates = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    ramp = [min(1.0, i / warmup) if warmup else 1.0 for i in range(12)]
    assert rates == pytest.approx([0.2 * ramp[i] * factor(i) for i in range(12)], rel=1e-9)


def test_every_depth_has_its_rate_and_terms_the_heads(tmp_path: Path) -> None:
    model, objectives = text_model(), terms()
    args = config(
        tmp_path, layer_decay=0.5, head_learning_rate=0.1, weight_decay=0.01, lr_scheduler_type="constant", max_steps=1
    )
    trainer = TransferTrainer(model=model, args=args, train_dataset=two_domains(), objectives=objectives)
    trainer.train()
    group_of = {id(p): g for g in trainer.optimizer.param_groups for p in g["params"]}
    rates = {name: group_of[id(p)]["lr"] for name, p in model.named_parameters()}
    assert rates["classifier.weight"] == 0.1
    lower = rates["bert.encoder.layer.0.output.dense.weight"]
    assert rates["bert.encoder.layer.1.output.dense.weight"] == pytest.approx(2 * lower)
    assert rates["bert.embeddings.word_embeddings.weight"] == pytest.approx(lower / 2)
    assert group_of[id(model.classifier.bias)]["weight_decay"] == 0.0
    owned = list(objectives[1].parameters())
    assert owned
    assert {group_of[id(p)]["lr"] for p in owned} == {0.1}


def test_what_an_optimizer_of_ones_own_would_leave_out_is_refused(tmp_path: Path) -> None:
    model = text_model()
    mine = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"model": model, "args": config(tmp_path), "optimizers": (mine, None)}
    with pytest.raises(TransferError, match="optimizer_cls_and_kwargs"):
        TransferTrainer(**options, train_dataset=two_domains(), objectives=terms())
    trainer = TransferTrainer(**options, train_dataset=rows(), objectives=[CrossEntropy()])  # owns nothing
    trainer.train()
    assert trainer.optimizer.param_groups[0]["params"] == mine.param_groups[0]["params"]


# ---- what does not go together --------------------------------------------------------------------------------------


def test_label_smoothing_belongs_to_the_term(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match=r"CrossEntropy\(label_smoothing=0.1\)"):
        TransferTrainer(
            model=text_model(), args=config(tmp_path, label_smoothing_factor=0.1), objectives=[CrossEntropy()]
        )


def test_objectives_and_a_loss_function_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="objectives or compute_loss_func, not both"):
        TransferTrainer(
            model=text_model(), args=config(tmp_path), objectives=[CrossEntropy()], compute_loss_func=lambda *a: 0
        )


def test_a_model_without_anything_to_train_is_refused(tmp_path: Path) -> None:
    model = text_model().requires_grad_(False)
    with pytest.raises(TransferError, match="every parameter is frozen"):
        TransferTrainer(model=model, args=config(tmp_path), train_dataset=rows()).train()


# ---- evaluation, logs -----------------------------------------------------------------------------------------------


class Strict(BertForSequenceClassification):
    """Takes what it knows, as many a model does, and nothing more."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        return super().forward(input_ids=input_ids, labels=labels)


@pytest.mark.parametrize("objectives", [None, terms], ids=["no terms", "terms"])
def test_rows_without_labels_are_predicted(tmp_path: Path, objectives: Any) -> None:
    model = Strict(text_model().config)
    trainer = TransferTrainer(model=model, args=config(tmp_path), objectives=objectives() if objectives else None)
    data = two_domains().remove_columns("labels")
    predicted = trainer.predict(data)
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.tensor(data["input_ids"])).logits
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), expected)
    assert predicted.label_ids is None
    assert "test_loss" not in predicted.metrics


def test_evaluation_loss_is_that_of_the_terms_that_say_so(tmp_path: Path) -> None:
    """The supervised terms with their weights: not the penalties, not the adversary."""
    objectives = [CrossEntropy(weight=2.0), DANN(weight=5.0), L2SP(weight=7.0)]
    model, data = text_model(), rows()
    trainer = TransferTrainer(model=model, args=config(tmp_path), objectives=objectives)
    found = trainer.evaluate(data)["eval_loss"]
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor(data["input_ids"])).logits
    expected = nn.functional.cross_entropy(logits.double(), torch.tensor(data["labels"]))
    assert found == pytest.approx(2 * float(expected), rel=1e-5)


class Constant(Objective):
    """A term of a known value that couples the batch, of weight 0.25."""

    def __init__(self) -> None:
        super().__init__(weight=0.25)
        self.seen = 0

    def forward(self, step: Any) -> torch.Tensor:
        self.seen += 1
        return step.logits.new_tensor(float(self.seen))


def test_terms_are_logged_as_means_over_what_was_accumulated(tmp_path: Path) -> None:
    args = config(tmp_path, gradient_accumulation_steps=3, logging_steps=2, eval_strategy="steps", eval_steps=1)
    data = rows()
    trainer = TransferTrainer(
        model=text_model(), args=args, train_dataset=data, eval_dataset=data, objectives=[CrossEntropy(), Constant()]
    )
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    assert entry["constant"] == pytest.approx(3.5)  # micro-batches 1 to 6; evaluations between them do not count
    assert entry["loss"] == pytest.approx(entry["cross_entropy"] + 0.25 * entry["constant"], rel=1e-5)


def test_a_term_is_summed_though_the_next_step_writes_over_it(tmp_path: Path) -> None:
    """As a CUDA graph does with what it gave before."""
    trainer = TransferTrainer(model=text_model(), args=config(tmp_path), train_dataset=rows())
    trainer._term_sums, value = {}, torch.tensor(1.0)
    for step in (1.0, 2.0, 3.0):
        value.fill_(step)
        trainer._add_terms({"term": value})
    assert trainer._term_sums["term"] == 6.0


def test_metrics_stream_over_batches(tmp_path: Path) -> None:
    data, model = rows(), text_model()
    args = config(tmp_path, batch_eval_metrics=True, per_device_eval_batch_size=5)
    metrics = compute_metrics_for("text-classification", CLASSES)
    trainer = TransferTrainer(model=model, args=args, objectives=[CrossEntropy()], compute_metrics=metrics)
    with torch.no_grad():
        predicted = model.eval()(input_ids=torch.tensor(data["input_ids"])).logits.argmax(dim=1)
    accuracy = (predicted == torch.tensor(data["labels"])).double().mean()
    for _ in range(2):  # nothing is carried over
        assert trainer.evaluate(data)["eval_accuracy"] == pytest.approx(float(accuracy))


def test_a_library_logs_and_does_not_print(
    tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="hf_transfer"):
        TransferTrainer(model=text_model(), args=config(tmp_path, max_steps=1), train_dataset=rows()).train()
    assert capsys.readouterr().out == ""
    assert "'loss'" in caplog.text
    assert "trainable" in caplog.text  # the plan: what trains


# ---- data -----------------------------------------------------------------------------------------------------------


def test_balanced_sampling_reaches_the_loader(tmp_path: Path) -> None:
    data = rows(n=12).remove_columns("labels").add_column("labels", [0] * 9 + [1] * 2 + [2])
    args = config(tmp_path, sampling="balanced_classes", per_device_train_batch_size=3)
    trainer = TransferTrainer(model=text_model(), args=args, train_dataset=data)
    assert all(sorted(batch["labels"].tolist()) == [0, 1, 2] for batch in trainer.get_train_dataloader())

    mixed = rows(n=12).add_column("domain", [0] * 9 + [1] * 3)
    args = config(tmp_path, sampling="balanced_domains", per_device_train_batch_size=4)
    trainer = TransferTrainer(model=text_model(), args=args, train_dataset=mixed, objectives=terms())
    assert all(batch["domain"].float().mean() == 0.5 for batch in trainer.get_train_dataloader())
    trainer.train()


def test_balanced_sampling_of_a_stream_is_refused(tmp_path: Path) -> None:
    args = config(tmp_path, sampling="balanced_classes", max_steps=1)
    with pytest.raises(TransferError, match="streams"):
        TransferTrainer(model=text_model(), args=args, train_dataset=rows().to_iterable_dataset())


def test_columns_that_a_transform_needs_are_kept(tmp_path: Path) -> None:
    raw = rows("image").rename_column("pixel_values", "raw").add_column("path", ["x"] * ROWS)

    def load(batch: dict[str, list]) -> dict[str, Any]:
        pixels = torch.tensor(batch["raw"])
        return {"pixel_values": list(pixels), "labels": batch["labels"], "example_id": batch["example_id"]}

    states = []
    for data in (raw.with_transform(load), rows("image")):
        trainer = TransferTrainer(model=image_model(), args=config(tmp_path), train_dataset=data)
        trainer.train()
        states.append(weights(trainer.model))
    assert_equal(*states)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_reads_the_dataset_it_is_given(tmp_path: Path, workers: int) -> None:
    """Persistent workers are kept by the Trainer; they must not answer for another dataset."""
    own, other = rows(n=8), rows(n=4)
    args = config(tmp_path, dataloader_num_workers=workers, dataloader_persistent_workers=bool(workers))
    trainer = TransferTrainer(model=text_model(), args=args, eval_dataset=own)
    assert [len(trainer.get_eval_dataloader(data).dataset) for data in (None, other, None, own)] == [8, 4, 8, 8]
    if workers:
        assert trainer.get_eval_dataloader() is trainer.get_eval_dataloader(own)


class LineConfig(PreTrainedConfig):
    model_type = "line"


class Line(PreTrainedModel):
    """Nothing but a parameter."""

    config_class = LineConfig

    def __init__(self, config: LineConfig) -> None:
        super().__init__(config)
        self.slope = nn.Parameter(torch.zeros(()))
        self.post_init()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.slope * x - labels).square().mean()}


def test_a_model_without_layers_trains(tmp_path: Path) -> None:
    """There is no map of it, and none is needed."""
    data = Dataset.from_dict({"x": [1.0, 2.0] * 8, "labels": [3.0, 6.0] * 8})
    args = config(tmp_path, learning_rate=0.2, optim="sgd", num_train_epochs=5, lr_scheduler_type="constant")
    trainer = TransferTrainer(model=Line(LineConfig()), args=args, train_dataset=data)
    trainer.train()
    assert math.isclose(float(trainer.model.slope.detach()), 3.0, rel_tol=1e-3)


def test_trainer_state_is_the_trainers(tmp_path: Path) -> None:
    args = config(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    TransferTrainer(model=text_model(), args=args, train_dataset=two_domains(), objectives=terms()).train()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert {"loss", "grad_norm", "learning_rate", "cross_entropy", "dann", "l2sp"} <= set(state["log_history"][0])


# ---- what a step costs no more -------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [None, [CrossEntropy()]], ids=["own loss", "terms"])
def test_floating_point_operations_are_those_the_trainer_counts(tmp_path: Path, terms: Any) -> None:
    stock = Trainer(
        model=text_model(), args=config(tmp_path / "stock"), train_dataset=rows().remove_columns("example_id")
    )
    stock.train()
    ours = TransferTrainer(model=text_model(), args=config(tmp_path / "ours"), train_dataset=rows(), objectives=terms)
    ours.train()
    assert ours.state.total_flos == stock.state.total_flos > 0


def test_what_only_the_stock_step_knows_is_left_to_it_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainers = []
    for name, options in (("ours", {}), ("stock", {"torch_empty_cache_steps": 1})):
        trainer = TransferTrainer(
            model=text_model(), args=config(tmp_path / name, **options), train_dataset=rows(),
            objectives=[CrossEntropy()],
        )  # fmt: skip
        with caplog.at_level(logging.INFO, logger="hf_transfer.trainer"):
            trainer.train()
        assert ("stock Trainer's step runs, because of torch_empty_cache_steps" in caplog.text) is (name == "stock")
        trainers.append(trainer)
    assert_equal(weights(trainers[0].model), weights(trainers[1].model))


def test_a_batch_that_is_on_the_device_is_not_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import data_loader

    trainer = TransferTrainer(model=text_model(), args=config(tmp_path), train_dataset=rows())
    assert set(trainer._prepare_inputs({"labels": [torch.zeros(1)]})) == {"labels"}  # by the Trainer's way
    monkeypatch.setattr(data_loader, "send_to_device", None)  # calls would fail
    monkeypatch.setattr(Trainer, "_prepare_input", None)
    batch = next(iter(trainer.get_train_dataloader()))
    found = trainer._prepare_inputs(batch)
    assert all(found[name] is value for name, value in batch.items()) and len(found) == len(batch) > 2
    found.clear()  # what follows may take out what it read
    assert batch
    with pytest.raises(TypeError):
        trainer._prepare_inputs({"labels": [torch.zeros(1)]})
    with pytest.raises(TypeError):
        trainer._prepare_inputs({"labels": torch.zeros(1, device="meta")})


class Switching(TrainerCallback):
    """Puts the model in eval mode, or only its last layer."""

    def __init__(self, part: str) -> None:
        self.part, self.modes = part, []  # type: ignore[var-annotated]

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.get_submodule(self.part).eval()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.modes.append(all(module.training for module in model.modules()))


@pytest.mark.parametrize("part", ["", "classifier", "bert.encoder.layer.1.output.dropout"])
def test_training_is_in_train_mode_whatever_a_callback_switched(tmp_path: Path, part: str) -> None:
    switching = Switching(part)
    trainer = TransferTrainer(
        model=text_model(), args=config(tmp_path), train_dataset=rows(), objectives=[CrossEntropy()],
        callbacks=[switching],
    )  # fmt: skip
    trainer.train()
    assert switching.modes == [True] * STEPS_AN_EPOCH


@pytest.mark.parametrize("bad", [0, 1])
def test_a_bad_loss_amid_an_accumulation_stops_before_the_step(tmp_path: Path, bad: int) -> None:
    class Spoiling(TransferTrainer):
        seen = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.seen += 1
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.seen == bad + 1 else loss

    args = config(tmp_path, gradient_accumulation_steps=2, train_sampling_strategy="sequential")
    trainer = Spoiling(model=text_model(), args=args, train_dataset=rows(), objectives=[CrossEntropy()])
    before = weights(trainer.model)
    first = 1000 + 4 * bad
    with pytest.raises(NonFiniteLoss, match=rf"step 0.*\[{first}, {first + 1}, {first + 2}, {first + 3}\]"):
        trainer.train()
    assert_equal(weights(trainer.model), before)


def test_streamed_metrics_do_not_empty_a_gpus_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[None] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(None))
    metrics = compute_metrics_for("text-classification", 3)
    args = config(tmp_path, batch_eval_metrics=True, per_device_eval_batch_size=4)
    trainer = TransferTrainer(
        model=text_model(), args=args, eval_dataset=rows(), compute_metrics=metrics, objectives=[CrossEntropy()]
    )
    assert "eval_accuracy" in trainer.evaluate() and not emptied
    assert trainer.args.batch_eval_metrics  # as it was


def test_streamed_metrics_are_those_the_trainer_gathers(tmp_path: Path) -> None:
    args = config(tmp_path, batch_eval_metrics=True, per_device_eval_batch_size=5)
    trainer = TransferTrainer(
        model=text_model(), args=args, eval_dataset=rows(), objectives=[CrossEntropy()],
        compute_metrics=compute_metrics_for("text-classification", CLASSES),
    )  # fmt: skip
    streamed = trainer.evaluate()
    trainer.preprocess_logits_for_metrics = lambda logits, labels: logits  # the Trainer's own way then
    gathered = trainer.evaluate()
    timings = ("runtime", "per_second", "preparation_time")
    for found in (streamed, gathered):
        for name in [name for name in found if name.endswith(timings)]:
            del found[name]
    assert streamed == gathered and "eval_macro_f1" in streamed


# ---- frozen layers that stay live -----------------------------------------------------------------------------------


def test_no_graph_is_built_below_what_trains_and_statistics_stay(tmp_path: Path) -> None:
    from hf_transfer import PartialFreeze, load_backbone

    torch.manual_seed(0)
    model = load_backbone("test_resnet", labels=["a", "b", "c"], pretrained=False, image_size=32).model
    PartialFreeze(1).apply(model)
    graphs: dict[str, bool] = {}
    for name, module in model.named_modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(
                lambda module, args, output, name=name: graphs.__setitem__(name, output.requires_grad)
            )
    frozen = {n for n, m in model.named_modules() if not any(p.requires_grad for p in m.parameters())}
    held = {name: value.clone() for name, value in model.named_buffers() if name.rpartition(".")[0] in frozen}
    data = Dataset.from_dict({"pixel_values": torch.randn(8, 3, 32, 32).tolist(), "labels": [0, 1] * 4})
    trainer = TransferTrainer(model=model, args=config(tmp_path), train_dataset=data, objectives=[CrossEntropy()])
    trainer.train()
    order = list(graphs)
    built = [graphs[name] for name in order]
    assert not built[0] and built[-1]
    below = order[: built.index(True)]
    assert len(below) > len(order) // 3
    assert not any(parameter.requires_grad for name in below for parameter in model.get_submodule(name).parameters())
    assert_equal(dict(model.named_buffers()), {**dict(model.named_buffers()), **held})
    assert any("running_mean" in name for name in held)


@pytest.mark.parametrize("tuning", ["lora", "probe"])
def test_an_input_with_a_gradient_or_adapters_keep_theirs(tuning: str) -> None:
    from hf_transfer import LinearProbe

    model = (LoRA() if tuning == "lora" else LinearProbe()).apply(image_model()).train()
    images = torch.randn(2, 3, 8, 8, requires_grad=tuning == "probe")
    model(pixel_values=images).logits.sum().backward()
    if tuning == "probe":  # a frozen network is a function of its input still
        assert images.grad is not None and images.grad.any()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
