"""Bad input: one clear error, before any training and without a change in the user's folders."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny_runs as tiny
import torch
from torch import Tensor
from transformers import AutoModelForImageClassification

from hf_transfer import LoRA, PartialFreeze, TransferError, TransferTrainer, Tuning, finetune, load_backbone
from hf_transfer.data.splits import few_shot, kfold
from hf_transfer.hub import bundle
from hf_transfer.objective import Objective, Step
from hf_transfer.objectives import MSE, CrossEntropy
from hf_transfer.trainer import NonFiniteLoss


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: backbones, an earlier run, data."""
    home = tmp_path_factory.mktemp("home")
    tiny.image_backbone(home / "vit", "test_vit")
    tiny.image_backbone(home / "resnet", labels=["cat", "dog"])
    tiny.text_backbone(home / "bert")
    (home / "bert-without-tokenizer").mkdir()
    for name in ("config.json", "model.safetensors"):
        (home / "bert-without-tokenizer" / name).write_bytes((home / "bert" / name).read_bytes())
    tiny.wav2vec2(home / "wav2vec2")
    (home / "corrupt").mkdir()
    (home / "corrupt/config.json").write_text((home / "bert/config.json").read_text())
    (home / "corrupt/model.safetensors").write_bytes((home / "bert/model.safetensors").read_bytes()[:500])
    (home / "broken").mkdir()
    (home / "broken/config.json").write_text("{")
    (home / "file").write_text("mine")
    (home / "nothing").mkdir()
    return home


def snapshot(folder: Path) -> dict[str, str]:
    """Every file of a folder, by its content."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha1(path.read_bytes()).hexdigest() for path in files}


def table(**columns: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def both(split: datasets.Dataset) -> dict[str, datasets.Dataset]:
    return {"train": split, "validation": split}


def labelled(*labels: Any) -> datasets.Dataset:
    return table(text=tiny.texts(len(labels)), label=list(labels))


def named(ids: list[int], names: list[str]) -> datasets.Dataset:
    return labelled(*ids).cast_column("label", datasets.ClassLabel(names=names))


def broken_image() -> datasets.DatasetDict:
    data = tiny.digits()
    files = data["train"].cast_column("image", datasets.Image(decode=False))["image"]
    files = [{"bytes": b"no image" if row == 7 else file["bytes"], "path": None} for row, file in enumerate(files)]
    columns = {"image": files, "label": data["train"]["label"]}
    data["train"] = datasets.Dataset.from_dict(columns, features=data["train"].features)
    return data


@dataclass(frozen=True)
class TrainNothing(Tuning):
    def trained(self, model: Any, anatomy: Any) -> set[str]:
        return set()


def loaded(home: Path, name: str, **options: Any) -> Any:
    return load_backbone(home / name, **options)


DIGITS = [str(digit) for digit in range(10)]

# What is asked for (a dict of finetune's arguments, from the home folder), and what the message must hold, in order.
Case = tuple[Callable[[Path], dict[str, Any]], str]
CASES: dict[str, Case] = {
    # the backbone
    "unknown model": (
        lambda home: {"model": "test_resnett"},
        r"'test_resnett' .*test_resnet",
    ),
    "no such folder": (
        lambda home: {"model": home / "vitt"},
        r"no folder '.*vitt'.*folders .*vit.*Correct the path",
    ),
    "empty folder": (lambda home: {"model": home / "nothing"}, r"nothing' holds no model"),
    "corrupt weights": (
        lambda home: {"model": home / "corrupt", "dataset": tiny.sentences()},
        r"corrupt' is corrupt or cut short.*Copy it again",
    ),
    "corrupt configuration": (
        lambda home: {"model": home / "broken", "dataset": tiny.sentences()},
        r"broken' is corrupt or cut short.*Copy it again",
    ),
    "text model on images": (
        lambda home: {"model": home / "bert"},
        r"'bert' network and cannot do task='image-classification'.*It can do: text-classification",
    ),
    "image model on text": (
        lambda home: {"dataset": tiny.sentences()},
        r"task='text-classification'.*image-classification",
    ),
    "loaded text model on images": (
        lambda home: {"model": loaded(home, "bert", labels=DIGITS)},
        r"The backbone reads text, and column 'image' holds image.*choose a image backbone",
    ),
    "audio model on text": (
        lambda home: {"model": home / "wav2vec2", "dataset": tiny.sentences()},
        r"cannot do task='text-classification'.*It can do: audio-classification",
    ),
    "no tokenizer": (
        lambda home: {"model": home / "bert-without-tokenizer", "dataset": tiny.sentences()},
        r"came without a tokenizer.*AutoTokenizer",
    ),
    "loaded for another task": (
        lambda home: {"model": loaded(home, "bert", labels=["a", "b"], task="token-classification"),
                      "dataset": tiny.sentences()},
        r"backbone is for token-classification, and the data is for text-classification.*load_backbone\(",
    ),
    "loaded with another number of outputs": (
        lambda home: {"model": loaded(home, "bert", labels=1, task="regression"), "dataset": tiny.ratings(outputs=2)},
        r"2 numbers a row, and the backbone 1 outputs.*labels=2",
    ),
    "loaded and not pretrained": (
        lambda home: {"model": loaded(home, "vit", labels=DIGITS), "pretrained": False},
        r"pretrained=False .*load_backbone",
    ),
    "label in data but not in model": (
        lambda home: {"model": loaded(home, "resnet"), "dataset": tiny.digits(classes=["3", "4"])},
        r"\['3', '4'\] are not the model's \['cat', 'dog'\].*\['3', '4'\] are not in the model.*labels=data.labels",
    ),
    "labels in another order": (
        lambda home: {"model": loaded(home, "resnet", labels=["4", "3"]), "dataset": tiny.digits(classes=["3", "4"])},
        r"\['3', '4'\] are not the model's \['4', '3'\], in this order.*labels=data.labels",
    ),
    "regression by an image's class": (
        lambda home: {"task": "token-classification"},
        r"task='token-classification', but input 'image'.*image-classification.*Leave the task out",
    ),
    # the data
    "unknown data set": (lambda home: {"dataset": "digitz"}, r"'digitz' .*(local|Hub)"),
    "no such data folder": (lambda home: {"dataset": "./no/data"}, r"No file or folder './no/data'"),
    "folder without data": (
        lambda home: {"dataset": home / "nothing"},
        r"No data in the folder '.*nothing', which holds nothing.*train.parquet",
    ),
    "no train split": (
        lambda home: {"dataset": {"all": tiny.digits()["train"]}},
        r"no train split; its splits are all.*load_data\(\{'train': dataset\['all'\]\}\)",
    ),
    "empty split": (
        lambda home: {"dataset": {**tiny.digits(), "test": tiny.digits()["test"].select([])}},
        r"Split 'test' is empty: give it rows, or leave it out",
    ),
    "label column missing": (
        lambda home: {"label_column": "labell"},
        r"label_column='labell' is not a column of the data.*image \(Image\), label \(10 classes\)",
    ),
    "no label at all": (
        lambda home: {"dataset": tiny.digits().remove_columns("label")},
        r"No label column.*image \(Image\).*Pass label_column",
    ),
    "two inputs": (
        lambda home: {"model": home / "bert", "dataset": both(table(a=["x"] * 4, b=["y"] * 4, label=[0, 1, 0, 1]))},
        r"2 columns could be the input \(a, b\).*Pass input_column",
    ),
    "labels not contiguous": (
        lambda home: {"model": home / "bert", "dataset": both(labelled(0, 2, 0, 2))},
        r"'label' of train are 0, 2.*without gaps.*Re-number them.*\{0: 0, 2: 1\}",
    ),
    "label of validation unknown in train": (
        lambda home: {"model": home / "bert", "dataset": {"train": labelled("a", "b"), "validation": labelled("c")}},
        r"Label 'c' in column 'label' of validation is in no row of train.*Train has a, b.*Correct the label",
    ),
    "class without an example in train": (
        lambda home: {"model": home / "bert", "dataset": both(named([0, 1, 0], ["a", "b", "never"]))},
        r"Class 'never' has no example in train.*Add one.*keep_classes",
    ),
    "label out of range": (
        lambda home: {"model": home / "bert", "dataset": {"train": labelled(0, 1, 0, 1), "test": labelled(0, 5)}},
        r"Label '5' in column 'label' of test",
    ),
    "row without a label": (
        lambda home: {"model": home / "bert", "dataset": both(labelled("a", None, "b"))},
        r"1 rows of train have no label.*the first is row 1.*Remove them",
    ),
    "label that is not a number": (
        lambda home: {"model": home / "bert", "dataset": both(labelled(0.5, float("nan")))},
        r"'label' of train holds NaN.*Remove those rows",
    ),
    "text missing": (
        lambda home: {"model": home / "bert", "dataset": both(table(text=["a", None], label=["x", "y"]))},
        r"No text in train row 1.*remove that row",
    ),
    "more classes than rows": (
        lambda home: {"max_train_samples": 4},
        r"max_train_samples=4 leaves classes without an example.*10 classes",
    ),
    "nothing to hold out": (
        lambda home: {"model": home / "bert", "dataset": labelled("a", "b", "a")},
        r"Nothing can be held out for validation: 0.1 of 3 train rows.*validation=0",
    ),
    "share out of range": (lambda home: {"validation": 1.5}, r"validation=1.5.*\[0, 1\)"),
    "unreadable image": (
        lambda home: {"dataset": broken_image(), "validation": 0},
        r"Unreadable image in train row 7 \(example_id 7\).*Repair or remove that row.*on_bad_example=\"skip\"",
    ),
    "on_bad_example": (lambda home: {"on_bad_example": "ignore"}, r"on_bad_example='ignore'.*\"raise\" and \"skip\""),
    # what trains
    "unknown tuning": (
        lambda home: {"tuning": "lorra"},
        r"Unknown tuning 'lorra'. There are: full, linear_probe, partial, gradual, bitfit, lora",
    ),
    "option of another tuning": (
        lambda home: {"tuning": "full", "lora_r": 4},
        r"lora_r applies to tuning 'lora', not to 'full'. Leave it out",
    ),
    "option beside a tuning object": (
        lambda home: {"tuning": LoRA(r=2), "lora_r": 4},
        r"lora_r go with a tuning's name; LoRA\(.*leave them out",
    ),
    "LoRA target that matches nothing": (
        lambda home: {"tuning": LoRA(targets=["query"])},
        r"LoRA target 'query' matches no layer.*attn.qkv",
    ),
    "freeze that leaves nothing": (
        lambda home: {"tuning": TrainNothing()},
        r"This freeze leaves nothing to train.*PartialFreeze.*the blocks are: ",
    ),
    "unknown block": (
        lambda home: {"tuning": PartialFreeze(["layer9"])},
        r"train_blocks names 'layer9'.*Its blocks: ",
    ),
    "more blocks than there are": (
        lambda home: {"tuning": "partial", "train_blocks": 99},
        r"train_blocks is 99.* blocks: .*Train at most that many",
    ),
    "adapter of random weights": (
        lambda home: {"model": "test_vit", "tuning": "lora", "pretrained": False},
        r"tuning='lora' saves an adapter without its base.*tuning='full'",
    ),
    # options
    "unknown option": (
        lambda home: {"learning_rat": 1e-3},
        r"Unknown option 'learning_rat'. Nearest: learning_rate",
    ),
    "metric that no evaluation gives": (
        lambda home: {"load_best_model_at_end": True, "metric_for_best_model": "accurracy"},
        r"'accurracy' is no metric of this task; did you mean 'accuracy'",
    ),
    "image_size on text": (
        lambda home: {"model": home / "bert", "dataset": tiny.sentences(), "image_size": 32},
        r"image_size.*'.*bert'.*it takes text",
    ),
    "max_length on images": (lambda home: {"max_length": 8}, r"max_length=8.*text and audio.*leave it out"),
    "more tokens than the model takes": (
        lambda home: {"model": home / "bert", "dataset": tiny.sentences(), "max_length": 100},
        r"max_length=100: valid are 3 to 24 tokens",
    ),
    "unknown augmentation": (lambda home: {"augment": "lite"}, r"'lite'.*light"),
    "augmentation of text": (
        lambda home: {"model": home / "bert", "dataset": tiny.sentences(), "augment": "geometric"},
        r"augment='geometric'.*data is text.*none, light",
    ),
    "mixup of texts": (
        lambda home: {"model": home / "bert", "dataset": tiny.sentences(), "mixup": 0.2},
        r"mixup and CutMix blend images with classes.*text-classification",
    ),
    "class weights of numbers": (
        lambda home: {"model": home / "bert", "dataset": tiny.ratings(), "class_weights": "balanced"},
        r"class_weights is for data with classes.*regression. Leave it out",
    ),
    "label smoothing of numbers": (
        lambda home: {"model": home / "bert", "dataset": tiny.ratings(), "label_smoothing_factor": 0.1},
        r"label_smoothing_factor is for data with classes.*regression. Leave it out",
    ),
    "class weights beside objectives": (
        lambda home: {"objectives": [CrossEntropy()], "class_weights": "balanced"},
        r"class_weights does not reach explicit objectives.*CrossEntropy\(class_weights=",
    ),
    "label smoothing beside objectives": (
        lambda home: {"objectives": [CrossEntropy()], "label_smoothing_factor": 0.1},
        r"label_smoothing_factor does not reach explicit objectives.*CrossEntropy\(label_smoothing=0.1\)",
    ),
    "unknown sampling": (
        lambda home: {"sampling": "balanced"},
        r"sampling='balanced' is not valid.*random, balanced_classes, balanced_domains",
    ),
    "unknown schedule": (
        lambda home: {"lr_scheduler_type": "cosinus"},
        r"lr_scheduler_type='cosinus' is unknown. Valid: linear, cosine.*multistep",
    ),
    "layer decay out of range": (lambda home: {"layer_decay": 1.5}, r"layer_decay=1.5.*\(0, 1\]"),
    "best model without validation": (
        lambda home: {"validation": 0, "load_best_model_at_end": True},
        r"load_best_model_at_end needs a validation split.*none held out",
    ),
    "early stopping without validation": (
        lambda home: {"validation": 0, "early_stopping_patience": 2},
        r"early_stopping_patience needs a validation split",
    ),
    "saves and evaluations that do not match": (
        lambda home: {"load_best_model_at_end": True, "save_strategy": "steps"},
        r"save and eval strategy to match",
    ),
    # folders
    "resume from nothing": (
        lambda home: {"resume_from_checkpoint": "true"},
        r"no whole checkpoint in '.*out'. Train anew without it",
    ),
    "resume from what is no checkpoint": (
        lambda home: {"resume_from_checkpoint": str(home / "vit")},
        r"vit' is no checkpoint folder that was saved whole.*OUTPUT_DIR/checkpoint-N",
    ),
    "resume gradual unfreezing at one checkpoint": (
        lambda home: {"resume_from_checkpoint": str(home / "vit"), "tuning": "gradual"},
        r"a checkpoint a phase. Pass 'true'",
    ),
    "output folder holds another model": (
        lambda home: {"output_dir": home / "resnet"},
        r"resnet' holds another model.*architecture is 'test_resnet'.*Choose another folder",
    ),
    "output folder holds the model with other labels": (
        lambda home: {"output_dir": home / "vit"},
        r"vit' holds another model: its labels are \['x', 'y', 'z'\].*Choose another folder .*--output_dir",
    ),
    "output folder holds a full model": (
        lambda home: {"output_dir": home / "vit", "tuning": "lora"},
        r"vit' holds another model: it is a full model",
    ),
    "output folder is a file": (lambda home: {"output_dir": home / "file"}, r"file' is a file. Choose another"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_clear_error_before_any_training(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for trains in ("train", "training_step"):
        monkeypatch.setattr(TransferTrainer, trains, lambda *args, **kwargs: pytest.fail("it trained"))
    case, said = CASES[name]
    options = {"model": home / "vit", "output_dir": tmp_path / "out", **case(home)}
    data = options.pop("dataset", None) or tiny.digits()
    before = snapshot(home)
    with pytest.raises(TransferError, match=f"(?s){said}") as caught:
        finetune(options.pop("model"), data, **{**tiny.QUICK, **options})
    assert snapshot(home) == before and not snapshot(tmp_path)
    message = str(caught.value)
    assert len(message) < 1000 and "Traceback" not in message


@pytest.mark.parametrize(
    ("split", "said"),
    [
        (lambda rows: few_shot(rows, 9), r"n=9 rows a class: the smallest class, 'b', has 2 rows.*between 1 and that"),
        (lambda rows: kfold(rows, 3), r"k=3 folds: k must be between 2 and the size of the smallest class, 2"),
    ],
    ids=["few shot", "k-fold"],
)
def test_k_larger_than_the_smallest_class(split: Any, said: str) -> None:
    with pytest.raises(TransferError, match=said):
        split(named([0, 0, 0, 0, 1, 1], ["a", "b"]))


def test_unreadable_image_that_shows_only_when_it_is_loaded(home: Path, tmp_path: Path) -> None:
    """Headers are looked at before; a file that breaks off is found on the way, and named all the same."""
    data = tiny.digits()
    files = data["train"].cast_column("image", datasets.Image(decode=False))["image"]
    files = [{"bytes": file["bytes"][: 60 if row == 7 else None], "path": None} for row, file in enumerate(files)]
    columns = {"image": files, "label": data["train"]["label"]}
    data["train"] = datasets.Dataset.from_dict(columns, features=data["train"].features)
    with pytest.raises(TransferError, match=r"Unreadable image in train row 7"):
        finetune(home / "vit", data, output_dir=tmp_path / "out", validation=0, **tiny.QUICK)
    result = finetune(
        home / "vit", data, output_dir=tmp_path / "skipped", validation=0, on_bad_example="skip", **tiny.QUICK
    )
    assert result.facts["counts"]["train"] == 59


# ---- while training -------------------------------------------------------------------------------------------------


class Explodes(Objective):
    """Not a number on one row, from a share of training on."""

    def __init__(self, example_id: int, after: float) -> None:
        super().__init__()
        self.example_id, self.after = example_id, after

    def forward(self, step: Step) -> Tensor:
        assert step.example_id is not None
        hit = bool((step.example_id == self.example_id).any()) and step.progress >= self.after
        return step.logits.sum() * (float("nan") if hit else 0.0)


def test_loss_that_is_not_finite(home: Path, tmp_path: Path) -> None:
    data = tiny.digits()
    terms = [CrossEntropy(), Explodes(example_id=11, after=0.5)]
    options = {**tiny.QUICK, "num_train_epochs": 2, "validation": 0}
    with pytest.raises(NonFiniteLoss, match=r"loss is nan at step \d") as caught:
        finetune(home / "vit", data, output_dir=tmp_path / "out", objectives=terms, **options)
    assert isinstance(caught.value, TransferError)
    message = str(caught.value)
    ids = json.loads(re.search(r"\[[\d, ]+\]", message)[0])  # type: ignore[index]
    assert 11 in ids and len(ids) == 20
    checkpoint = tmp_path / "out/checkpoint-3"
    assert str(checkpoint) in message and "lower learning_rate" in message
    kept = AutoModelForImageClassification.from_pretrained(checkpoint)
    assert all(torch.isfinite(weight).all() for weight in kept.state_dict().values())
    assert not (tmp_path / "out/results.json").exists()
    resumed = finetune(
        home / "vit", data, output_dir=tmp_path / "out", objectives=[CrossEntropy(), Explodes(11, after=2.0)],
        resume_from_checkpoint="true", **options,
    )  # fmt: skip
    assert resumed.facts["steps"] == 6


def no_space(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def torch_without_space(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")  # torch.save's own words


@pytest.mark.parametrize("full", ["weights", "optimizer"])
def test_disk_full_at_a_checkpoint(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str) -> None:
    """The checkpoint before stays whole: the run resumes from it as if nothing had happened."""
    options = {**tiny.QUICK, "num_train_epochs": 2, "validation": 0}
    whole = finetune(home / "vit", tiny.digits(), output_dir=tmp_path / "whole", **options)
    write, saved = (bundle._write_model, torch.save)

    def on_second(real: Callable[..., None], fail: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            second = (tmp_path / "out/checkpoint-3/trainer_state.json").exists()
            (fail if second else real)(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        if full == "weights":
            patch.setattr(bundle, "_write_model", on_second(write, no_space))
        else:
            patch.setattr(torch, "save", on_second(saved, torch_without_space))
        with pytest.raises((TransferError, OSError), match=r"checkpoint-(3|6).*(Free some space|previous)"):
            finetune(home / "vit", tiny.digits(), output_dir=tmp_path / "out", **options)
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["checkpoint-3"]
    resumed = finetune(
        home / "vit", tiny.digits(), output_dir=tmp_path / "out", resume_from_checkpoint="true", **options
    )
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_disk_full_at_the_end_leaves_the_earlier_run_whole(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**tiny.QUICK, "save_strategy": "no"}
    finetune(home / "vit", tiny.digits(), output_dir=tmp_path / "out", **options)
    before = snapshot(tmp_path / "out")
    monkeypatch.setattr(bundle, "_write_model", no_space)
    with pytest.raises(TransferError, match=r"No space is left on the disk of '.*out'.*what was there is as it was"):
        finetune(home / "vit", tiny.digits(), output_dir=tmp_path / "out", seed=1, **options)
    assert snapshot(tmp_path / "out") == before


def test_regression_terms_on_the_task_by_default(home: Path, tmp_path: Path) -> None:
    """MSE passed by hand is what finetune() takes by itself for numbers."""
    options = {**tiny.QUICK, "save_strategy": "no", "logging_steps": 1}
    own = finetune(home / "bert", tiny.ratings(), output_dir=tmp_path / "a", **options)
    given = finetune(home / "bert", tiny.ratings(), output_dir=tmp_path / "b", objectives=[MSE()], **options)
    assert own.history[0]["loss"] == given.history[0]["loss"]
