"""Channels last in memory: the same training, ordinary files, exact resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import set_seed

from hf_transfer import TransferConfig, TransferTrainer, load_backbone
from hf_transfer.memory_formats import channels_last_pays, to_channels_last
from hf_transfer.objectives import CrossEntropy

LABELS = ["a", "b", "c"]


def network(name: str = "test_efficientnet") -> Any:
    torch.manual_seed(0)
    return load_backbone(name, labels=LABELS, pretrained=False, image_size=32).model


def rows(n: int = 24) -> Dataset:
    draw = torch.Generator().manual_seed(1)
    return Dataset.from_dict({
        "pixel_values": torch.randn(n, 3, 32, 32, generator=draw).tolist(),
        "labels": torch.randint(0, 3, (n,), generator=draw).tolist(),
        "example_id": list(range(n)),
    })  # fmt: skip


def trainer(folder: Path, model: Any = None, *, channels_last: bool = True, **options: Any) -> TransferTrainer:
    args = TransferConfig(
        output_dir=str(folder), per_device_train_batch_size=4, num_train_epochs=2, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="epoch", channels_last=channels_last, **options,
    )  # fmt: skip
    return TransferTrainer(
        model=network() if model is None else model, args=args, train_dataset=rows(), objectives=[CrossEntropy()]
    )


def layouts(model: Any) -> set[bool]:
    """Whether kernels of several channels and places have the channels last."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and min(m.weight.shape[1:]) > 1]
    return {weight.is_contiguous(memory_format=torch.channels_last) for weight in weights}


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_trains_as_it_does_without(tmp_path: Path) -> None:
    last, first = trainer(tmp_path / "last"), trainer(tmp_path / "first", channels_last=False)
    assert layouts(last.model) == {True} and layouts(first.model) == {False}
    for each in (last, first):
        set_seed(0)
        each.train()
    a, b = state(last.model), state(first.model)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-3, msg=name)
    assert layouts(last.model) == {True}


@pytest.mark.parametrize("plain", [False, True], ids=["transformers", "a module"])
def test_files_are_ordinary_and_equal(tmp_path: Path, plain: bool) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
            self.body(torch.zeros(1, 3, 32, 32))

        def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.body(pixel_values)}

    each = trainer(tmp_path, Plain() if plain else None)
    each.train()
    saved = load_file(tmp_path / "checkpoint-12" / "model.safetensors")
    held = {name.removeprefix("timm_model."): value for name, value in state(each.model).items()}
    assert saved.keys() == held.keys()
    assert all(value.is_contiguous() and torch.equal(value, held[name]) for name, value in saved.items())


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_resume_is_exact(tmp_path: Path, ema: float | None) -> None:
    whole = trainer(tmp_path / "whole", ema_decay=ema)
    whole.train()
    again = trainer(tmp_path / "again", ema_decay=ema)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert layouts(again.model) == {True}
    a, b = state(whole.model), state(again.model)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_only_kernels_move() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "volume": nn.Conv3d(3, 4, 3), "linear": nn.Linear(2, 2)})
    model.position = nn.Parameter(torch.randn(1, 3, 4, 4))
    before = state(model)
    to_channels_last(model)
    assert model["conv"].weight.is_contiguous(memory_format=torch.channels_last)
    assert model["volume"].weight.is_contiguous() and model.position.is_contiguous()
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


@pytest.mark.parametrize(
    ("name", "pays"),
    [("test_efficientnet", True), ("test_resnet", False), ("test_vit", False), ("mobilenetv2_050", True),
     ("lcnet_050", True), ("regnetx_002", True)],
)  # fmt: skip
def test_it_pays_where_convolutions_are_grouped(name: str, pays: bool) -> None:
    import timm

    assert channels_last_pays(timm.create_model(name)) is pays


def test_it_is_recommended_where_it_pays() -> None:
    from hf_transfer.recommended import training_defaults

    assert training_defaults("image", "full", network())["channels_last"]
    assert not training_defaults("image", "full", network("test_vit")).get("channels_last")
    assert not training_defaults("text", "full", nn.Conv2d(4, 4, 3, groups=4)).get("channels_last")


def test_finetune_takes_the_recommendation_and_the_users_word(tmp_path: Path) -> None:
    import tiny_runs

    from hf_transfer import finetune

    folder = tiny_runs.image_backbone(tmp_path / "start", "test_efficientnet", [str(i) for i in range(10)])
    for asked, expected in (({}, True), ({"channels_last": False}, False)):
        options = {**tiny_runs.QUICK, **asked, "max_steps": 1}
        result = finetune(folder, tiny_runs.digits(40, 20), output_dir=tmp_path / str(expected), **options)
        assert layouts(result.model) == {expected}


def test_the_teacher_is_laid_out_too(tmp_path: Path) -> None:
    from hf_transfer import DistillationConfig, DistillationTrainer

    student, teacher = network(), load_backbone("test_resnet", labels=LABELS, pretrained=False, image_size=32)
    before = state(teacher.model)
    args = DistillationConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", channels_last=True)
    backbone = load_backbone("test_efficientnet", labels=LABELS, pretrained=False, image_size=32)
    DistillationTrainer(model=backbone, teacher=teacher, args=args, train_dataset=rows())
    assert layouts(student) == {False} and layouts(backbone.model) == {True}
    assert layouts(teacher.model) == {True}
    assert all(torch.equal(before[name], value) for name, value in state(teacher.model).items())
