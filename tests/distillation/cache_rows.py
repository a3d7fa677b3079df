"""Rows, batches and a teacher for the tests of the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import torch

from hf_transfer.data.collate import collator_for
from hf_transfer.data.columns import Columns
from hf_transfer.data.replay import dataset_epoch
from hf_transfer.data.transforms import prepare
from hf_transfer.distillation.signal import TeacherSignal

datasets.disable_progress_bars()

CLASSES, SIDE = 5, 12
IMAGES = Columns("image", "label", "image", "image-classification")
CONFIG = {
    "input_size": (3, SIDE, SIDE), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "interpolation": "bilinear",
    "crop_pct": 1.0,
}  # fmt: skip


def image_backbone(**config: Any) -> Any:
    """What prepare() asks of an image backbone."""
    return SimpleNamespace(
        modality="image", processor=None, data_config=CONFIG | config, labels=None, task="image-classification",
        name="fake", model=None, outputs=CLASSES,
    )  # fmt: skip


def images(rows: int = 8, first_id: int = 0) -> datasets.Dataset:
    """Random images with classes; example_ids that are not their positions."""
    pixels = np.random.default_rng(0).integers(0, 256, (rows, 16, 20, 3), dtype=np.uint8)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Value("int64"), "example_id": datasets.Value("int64")}
    )
    ids = [first_id + 7 * i + 3 for i in reversed(range(rows))]
    columns = {"image": list(pixels), "label": [i % 3 for i in range(rows)], "example_id": ids}
    return datasets.Dataset.from_dict(columns, features=features)


def prepared(augment: str = "light+colour+noise", rows: int = 8, seed: int = 0, **config: Any) -> datasets.Dataset:
    """Training rows of random images, augmented."""
    return prepare(images(rows), image_backbone(**config), IMAGES, train=True, augment=augment, seed=seed)


def image_batches(dataset: Any, view: int, positions: Sequence[int] | None = None, size: int = 3) -> Iterator[Any]:
    """Collated batches of one view of some rows."""
    dataset_epoch(dataset).set(view)
    positions = range(len(dataset)) if positions is None else positions
    collate = collator_for(image_backbone())
    for start in range(0, len(positions), size):
        yield collate(dataset.__getitems__(list(positions[start : start + size])))


class ImageTeacher:
    """A linear network over pixels, which therefore sees every change of them; counts its batches."""

    def __init__(self) -> None:
        self.weight = torch.randn(3 * SIDE * SIDE, CLASSES, generator=torch.Generator().manual_seed(0))
        self.batches = 0

    def __call__(self, batch: Any) -> TeacherSignal:
        self.batches += 1
        features = batch["pixel_values"].flatten(1)
        return TeacherSignal(logits=features @ self.weight, features=features[:, :4], hidden={"block": features})


def token_rows(lengths: Sequence[int], width: int = CLASSES) -> dict[int, torch.Tensor]:
    """example_id -> (length, width) the teacher's logits for each token of a row."""
    generator = torch.Generator().manual_seed(1)
    return {10 * i + 1: 3 * torch.randn(length, width, generator=generator) for i, length in enumerate(lengths)}


def token_batch(rows: dict[int, torch.Tensor], ids: Sequence[int], left: bool) -> tuple[dict, torch.Tensor]:
    """A padded batch of these rows, and the answers to it: what stands at padding is no answer."""
    longest = max(len(rows[i]) for i in ids)
    logits = torch.full((len(ids), longest, rows[ids[0]].shape[1]), 1e4)
    mask = torch.zeros(len(ids), longest, dtype=torch.int64)
    for row, i in enumerate(ids):
        start = longest - len(rows[i]) if left else 0
        logits[row, start : start + len(rows[i])] = rows[i]
        mask[row, start : start + len(rows[i])] = 1
    return {"example_id": torch.tensor(ids), "attention_mask": mask}, logits
