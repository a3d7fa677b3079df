"""finetune() and distill() learn the same whether images are decoded once or in every epoch, and say which."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch

from hf_transfer import TransferConfig, TransferError, TransferTrainer, disk, distill, finetune, load_backbone
from hf_transfer.config import RunConfig
from hf_transfer.data import on_device, store_choice
from hf_transfer.data.collate import collator_for
from hf_transfer.data.columns import Columns
from hf_transfer.data.image_transforms import ImageTransform
from hf_transfer.data.stored_rows import StoredRows, store_images
from hf_transfer.data.transforms import prepare
from hf_transfer.objectives import CrossEntropy

IMAGES = {"pixel_values": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))}
QUICK = {**tiny_runs.QUICK, "num_train_epochs": 2, "learning_rate": 0.03, "logging_steps": 1, "seed": 5}
NAMES = [str(digit) for digit in range(10)]


def run(folder: Path, output: str, store: str, **options: Any) -> Any:
    return finetune(
        folder, tiny_runs.digits(40, 20), output_dir=folder.parent / output, image_store=store,
        image_store_dir=str(folder.parent / "stores"), **{**QUICK, **options},
    )  # fmt: skip


def assert_same(a: Any, b: Any) -> None:
    assert torch.equal(tiny_runs.logits(a.model, **IMAGES), tiny_runs.logits(b.model, **IMAGES))
    assert a.metrics == b.metrics
    keys = ("loss", "eval_loss", "eval_accuracy")
    assert [[e.get(k) for k in keys] for e in a.history] == [[e.get(k) for k in keys] for e in b.history]


@pytest.fixture
def start(tmp_path: Path) -> Path:
    return tiny_runs.image_backbone(tmp_path / "start", labels=NAMES)


@pytest.mark.parametrize(
    "options",
    [
        {"augment": "light+colour+noise", "mixup": 0.2},
        {"augment": "none"},
        {"augment": "geometric+occlusion", "sampling": "balanced_classes", "dataloader_num_workers": 1},
    ],
    ids=["light", "none", "balanced"],
)
def test_the_same_is_learnt(start: Path, options: dict[str, Any]) -> None:
    live = run(start, "live", "never", **options)
    assert not (start.parent / "stores").exists()
    stored = run(start, "stored", "auto", **options)
    assert len(list((start.parent / "stores").glob("*/manifest.json"))) == 2  # train and validation
    assert_same(live, stored)


def test_files_are_decoded_once(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    plain = ImageTransform._decoded

    def counted(self: ImageTransform, file: Any, example_id: int) -> Any:
        decoded.append(example_id)
        return plain(self, file, example_id)

    monkeypatch.setattr(ImageTransform, "_decoded", counted)
    run(start, "a", "auto", num_train_epochs=4, eval_strategy="no", save_strategy="no")
    assert len(decoded) == len(set(decoded)) == 60  # those for training, and in the end those for validation and test
    decoded.clear()
    run(start, "b", "auto", num_train_epochs=4, eval_strategy="no", save_strategy="no")
    assert len(decoded) == 24  # the latter


def test_resumed_from_a_checkpoint(start: Path) -> None:
    options = {"num_train_epochs": 2, "save_steps": 1, "save_strategy": "steps", "save_total_limit": None}
    whole = run(start, "run", "always", **options)
    checkpoint = start.parent / "run" / "checkpoint-1"
    again = run(start, "again", "always", **{**options, "resume_from_checkpoint": str(checkpoint)})
    assert torch.equal(tiny_runs.logits(whole.model, **IMAGES), tiny_runs.logits(again.model, **IMAGES))


def test_frozen_layers_are_cached_from_stored_rows(start: Path) -> None:
    options = {"tuning": "linear_probe", "cache": "always", "cache_views": 2, "num_train_epochs": 3}
    live = run(start, "live", "never", cache_dir=str(start.parent / "a"), **options)
    stored = run(start, "stored", "always", cache_dir=str(start.parent / "b"), **options)
    assert_same(live, stored)
    names = [sorted(x.name for x in (start.parent / folder).iterdir()) for folder in "ab"]
    assert names[0] == names[1]  # the keys of a cache are those of the live rows


def test_no_store_is_written_for_frozen_layers_that_are_cached(start: Path) -> None:
    run(start, "a", "auto", tuning="linear_probe", cache="always", cache_dir=str(start.parent / "a"), augment="none")
    assert not (start.parent / "stores").exists()


def test_distillation_with_a_cached_teacher(start: Path, tmp_path: Path) -> None:
    def distilled(output: str, store: str) -> Any:
        return distill(
            load_backbone(start), "test_convnext", tiny_runs.digits(40, 20), pretrained=False, image_size=32,
            output_dir=tmp_path / output, teacher_cache="always", teacher_cache_dir=str(tmp_path / "teachers"),
            image_store=store, image_store_dir=str(tmp_path / "stores"), **QUICK,
        )  # fmt: skip

    live = distilled("live", "never")
    assert_same(live, distilled("stored", "auto"))
    assert len(list((tmp_path / "teachers").iterdir())) == 1  # one key for both


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_train_epochs": 1}, "1 epoch(s) decode no image twice"),
        ({"max_steps": 1}, "0.56 epoch(s) decode no image twice"),
        ({"image_store_max_bytes": 1000}, "more than image_store_max_bytes=1,000 allows"),
    ],
)
def test_auto_says_why_not(
    start: Path, options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="hf_transfer")
    run(start, "a", "auto", **options)
    assert any("Images are decoded anew in every epoch" in x and reason in x for x in caplog.messages)
    assert not (start.parent / "stores").exists()


def test_auto_says_what_it_chose(start: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="hf_transfer")
    run(start, "a", "auto")
    assert any("Image store over 2 epochs: train: 36 images" in x and "MiB free in" in x for x in caplog.messages)


def test_a_full_disk_is_seen_before(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_choice, "free_bytes", lambda folder: 5000)
    assert_same(run(start, "a", "auto"), run(start, "b", "never"))
    with pytest.raises(TransferError, match=r"image_store='always' cannot be: .*too little is free"):
        run(start, "c", "always")


def test_a_folder_that_cannot_be_written_is_no_store(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.os, "access", lambda folder, mode: False)
    with pytest.raises(TransferError, match="stores cannot be written to: give another image_store_dir"):
        run(start, "a", "always")


def test_texts_have_no_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="hf_transfer")
    folder = tiny_runs.text_backbone(tmp_path / "start")
    finetune(folder, tiny_runs.sentences(24), output_dir=tmp_path / "a", **QUICK)
    assert not any("decoded" in message for message in caplog.messages)
    with pytest.raises(TransferError, match=r"image_store='always' cannot be: Only images"):
        finetune(folder, tiny_runs.sentences(24), output_dir=tmp_path / "b", image_store="always", **QUICK)


def test_options_are_checked() -> None:
    with pytest.raises(TransferError, match="image_store='yes' is not valid"):
        RunConfig("a", "b", image_store="yes")  # type: ignore[arg-type]
    with pytest.raises(TransferError, match="image_store_max_bytes=0 is not valid"):
        RunConfig("a", "b", image_store_max_bytes=0)


def trained(rows: Any, folder: Path, backbone_folder: Path) -> Any:
    backbone = load_backbone(backbone_folder)
    args = TransferConfig(output_dir=str(folder), report_to="none", save_strategy="no", **QUICK)
    trainer = TransferTrainer(
        model=backbone.model, args=args, train_dataset=rows, data_collator=collator_for(backbone),
        objectives=[CrossEntropy()],
    )  # fmt: skip
    trainer.train()
    return backbone.model


def test_by_hand_and_on_an_accelerator(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work that an accelerator would do, done here: the trainer's batches are finished after the copy."""
    data = tiny_runs.digits(40, 20)["train"]
    columns = Columns("image", "label", "image", "image-classification")
    live = prepare(data, load_backbone(start), columns, train=True, augment="light+colour+noise")
    stored = store_images(live, start.parent / "store")
    assert isinstance(stored, StoredRows)
    expected = tiny_runs.logits(trained(live, start.parent / "a", start), **IMAGES)
    assert torch.equal(tiny_runs.logits(trained(stored, start.parent / "b", start), **IMAGES), expected)
    kinds = []
    plain = on_device.finished

    def seen(batch: dict[str, Any], dataset: Any) -> dict[str, Any]:
        kinds.append(batch["pixel_values"].dtype)
        return plain(batch, dataset)

    monkeypatch.setattr(on_device, "worth_it", lambda device: True)
    monkeypatch.setattr(on_device, "finished", seen)
    assert torch.equal(tiny_runs.logits(trained(stored, start.parent / "c", start), **IMAGES), expected)
    assert kinds == [torch.uint8] * 4


@pytest.mark.slow
def test_two_processes_share_a_store_and_train_as_without(tmp_path: Path) -> None:
    tests = Path(__file__).resolve().parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    script = str(tests / "stored_processes.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, str(tmp_path)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for found in (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)):
        assert found["stores"] == 2
        assert torch.equal(*found["logits"])
        assert found["metrics"][0] == found["metrics"][1]
