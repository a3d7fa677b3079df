"""finetune(): every tuning and task on tiny random networks; what the Result and the run folder hold."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny_runs as tiny
import torch
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    TrainerCallback,
    set_seed,
)

from hf_transfer import GradualUnfreeze, LoRA, Peft, TransferError, TransferTrainer, finetune, load_backbone, merge
from hf_transfer.adapters import is_adapted
from hf_transfer.data.columns import infer
from hf_transfer.data.transforms import prepare
from hf_transfer.hub.leaks import local_paths
from hf_transfer.objectives import L2SP, CrossEntropy

TUNINGS = ("full", "linear_probe", "partial", "gradual", "bitfit", "lora")
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TOKENS = {"input_ids": torch.tensor([[2, 4, 5, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random checkpoints of every modality."""
    home = tmp_path_factory.mktemp("bases")
    return {
        "test_resnet": tiny.image_backbone(home / "resnet"),
        "test_vit": tiny.image_backbone(home / "vit", "test_vit"),
        "bert": tiny.text_backbone(home / "bert"),
        "gpt2": tiny.language_model(home / "gpt2"),
        "wav2vec2": tiny.wav2vec2(home / "wav2vec2"),
        "ast": tiny.spectrogram_transformer(home / "ast"),
    }


def run(model: Any, data: Any, folder: Path, **options: Any) -> Any:
    return finetune(model, data, output_dir=folder, **{**tiny.QUICK, **options})


def reloaded(auto_class: Any, folder: Path) -> Any:
    """The run folder's model, as a user without this package loads it."""
    if (folder / "adapter_config.json").is_file():
        config = AutoConfig.from_pretrained(folder, subfolder="model_config")
        return auto_class.from_pretrained(folder, config=config, ignore_mismatched_sizes=True).eval()
    return auto_class.from_pretrained(folder).eval()


def assert_same_logits(result: Any, auto_class: Any, **inputs: torch.Tensor) -> None:
    expected = tiny.logits(result.model, **inputs)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(tiny.logits(reloaded(auto_class, result.folder), **inputs), expected)


def assert_same_images(result: Any) -> None:
    assert_same_logits(result, AutoModelForImageClassification, pixel_values=IMAGES)


# ---- tunings and tasks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("tuning", TUNINGS)
def test_every_tuning_by_name(bases: Any, tmp_path: Path, network: str, tuning: str) -> None:
    epochs = 3 if tuning == "gradual" else 1  # a phase's first step has rate 0
    result = run(bases[network], tiny.digits(), tmp_path / "run", tuning=tuning, num_train_epochs=epochs)
    assert_same_images(result)
    start = load_backbone(bases[network], labels=result.backbone.labels).model.state_dict()
    anatomy = result.backbone.anatomy
    now = dict(result.model.named_parameters())
    body = [name for name in now if name in start and anatomy.group(name) < anatomy.depth + 2]
    moved = [name for name in body if not torch.equal(now[name].detach(), start[name])]
    if tuning == "lora":
        assert is_adapted(result.model)
    else:
        assert bool(moved) == (tuning != "linear_probe")
        assert (len(moved) == len(body)) == (tuning in ("full", "gradual"))
    written = tiny.results(tmp_path / "run")
    assert written["tuning"] == tuning
    assert written["trainable_parameters"] == result.plan.trainable
    assert (result.plan.trainable < result.plan.total) == (tuning not in ("full", "gradual"))


def test_digits_by_name_from_scratch(tmp_path: Path) -> None:
    sizes = {"image_size": 32, "max_train_samples": 60, "max_eval_samples": 40}
    result = run("test_resnet", "digits", tmp_path / "run", pretrained=False, **sizes)
    assert result.facts["counts"] == {"train": 60, "validation": 40, "test": 40}
    assert result.backbone.labels == [str(digit) for digit in range(10)]
    assert "held out of train" in result.facts["selection"]
    assert "from scratch" in (tmp_path / "run/README.md").read_text()


TEXT_TASKS = {
    "string labels": (tiny.sentences, AutoModelForSequenceClassification, ["bad", "good"], "accuracy"),
    "pairs": (tiny.pairs, AutoModelForSequenceClassification, ["same", "other", "neither"], "accuracy"),
    "one number": (tiny.ratings, AutoModelForSequenceClassification, None, "mse"),
    "two numbers": (lambda: tiny.ratings(outputs=2), AutoModelForSequenceClassification, None, "mse"),
    "tags": (tiny.tagged_words, AutoModelForTokenClassification, ["O", "B-place", "I-place"], "entity_f1"),
}


@pytest.mark.parametrize("kind", TEXT_TASKS)
def test_text(bases: Any, tmp_path: Path, kind: str) -> None:
    data, auto_class, labels, metric = TEXT_TASKS[kind]
    result = run(bases["bert"], data(), tmp_path / "run", learning_rate=1e-3)
    assert result.backbone.labels == labels
    assert metric in result.metrics["validation"]
    assert_same_logits(result, auto_class, **TOKENS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer("the film")["input_ids"] == tiny.tokenizer()("the film")["input_ids"]


def test_second_text_of_a_pair_is_read(bases: Any, tmp_path: Path) -> None:
    """The class is in the second text alone: only a network that gets it learns it."""
    rows = 64
    columns = {
        "sentence1": ["the film was"] * rows,
        "sentence2": [("great", "dull")[i % 2] for i in range(rows)],
        "label": [("good", "bad")[i % 2] for i in range(rows)],
    }
    split = datasets.Dataset.from_dict(columns)
    options = {"learning_rate": 3e-2, "num_train_epochs": 8, "save_strategy": "no"}
    result = run(bases["bert"], {"train": split, "validation": split}, tmp_path / "run", **options)
    assert result.metrics["validation"]["accuracy"] == 1.0


def test_language_modelling(bases: Any, tmp_path: Path) -> None:
    data = tiny.sentences().remove_columns("label")
    result = run(bases["gpt2"], data, tmp_path / "run", task="causal-lm", learning_rate=3e-2, num_train_epochs=3)
    assert result.backbone.task == "causal-lm" and result.backbone.labels is None
    losses = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert_same_logits(result, AutoModelForCausalLM, **TOKENS)


@pytest.mark.parametrize("network", ["wav2vec2", "ast"])
def test_audio(bases: Any, tmp_path: Path, network: str) -> None:
    pytest.importorskip("soundfile")
    result = run(bases[network], tiny.tones(), tmp_path / "run", max_length=1, learning_rate=1e-3)
    shape = (2, 64, 16) if network == "ast" else (2, 3200)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert_same_logits(result, AutoModelForAudioClassification, input_values=inputs)
    assert result.backbone.labels == ["l", "h"]
    assert (tmp_path / "run/preprocessor_config.json").is_file()


def test_lora_as_an_object(bases: Any, tmp_path: Path) -> None:
    result = run(bases["bert"], tiny.sentences(), tmp_path / "run", tuning=LoRA(r=3, targets="attention"))
    assert is_adapted(result.model)
    assert_same_logits(result, AutoModelForSequenceClassification, **TOKENS)
    written = tiny.results(tmp_path / "run")
    assert written["tuning"] == "lora" and "r=3" in written["tuning_settings"]
    assert written["training_arguments"]["learning_rate"] == 1e-3  # recommended for LoRA on text, not for "full"


def test_any_peft_config(bases: Any, tmp_path: Path) -> None:
    from peft import IA3Config

    config = IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"])
    result = run(bases["bert"], tiny.sentences(), tmp_path / "run", tuning=Peft(config))
    assert is_adapted(result.model)
    assert_same_logits(result, AutoModelForSequenceClassification, **TOKENS)
    written = tiny.results(tmp_path / "run")
    assert written["tuning"] == "Peft" and "IA3" in written["tuning_settings"]


def test_passed_backbone_is_the_one_that_trains(bases: Any, tmp_path: Path) -> None:
    backbone = load_backbone(bases["test_resnet"], labels=[str(digit) for digit in range(10)])
    model, before = backbone.model, {k: v.clone() for k, v in backbone.model.state_dict().items()}
    result = run(backbone, tiny.digits(), tmp_path / "run")
    assert result.model is model
    name = "timm_model.fc.weight"
    assert not torch.equal(model.state_dict()[name], before[name])
    assert result.facts["model"] == "resnet"


def test_passed_backbone_gets_the_same_adapter_each_time(bases: Any, tmp_path: Path) -> None:
    def trained(folder: str, draws: int) -> dict[str, torch.Tensor]:
        backbone = load_backbone(bases["test_vit"], labels=["0", "1", "2"])
        backbone.model.timm_model.head.weight.data.fill_(0.1)
        torch.randn(draws)  # the global generator stands elsewhere each time
        data = tiny.digits(classes=["0", "1", "2"])
        return run(backbone, data, tmp_path / folder, tuning=LoRA(r=2), seed=3).model.state_dict()

    first, second = trained("a", 1), trained("b", 2)
    assert all(torch.equal(second[name], value) for name, value in first.items())


# ---- what a run leaves ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(bases: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    options = {"seed": 7, "label_smoothing_factor": 0.1, "lr_scheduler_type": "linear", "run_name": "/home/me/secret"}
    data = tiny.parquet_folder(tiny.digits(), tmp_path_factory.mktemp("data") / "my_digits")
    folder = tmp_path_factory.mktemp("runs") / "my-run"
    return run(bases["test_resnet"], data, folder, tuning="partial", train_blocks=1, **options)


def test_result(finished: Any) -> None:
    assert set(finished.metrics) == {"validation", "test"}
    assert {"accuracy", "balanced_accuracy", "macro_f1", "loss"} <= set(finished.metrics["test"])
    assert "runtime" not in finished.metrics["test"]
    assert finished.model is finished.backbone.model
    assert finished.plan.trainable == sum(p.numel() for p in finished.model.parameters() if p.requires_grad)
    assert finished.plan.total == sum(p.numel() for p in finished.model.parameters())
    evaluated = [entry["eval_accuracy"] for entry in finished.history if "eval_accuracy" in entry]
    assert evaluated == [finished.metrics["validation"]["accuracy"]]


def test_results_json(finished: Any) -> None:
    written = tiny.results(finished.folder)
    assert written["metrics"] == finished.metrics
    assert written["model"] == "resnet" and written["data"]["name"] == "my_digits"
    assert re.fullmatch("[0-9a-f]{16}", written["data"]["fingerprint"])
    # a tenth of the rows is held out of train where there is no validation split
    assert written["counts"] == {"train": 54, "validation": 6, "test": 40}
    plan = finished.plan
    assert (written["trainable_parameters"], written["total_parameters"]) == (plan.trainable, plan.total)
    assert written["seed"] == 7 and written["steps"] == 3 and written["processes"] == 1
    assert written["selection"].startswith("The last step; nothing was selected (validation: 6 rows")
    assert 0 < written["seconds"]["train"] <= written["seconds"]["total"]
    assert {"python", "torch", "transformers", "timm", "hf-transfer-learning"} <= set(written["versions"])
    assert written["options"] == {"train_blocks": 1}
    assert written["objectives"] == ["cross_entropy"]
    used = written["training_arguments"]
    assert used["label_smoothing_factor"] == 0.1 and used["lr_scheduler_type"] == "linear"
    assert used["learning_rate"] == 1e-3 and used["num_train_epochs"] == 1


def test_card(finished: Any) -> None:
    card = (finished.folder / "README.md").read_text()
    for said in ("# my-run", "`partial`", "`0`, `1`, `2`", "| `learning_rate` | `0.001` |", "nothing was selected"):
        assert said in card, said
    assert f"Trained {finished.plan.trainable:,} of {finished.plan.total:,} parameters" in card


def test_nothing_local_in_card_and_results(finished: Any) -> None:
    for name in ("README.md", "results.json"):
        text = (finished.folder / name).read_text()
        assert local_paths(text) == [], name
        assert str(finished.folder.parent) not in text


def test_names_from_the_command_line_read_as_words(bases: Any, tmp_path: Path) -> None:
    """The command line gives members of transformers' enumerations."""
    from transformers.trainer_utils import IntervalStrategy, SchedulerType

    options = {"lr_scheduler_type": SchedulerType.COSINE, "eval_strategy": IntervalStrategy.EPOCH}
    result = run(bases["test_vit"], tiny.digits(), tmp_path / "run", **options)
    assert result.facts["training_arguments"]["lr_scheduler_type"] == "cosine"
    card = (tmp_path / "run/README.md").read_text()
    assert "| `lr_scheduler_type` | `cosine` |" in card and "| `eval_strategy` | `epoch` |" in card


def test_save_writes_the_run_elsewhere(finished: Any, tmp_path: Path) -> None:
    finished.save(tmp_path / "copy")
    assert tiny.results(tmp_path / "copy") == tiny.results(finished.folder)
    assert "# copy" in (tmp_path / "copy/README.md").read_text()
    model = reloaded(AutoModelForImageClassification, tmp_path / "copy")
    expected = tiny.logits(finished.model, pixel_values=IMAGES)
    torch.testing.assert_close(tiny.logits(model, pixel_values=IMAGES), expected)


def test_metric_that_is_no_number_is_null(bases: Any, tmp_path: Path) -> None:
    """A sum of terms of which none is part of the evaluation has no loss there."""
    options = {"objectives": [L2SP()], "save_strategy": "no"}
    result = run(bases["test_vit"], tiny.digits(), tmp_path / "run", **options)
    assert np.isnan(result.metrics["test"]["loss"])
    text = (tmp_path / "run/results.json").read_text()
    written = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert written["metrics"]["test"]["loss"] is None and 0 <= written["metrics"]["test"]["accuracy"] <= 1


def test_same_seed_same_result_other_seed_other(bases: Any, tmp_path: Path) -> None:
    def head(folder: str, seed: int) -> torch.Tensor:
        result = run(bases["test_vit"], tiny.digits(), tmp_path / folder, seed=seed)
        return result.model.state_dict()["timm_model.head.weight"]

    first = head("a", 0)
    assert torch.equal(head("b", 0), first)
    assert not torch.equal(head("c", 1), first)


# ---- from one run to the next ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_second_fine_tune_with_new_labels(bases: Any, tmp_path: Path, tuning: str) -> None:
    data = tiny.digits(classes=["0", "1", "2", "3"])
    first = run(bases["test_vit"], data, tmp_path / "first", tuning=tuning, learning_rate=1e-2)
    name = "timm_model.blocks.0.attn.qkv.weight"
    learned = merge(load_backbone(first.folder).model).state_dict()[name]
    assert not torch.equal(learned, load_backbone(bases["test_vit"]).model.state_dict()[name])
    again = run(first.folder, tiny.digits(classes=["7", "5"]), tmp_path / "second", tuning="linear_probe")
    assert again.backbone.labels == ["7", "5"]
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "second")
    assert model.config.id2label == {0: "7", 1: "5"} and model.config.label2id == {"7": 0, "5": 1}
    saved = json.loads((tmp_path / "second/config.json").read_text())
    assert saved["label_names"] == ["7", "5"] and saved["num_classes"] == 2
    assert_same_images(again)
    torch.testing.assert_close(model.state_dict()[name], learned, rtol=0, atol=1e-6)  # what was learned first is kept


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_second_fine_tune_with_as_many_other_labels(
    bases: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, tuning: str
) -> None:
    """The head that the second run starts from: without a learning rate it is the one that is saved."""
    first = run(bases["test_vit"], tiny.digits(classes=["3", "8"]), tmp_path / "first", tuning=tuning)
    trained = merge(first.model).timm_model.head if tuning == "lora" else first.model.timm_model.head

    def start(folder: str, *classes: str) -> torch.nn.Linear:
        options = {"tuning": "linear_probe", "learning_rate": 1e-30, "weight_decay": 0.0}
        result = run(first.folder, tiny.digits(classes=classes), tmp_path / folder, **options)
        assert result.backbone.labels == list(classes) and result.backbone.renamed_from is None
        assert_same_images(result)
        return result.model.timm_model.head

    same, turned = start("same", "3", "8"), start("turned", "8", "3")
    assert torch.equal(same.weight, trained.weight) and torch.equal(same.bias, trained.bias)
    assert torch.equal(turned.weight, trained.weight.flip(0)) and torch.equal(turned.bias, trained.bias.flip(0))
    assert "head of" not in caplog.text
    with caplog.at_level(logging.INFO, logger="hf_transfer"):
        new = start("new", "3", "5")
    assert f"The head of {first.folder} is new: the checkpoint's was for other classes, 3, 8." in caplog.text
    for row in trained.weight:
        assert torch.cosine_similarity(new.weight, row[None]).abs().max() < 0.5
    assert new.bias.abs().max() < 1e-20 and 0.01 < new.weight.std() < 0.03  # as transformers starts it
    assert torch.equal(start("again", "3", "5").weight, new.weight)


def test_adapter_on_an_adapter_is_refused_with_a_way_out(bases: Any, tmp_path: Path) -> None:
    run(bases["test_vit"], tiny.digits(), tmp_path / "first", tuning="lora")
    with pytest.raises(TransferError, match=r"is an adapter.*merge\(backbone.model\)"):
        run(tmp_path / "first", tiny.digits(), tmp_path / "second", tuning="lora")
    backbone = load_backbone(tmp_path / "first")
    backbone.model = merge(backbone.model)  # as the message says
    backbone.save(tmp_path / "merged")
    assert_same_images(run(tmp_path / "merged", tiny.digits(), tmp_path / "second", tuning="lora"))


def test_running_again_into_the_same_folder(bases: Any, tmp_path: Path) -> None:
    run(bases["test_vit"], tiny.digits(), tmp_path / "run", tuning="lora")
    assert_same_images(run(bases["test_vit"], tiny.digits(), tmp_path / "run", tuning="lora", seed=1))


class Killed(Exception):
    """A run that was killed."""


@contextmanager
def killed_at(step: int, phase: int) -> Iterator[None]:
    """The Trainer of that phase dies before that step."""

    class Kill(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise Killed

    made = []
    build = TransferTrainer.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        made.append(self)
        if len(made) == phase:
            self.add_callback(Kill())

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TransferTrainer, "__init__", __init__)
        yield


@pytest.mark.parametrize(("tuning", "phase"), [("full", 1), ("lora", 1), ("gradual", 2)])
def test_resume_equals_the_uninterrupted_run(bases: Any, tmp_path: Path, tuning: str, phase: int) -> None:
    options = {"tuning": tuning, "num_train_epochs": 6 if tuning == "gradual" else 2}
    whole = run(bases["test_resnet"], tiny.digits(), tmp_path / "whole", **options)
    with killed_at(4, phase):
        run(bases["test_resnet"], tiny.digits(), tmp_path / "run", **options)
    assert not (tmp_path / "run/results.json").exists()
    resumed = run(bases["test_resnet"], tiny.digits(), tmp_path / "run", resume_from_checkpoint="true", **options)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert resumed.metrics == whole.metrics
    assert resumed.facts["steps"] == whole.facts["steps"]


def test_resume_at_a_named_checkpoint(bases: Any, tmp_path: Path) -> None:
    options = {"num_train_epochs": 2, "save_total_limit": 2}
    whole = run(bases["test_vit"], tiny.digits(), tmp_path / "whole", **options)
    named = shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "run/checkpoint-3")
    resumed = run(bases["test_vit"], tiny.digits(), tmp_path / "run", resume_from_checkpoint=str(named), **options)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert len([entry for entry in resumed.history if "eval_accuracy" in entry]) == 2


# ---- gradual unfreezing ---------------------------------------------------------------------------------------------


def test_gradual_shares_out_the_epochs(bases: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hf_transfer"):
        result = run(bases["test_vit"], tiny.digits(), tmp_path / "run", tuning="gradual", num_train_epochs=3)
    assert result.facts["steps"] == 9  # 3 epochs of 3 steps, an epoch a phase
    states = sorted(tmp_path.glob("run/phase-*/*/trainer_state.json"))
    assert [json.loads(path.read_text())["global_step"] for path in states] == [3, 3, 3]
    trained = [int(count.replace(",", "")) for count in re.findall(r"^all +([\d,]+)", caplog.text, re.MULTILINE)]
    assert len(trained) == 3 and trained == sorted(set(trained))  # each phase trains more than the one before
    assert len([entry for entry in result.history if "train_runtime" in entry]) == 3


def test_gradual_with_max_steps_and_phases_of_ones_own(bases: Any, tmp_path: Path) -> None:
    options = {"tuning": GradualUnfreeze([0, 1, "all"]), "max_steps": 6, "save_strategy": "no"}
    result = run(bases["test_vit"], tiny.digits(), tmp_path / "run", **options)
    assert result.facts["steps"] == 6 and result.facts["tuning"] == "gradual"


# ---- objectives and data options ------------------------------------------------------------------------------------


def test_objectives(bases: Any, tmp_path: Path) -> None:
    terms = [CrossEntropy(), L2SP(weight=0.1)]
    result = run(bases["test_resnet"], tiny.digits(), tmp_path / "run", objectives=terms, logging_steps=1)
    log = [entry for entry in result.history if "l2sp" in entry]
    assert len(log) == 3 and log[-1]["l2sp"] > 0
    assert log[-1]["loss"] == pytest.approx(log[-1]["cross_entropy"] + 0.1 * log[-1]["l2sp"], rel=1e-4)
    assert result.facts["objectives"] == ["cross_entropy", "l2sp"]


def uneven_digits() -> datasets.Dataset:
    """24 zeros and 4 ones."""
    rows = tiny.digits(classes=["0", "1"])["train"]
    labels = np.asarray(rows["label"])
    return rows.select([*np.flatnonzero(labels == 0)[:24], *np.flatnonzero(labels == 1)[:4]])


def losses_by_class(base: Path, rows: datasets.Dataset) -> list[np.ndarray]:
    """The cross-entropy of each row under the network as finetune() starts it."""
    set_seed(42)
    backbone = load_backbone(base, labels=["0", "1"])
    losses: list[list[float]] = [[], []]
    for row in prepare(rows, backbone, infer(rows), train=False):
        logits = tiny.logits(backbone.model, pixel_values=row["pixel_values"][None]).double()
        losses[row["labels"]].append(-float(logits.log_softmax(-1)[0, row["labels"]]))
    return [np.asarray(values) for values in losses]


def first_loss(base: Path, data: Any, folder: Path, **options: Any) -> float:
    once = {"logging_steps": 1, "per_device_train_batch_size": 60, "augment": "none", "save_strategy": "no"}
    return run(base, data, folder, tuning="linear_probe", **once, **options).history[0]["loss"]


def test_class_weights(bases: Any, tmp_path: Path) -> None:
    rows = uneven_digits()
    data = {"train": rows, "validation": rows}
    zeros, ones = losses_by_class(bases["test_vit"], rows)
    expected = {"plain": np.concatenate([zeros, ones]).mean(), "balanced": (zeros.mean() + ones.mean()) / 2}
    assert abs(expected["plain"] - expected["balanced"]) > 1e-3
    plain = first_loss(bases["test_vit"], data, tmp_path / "plain")
    balanced = first_loss(bases["test_vit"], data, tmp_path / "balanced", class_weights="balanced")
    assert plain == pytest.approx(expected["plain"], rel=1e-4)
    assert balanced == pytest.approx(expected["balanced"], rel=1e-4)


def test_label_smoothing(bases: Any, tmp_path: Path) -> None:
    plain = first_loss(bases["test_vit"], tiny.digits(), tmp_path / "plain")
    assert first_loss(bases["test_vit"], tiny.digits(), tmp_path / "half", label_smoothing_factor=0.5) != plain
    tiny_amount = first_loss(bases["test_vit"], tiny.digits(), tmp_path / "little", label_smoothing_factor=1e-6)
    assert tiny_amount == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("option", ["mixup", "cutmix"])
def test_mixing(bases: Any, tmp_path: Path, option: str) -> None:
    result = run(bases["test_resnet"], tiny.digits(), tmp_path / "run", **{option: 0.8})
    assert result.facts["options"] == {option: 0.8}
    plain = run(bases["test_resnet"], tiny.digits(), tmp_path / "plain")
    name = "timm_model.fc.weight"
    assert not torch.equal(result.model.state_dict()[name], plain.model.state_dict()[name])
    assert_same_images(result)


def test_balanced_sampling_and_no_validation(bases: Any, tmp_path: Path) -> None:
    options = {"sampling": "balanced_classes", "per_device_train_batch_size": 12, "validation": 0}
    result = run(bases["test_vit"], uneven_digits(), tmp_path / "run", **options)
    assert result.facts["steps"] == 4  # 2 x 24 rows an epoch in batches of 12
    assert result.metrics == {} and "none held out" in result.facts["selection"]


def test_best_epoch_on_validation_is_kept_and_said(bases: Any, tmp_path: Path) -> None:
    options = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "num_train_epochs": 3}
    result = run(bases["test_resnet"], tiny.digits(), tmp_path / "run", learning_rate=5e-3, **options)
    best = max(entry["eval_accuracy"] for entry in result.history if "eval_accuracy" in entry)
    assert result.metrics["validation"]["accuracy"] == best
    assert result.facts["selection"].startswith("The best accuracy on validation")
    assert_same_images(result)


def test_average_of_the_weights_is_what_is_saved(bases: Any, tmp_path: Path) -> None:
    result = run(bases["test_vit"], tiny.digits(), tmp_path / "run", ema_decay=0.5)
    plain = run(bases["test_vit"], tiny.digits(), tmp_path / "plain")
    name = "timm_model.head.weight"
    assert not torch.equal(result.model.state_dict()[name], plain.model.state_dict()[name])
    assert_same_images(result)


def test_skipped_examples_are_not_counted(bases: Any, tmp_path: Path) -> None:
    data = tiny.digits()
    files = [
        {"bytes": file["bytes"], "path": None}
        for file in data["train"].cast_column("image", datasets.Image(decode=False))["image"]
    ]
    files[5]["bytes"] = b"broken"
    data["train"] = datasets.Dataset.from_dict(
        {"image": files, "label": data["train"]["label"]}, features=data["train"].features
    )
    result = run(bases["test_vit"], data, tmp_path / "run", validation=0, on_bad_example="skip")
    assert result.facts["counts"]["train"] == 59


def test_says_what_was_decided(bases: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"gradient_accumulation_steps": 2, "weight_decay": 0.5}
    with caplog.at_level(logging.INFO, logger="hf_transfer"):
        run(bases["test_vit"], tiny.digits(classes=["7", "5"]), tmp_path / "run", tuning="linear_probe", **options)
    recommended = next(line for line in caplog.messages if line.startswith("Recommended"))
    assert "image with tuning 'linear_probe'" in recommended and "learning_rate=0.001" in recommended
    assert "weight_decay" not in recommended  # it was given
    assert "40 rows a step: 20 a process, accumulated 2 times, processes 1" in caplog.messages
    assert "Labels: 0 7, 1 5" in caplog.messages


def test_the_page_shows_the_recommended_values() -> None:
    from hf_transfer.recommended import training_defaults

    page = (Path(__file__).parents[1] / "docs" / "finetuning.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    head = next(row for row in rows if row[1:2] == ["batch"])
    shown = {row[0]: row for row in rows if row[0] in ("image", "text", "audio") and len(row) == len(head)}
    for modality in ("image", "text", "audio"):
        for tuning, rate in zip(head[2:], shown[modality][2:], strict=True):
            assert training_defaults(modality, tuning)["learning_rate"] == float(rate), (modality, tuning)
        batch = training_defaults(modality, "full")["per_device_train_batch_size"]
        assert shown[modality][1].split(",")[0] == str(batch)
        assert training_defaults(modality, "gradual")["learning_rate"] == float(shown[modality][2])
