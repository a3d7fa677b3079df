"""Rows to a batch: inputs stacked or padded, labels of the right type, `domain` and `example_id` kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import TransferError
from .columns import DOMAIN, EPOCH, EXAMPLE_ID, LABELS, check_processor
from .labels import UNLABELLED
from .mixing import Mixing
from .stored_rows import are_of_one_batch, batch_pixels

if TYPE_CHECKING:
    from ..backbones import Backbone

Row = Mapping[str, Any]


def collator_for(backbone: Backbone, *, mixup: float = 0.0, cutmix: float = 0.0, seed: int = 0) -> Collator:
    """The collator of a backbone's prepared rows; it pickles.

    Args:
        backbone: What the batches are for.
        mixup: alpha of mixup, >= 0; 0 is off. Images with classes only.
        cutmix: alpha of CutMix, likewise.
        seed: Seed of the blending, which is a function of (seed, epoch, the batch's example_ids).

    Returns:
        A callable, rows -> batch. It blends rows that were prepared with train=True, which carry their epoch, and
        leaves others as they are: one collator serves training and evaluation.

    Raises:
        TransferError: If blending is asked of what cannot be blended, or the tokenizer has no padding token.
    """
    check_processor(backbone)
    mixing = None
    if mixup or cutmix:
        if backbone.modality != "image" or backbone.task != "image-classification":
            raise TransferError(f"mixup and CutMix blend images with classes; the backbone's task is {backbone.task}.")
        mixing = Mixing(mixup, cutmix, backbone.outputs, seed)
    pad: Any = {"image": _Stack, "text": _PadText, "audio": _PadAudio}[backbone.modality](backbone.processor)
    return Collator(pad, float_labels=backbone.task == "regression", mixing=mixing)


class Collator:
    """Rows -> a batch of the model's inputs, `labels`, `domain` and `example_id`; other columns are dropped.

    Labels: (N,) int64 for classes, (N,) or (N, K) float32 for regression, (N, T) int64 padded by -100 for tokens,
    (N, C) float32 where classes are blended or the rows have soft labels.

    Args:
        inputs: Rows -> the model's inputs.
        float_labels: Whether labels are quantities.
        mixing: Blends batches of training rows.
    """

    def __init__(self, inputs: Any, *, float_labels: bool = False, mixing: Mixing | None = None) -> None:
        self.inputs, self.float_labels, self.mixing = inputs, float_labels, mixing

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = self.inputs(rows)
        length = batch["input_ids"].shape[1] if "input_ids" in batch else None
        batch.update(self.targets(rows, length))
        if self.mixing is not None and EPOCH in rows[0]:
            batch["pixel_values"], batch[LABELS] = self.mixing(
                batch["pixel_values"], batch[LABELS], batch[EXAMPLE_ID].tolist(), rows[0][EPOCH]
            )
        return batch

    def targets(self, rows: Sequence[Row], length: int | None = None) -> dict[str, Tensor]:
        """A batch's columns beside the model's inputs.

        Args:
            rows: The rows.
            length: Tokens in a row of the batch, where labels are a token's.

        Returns:
            `labels`, `domain` and `example_id`, of those the rows have.
        """
        found = {}
        if LABELS in rows[0]:
            found[LABELS] = self._labels([row[LABELS] for row in rows], length)
        for name in (DOMAIN, EXAMPLE_ID):
            if name in rows[0]:
                found[name] = torch.tensor([int(row[name]) for row in rows])
        return found

    def _labels(self, labels: list[Any], length: int | None) -> Tensor:
        if np.ndim(labels[0]) == 0:
            whole = np.asarray(labels).dtype.kind in "iub" and not self.float_labels
            return torch.tensor(labels, dtype=torch.int64 if whole else torch.float32)
        if length is not None and not self.float_labels and np.asarray(labels[0]).dtype.kind in "iu":
            return self.inputs.pad(labels, UNLABELLED, length)
        return torch.tensor(np.asarray(labels, dtype=np.float32))


class _Stack:
    """Images of one size."""

    def __init__(self, processor: Any) -> None:
        pass

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        if are_of_one_batch(rows):
            return {"pixel_values": batch_pixels(rows)}
        return {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}  # (N, C, H, W)


class _PadText:
    """Token ids padded to the longest row of the batch, on the tokenizer's side."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.pad_token_id is None:
            raise TransferError(
                f"{type(tokenizer).__name__} has no padding token. Set one before: "
                "tokenizer.pad_token = tokenizer.eos_token, and model.config.pad_token_id alike."
            )
        self.left = tokenizer.padding_side == "left"
        self.fill = {
            "input_ids": tokenizer.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": tokenizer.pad_token_type_id,
        }

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        return {
            name: self.pad([row[name] for row in rows], fill, length)
            for name, fill in self.fill.items()
            if name in rows[0]
        }

    def pad(self, rows: Sequence[Sequence[int]], fill: int, length: int) -> Tensor:
        """Rows of integers -> (N, length) int64."""
        padded = torch.full((len(rows), length), fill)
        for line, row in zip(padded, rows, strict=True):
            start = length - len(row) if self.left else 0
            line[start : start + len(row)] = torch.tensor(row)
        return padded


class _PadAudio:
    """Audio features padded to the longest row of the batch, as the model's extractor pads and masks."""

    def __init__(self, extractor: Any) -> None:
        self.extractor = extractor
        self.name = extractor.model_input_names[0]

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        features = {self.name: [np.asarray(row[self.name]) for row in rows]}
        return dict(self.extractor.pad(features, padding=True, return_tensors="pt"))
