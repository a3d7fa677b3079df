"""prepare(): a split of raw rows becomes what a backbone takes, with `labels`, `example_id` and `domain`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import TransferError
from .columns import DOMAIN, EXAMPLE_ID, LABELS, Columns, check_fits, check_processor
from .decoding import OnBadExample, readable_rows
from .identity import add_example_id
from .labels import align

if TYPE_CHECKING:
    from datasets import Dataset

    from ..backbones import Backbone

_ANY_MODALITY = ("none", "light")  # the augmentations that ask nothing of text and audio


def prepare(
    dataset: Dataset,
    backbone: Backbone,
    columns: Columns,
    *,
    train: bool,
    augment: str = "light",
    image_size: int | None = None,
    max_length: float | None = None,
    seed: int = 0,
    on_bad_example: OnBadExample = "raise",
) -> Dataset:
    """Makes one split ready for a backbone.

    Images and audio are decoded and transformed when a row is read; text is tokenised here, once. Random augmentation
    depends on (seed, epoch, example_id) only: `replay.dataset_epoch(prepared).set(epoch)` moves it on.

    Args:
        dataset: Raw rows, as `sources.load_data` gives them.
        backbone: What they are for.
        columns: What their columns mean.
        train: Whether to augment. Evaluation always sees what the backbone's own preprocessing gives.
        augment: Names of `image_transforms.AUGMENTATIONS` joined by "+", e.g. "light", "geometric+noise". Text and
            audio have no augmentation, and take "none" and "light" alike.
        image_size: Side of the images in pixels; the backbone's own by default.
        max_length: Text: tokens, by default as many as the backbone takes. Audio: seconds, by default all.
        seed: Seed of the augmentation.
        on_bad_example: What to do with an image or sound that does not decode: "raise" names the row; "skip" decodes
            each file once, now, and leaves out and logs those that fail. No row's `example_id` changes.

    Returns:
        Rows of `pixel_values` (C, H, W), of `input_ids` and `attention_mask`, or of the audio extractor's features;
        with `labels`, `example_id`, and `domain` where the rows have it. Other columns are gone.

    Raises:
        TransferError: If the data does not fit the backbone, an argument is out of range, or a row does not decode.
    """
    check_fits(backbone.modality, columns)
    check_processor(backbone)
    if not len(dataset):
        raise TransferError("prepare() was given a split without rows.")
    if columns.modality != "image":
        _refuse_image_options(columns, augment, image_size)
    elif max_length is not None:
        raise TransferError(
            f"max_length={max_length}: it is for text and audio, and the data is images; leave it out."
        )
    dataset = _contract_columns(add_example_id(dataset.with_format(None)), backbone, columns)
    if columns.modality == "image":
        from .image_transforms import ImageTransform, undecoded

        rows = readable_rows(undecoded(dataset, columns.input), columns.input, "image", on_bad_example)
        return rows.with_transform(
            ImageTransform.for_backbone(
                backbone, columns.input, train=train, augment=augment, image_size=image_size, seed=seed
            )
        )
    if columns.modality == "audio":
        from .audio_transforms import AudioTransform, undecoded

        rows = readable_rows(undecoded(dataset, columns.input), columns.input, "audio", on_bad_example)
        return rows.with_transform(AudioTransform(backbone.processor, columns.input, max_seconds=max_length))
    from .text_transforms import tokenise

    return tokenise(dataset, backbone, columns, max_length=None if max_length is None else int(max_length))


def _contract_columns(dataset: Dataset, backbone: Backbone, columns: Columns) -> Dataset:
    """Only input, labels (numbered as the model numbers them), domain and example_id."""
    label = columns.label if columns.label in dataset.column_names else None
    if label is not None and backbone.task != "regression":
        dataset = align(dataset, label, backbone.labels)
    wanted = [columns.input, columns.pair, label, EXAMPLE_ID, DOMAIN]
    dataset = dataset.select_columns([c for c in wanted if c is not None and c in dataset.column_names])
    return dataset.rename_column(label, LABELS) if label not in (None, LABELS) else dataset


def _refuse_image_options(columns: Columns, augment: Any, image_size: Any) -> None:
    if image_size is not None:
        raise TransferError(f"image_size={image_size}: the data is {columns.modality}; leave image_size out.")
    if augment not in _ANY_MODALITY:
        raise TransferError(
            f"augment={augment!r}: the data is {columns.modality}, which has no augmentation; valid are "
            f"{', '.join(_ANY_MODALITY)}."
        )
