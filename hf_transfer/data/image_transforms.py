"""Images to what a backbone takes: its own evaluation preprocessing, or random crops and augmentations for training.

Training crops and augments 8-bit Pillow images, then normalises, then erases or adds noise. Evaluation is timm's
`create_transform` for timm's networks, and the image processor itself for those of transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._torchvision import make_torchvision_importable
from ..errors import TransferError
from .augmentations import Augment, Augmentation, parse
from .columns import EPOCH, EXAMPLE_ID
from .decoding import decode_image, unreadable
from .replay import Replayable, borrowed_generators, seed_all

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

    from ..backbones import Backbone


def undecoded(dataset: Dataset, column: str) -> Dataset:
    """The dataset with its images as stored bytes or paths, so that a bad one can be named."""
    import datasets

    return dataset.cast_column(column, datasets.Image(decode=False))


class ImageTransform(Replayable):
    """A batch of rows with stored images -> the same rows with `pixel_values` (N, C, H, W) float32.

    Training rows also carry the epoch they were made in, by which the collator tells them, and draws.

    Args:
        column: The images.
        size: (C, H, W) of the result.
        geometry: Pillow image -> Pillow image (or uint8 tensor) of size H x W, as in evaluation; None if `normalise`
            does that.
        normalise: Images -> (N, C, H, W) float32.
        augmentation: Random operations; None for evaluation's preprocessing.
        train: Whether these are training rows.
        seed: Seed of the random operations.
    """

    def __init__(
        self,
        column: str,
        size: tuple[int, int, int],
        geometry: Augment | None,
        normalise: Callable[[Sequence[Image]], Tensor],
        augmentation: Augmentation | None = None,
        *,
        train: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.column, self.size, self.train = column, size, train
        self.geometry, self.normalise, self.augmentation = geometry, normalise, augmentation

    @classmethod
    def for_backbone(
        cls,
        backbone: Backbone,
        column: str,
        *,
        train: bool,
        augment: str = "light",
        image_size: int | None = None,
        seed: int = 0,
    ) -> ImageTransform:
        """The transform for a backbone.

        Args:
            backbone: An image backbone; its `data_config` gives size, mean, std, interpolation and crop.
            column: The images.
            train: Whether to augment.
            augment: Names of AUGMENTATIONS joined by "+".
            image_size: Side of the images in pixels; the backbone's own by default.
            seed: Seed of the augmentation.

        Raises:
            TransferError: If an augmentation is unknown, or the backbone has neither 1 nor 3 channels.
        """
        names = parse(augment) if train else []
        config = _config(backbone, image_size)
        geometry: Augment | None = _evaluation_geometry(config)
        normalise: Any = Normalise(config["mean"], config["std"])
        if _has_own_preprocessing(backbone):
            normalise = ProcessorNormalise(_resized(backbone.processor, image_size), whole=not names)
            geometry = geometry if names else None
        augmentation = Augmentation(names, config) if names else None
        return cls(column, config["input_size"], geometry, normalise, augmentation, train=train, seed=seed)

    @property
    def random(self) -> bool:
        return self.augmentation is not None

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        ids = batch[EXAMPLE_ID]
        with borrowed_generators():
            images = [self._image(file, i) for file, i in zip(batch[self.column], ids, strict=True)]
            pixels = self.normalise(images)  # (N, C, H, W)
            if self.augmentation is not None:
                pixels = self._augment_tensors(pixels, ids)
        rest = {name: column for name, column in batch.items() if name != self.column}
        if self.train:
            rest[EPOCH] = [self.epoch.value] * len(ids)
        return {"pixel_values": pixels, **rest}

    def _image(self, file: Any, example_id: int) -> Image:
        try:
            image = decode_image(file, channels=self.size[0])
        except (OSError, SyntaxError, ValueError) as error:
            raise unreadable(error, example_id, "image") from error
        if self.augmentation is None:
            return image if self.geometry is None else self.geometry(image)
        seed_all(self.seed, self.epoch.value, example_id, 0)
        return self.augmentation.image(image, self.geometry)

    def _augment_tensors(self, pixels: Tensor, ids: Sequence[int]) -> Tensor:
        assert self.augmentation is not None
        if not self.augmentation.on_tensors:
            return pixels
        epoch = self.epoch.value
        for row, example_id in zip(pixels, ids, strict=True):
            seed_all(self.seed, epoch, example_id, 1)
            row.copy_(self.augmentation.tensor(row))
        return pixels


class Normalise:
    """8-bit images of one size -> (N, C, H, W) float32, (x / 255 - mean) / std: timm's bits, a batch at a time."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)

    def __call__(self, images: Sequence[Image]) -> Tensor:
        stacked = np.stack([np.asarray(image) for image in images])  # (N, H, W) or (N, H, W, C)
        pixels = torch.from_numpy(stacked if stacked.ndim == 4 else stacked[..., None]).permute(0, 3, 1, 2)
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255).sub_(self.mean).div_(self.std)


class ProcessorNormalise:
    """Images -> (N, C, H, W) float32 by a transformers image processor.

    Args:
        processor: The image processor.
        whole: Whether it also resizes and crops, as in evaluation.
    """

    def __init__(self, processor: Any, *, whole: bool = False) -> None:
        self.processor = processor
        self.options = {} if whole else {"do_resize": False, "do_center_crop": False}

    def __call__(self, images: Sequence[Image]) -> Tensor:
        return self.processor(images=list(images), return_tensors="pt", **self.options)["pixel_values"]


def _config(backbone: Backbone, image_size: int | None) -> dict[str, Any]:
    """The backbone's data config, at another size, with one mean and std a channel."""
    if backbone.data_config is None:
        raise TransferError(f"The backbone {backbone.name!r} has no data_config: it is no image backbone.")
    config = dict(backbone.data_config)
    channels, height, width = config["input_size"]
    if channels not in (1, 3):
        raise TransferError(f"The backbone takes {channels} channels; images are read as grey (1) or RGB (3).")
    if image_size is not None:
        if image_size < 1:
            raise TransferError(f"image_size={image_size}: it is the side of the images in pixels, at least 1.")
        height = width = image_size
    config["input_size"] = (channels, height, width)
    for name in ("mean", "std"):  # one grey channel is normalised by the average over the colours
        given = tuple(config[name])
        config[name] = given if len(given) == channels else (sum(given) / len(given),) * channels
    return config


def _evaluation_geometry(config: dict[str, Any]) -> Augment:
    """timm's evaluation transform up to the Pillow image of the final size."""
    make_torchvision_importable()
    from timm.data.transforms_factory import create_transform

    keys = ("input_size", "interpolation", "crop_pct", "crop_mode")
    chosen = {key: config[key] for key in keys if config.get(key) is not None}
    steps = create_transform(**chosen, is_training=False, normalize=False).transforms
    return type(create_transform(**chosen))(steps[:-1])  # the last makes a tensor


def _has_own_preprocessing(backbone: Backbone) -> bool:
    """Whether transformers' image processor is the reference, rather than timm's config (or grey images)."""
    from transformers.image_processing_utils import BaseImageProcessor
    from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

    processor = backbone.processor
    is_own = isinstance(processor, BaseImageProcessor) and not isinstance(processor, TimmWrapperImageProcessor)
    return is_own and backbone.data_config is not None and backbone.data_config["input_size"][0] == 3


def _resized(processor: Any, image_size: int | None) -> Any:
    """A copy of an image processor that gives images of another side, with the same share cropped."""
    if image_size is None:
        return processor
    processor = copy.deepcopy(processor)
    size = {edge: pixels for edge, pixels in dict(processor.size).items() if pixels}
    cropped = dict(processor.crop_size)["height"] if getattr(processor, "do_center_crop", False) else None
    share = image_size / (cropped or size.get("shortest_edge") or size["height"])
    processor.size = {edge: round(pixels * share) for edge, pixels in size.items()}
    if cropped:
        processor.crop_size = {"height": image_size, "width": image_size}
    return processor
