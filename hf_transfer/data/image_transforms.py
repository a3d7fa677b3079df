"""Images to what a backbone takes: its own evaluation preprocessing, or random crops and augmentations for training.

Evaluation is timm's `create_transform` for timm's networks, and the image processor itself for those of transformers.
An image goes through three stages: what is the same in every epoch (stills.py, which a PixelStore keeps), the random
crop, on the host, and the rest, which runs on whatever device the pixels are on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import TransferError
from .augmentations import Augmentation, parse
from .columns import EPOCH, EXAMPLE_ID
from .decoding import decode_image, unreadable
from .draws import Draws
from .replay import Replayable
from .resampling import Arrays, memory
from .stills import (
    SPARE_SIDE,
    Normalise,
    ProcessorGeometry,
    ProcessorNormalise,
    ProcessorWhole,
    Shrunk,
    Still,
    TimmGeometry,
    separable,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

    from ..backbones import Backbone


_TOGETHER = (
    1 << 19
)  # numbers of a batch that are augmented at once: fresh memory for all would cost more than the work


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
        still: What is done to an image in every epoch alike.
        normalise: (N, C, H, W) uint8 -> (N, C, H, W) float32.
        augmentation: Random operations; None for evaluation's preprocessing.
        train: Whether these are training rows.
        seed: Seed of the random operations.
    """

    def __init__(
        self,
        column: str,
        size: tuple[int, int, int],
        still: Still,
        normalise: Callable[[Tensor], Tensor],
        augmentation: Augmentation | None = None,
        *,
        train: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.column, self.size, self.train = column, size, train
        self.still, self.normalise, self.augmentation = still, normalise, augmentation

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
        size = config["input_size"]
        augmentation = Augmentation(names, config) if names else None
        still: Still = TimmGeometry(config)
        normalise: Any = Normalise(config["mean"], config["std"])
        if _has_own_preprocessing(backbone):
            processor = _resized(backbone.processor, image_size)
            normalise = ProcessorNormalise(processor)
            if separable(ProcessorGeometry(processor, size), normalise):
                still = ProcessorGeometry(processor, size)
            elif augmentation is None:
                still = ProcessorWhole(processor)
        if augmentation is not None and augmentation.crops:
            still = Shrunk(SPARE_SIDE * max(size[1:]), augmentation.cubic)
        return cls(column, size, still, normalise, augmentation, train=train, seed=seed)

    @property
    def random(self) -> bool:
        return self.augmentation is not None

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        ids = batch[EXAMPLE_ID]
        draws = Draws(self.seed, self.epoch.value, torch.tensor(ids))
        pixels = self.on_device(self.on_host(self.stills(batch[self.column], ids), draws), draws)
        rest = {name: column for name, column in batch.items() if name != self.column}
        if self.train:
            rest[EPOCH] = [self.epoch.value] * len(ids)
        return {"pixel_values": pixels, **rest}

    def stills(self, files: Sequence[Any], example_ids: Sequence[int]) -> Arrays:
        """Stored images -> what of them is the same in every epoch; TransferError, naming the row that is bad."""
        return self.still(self._decoded(file, i) for file, i in zip(files, example_ids, strict=True))

    def _decoded(self, file: Any, example_id: int) -> Image:
        try:
            return decode_image(file, channels=self.size[0])
        except (OSError, SyntaxError, ValueError) as error:
            raise unreadable(error, example_id, "image") from error

    def on_host(self, stills: Arrays, draws: Draws) -> Tensor:
        """What needs the CPU: N results of `still` -> (N, C, H, W) uint8."""
        augmentation = self.augmentation
        if augmentation is None or not augmentation.crops:
            stack = stills if isinstance(stills, np.ndarray) else np.stack(stills)  # (N, H, W, C)
            pixels = torch.from_numpy(stack).permute(0, 3, 1, 2)
        else:
            pixels = augmentation.crop(stills, draws)
        if augmentation is not None and augmentation.per_image:
            pixels = augmentation.on_images(pixels, draws)
        return pixels

    def on_device(self, pixels: Tensor, draws: Draws) -> Tensor:
        """All else, where the pixels and the draws are: what `on_host` gave -> (N, C, H, W) float32."""
        if self.still.whole:
            return pixels.contiguous()
        if self.augmentation is None or not self.augmentation.after_crop:
            return self.normalise(pixels)
        if pixels.device.type != "cpu":
            return self._changed(pixels, draws, self.augmentation)
        found = memory(pixels.shape, np.float32)
        together = max(1, _TOGETHER // pixels[0].numel())
        for start in range(0, len(pixels), together):
            rows = slice(start, start + together)
            found[rows] = self._changed(pixels[rows], draws[rows], self.augmentation)
        return found

    def _changed(self, pixels: Tensor, draws: Draws, augmentation: Augmentation) -> Tensor:
        if not augmentation.per_image:
            pixels = augmentation.on_images(pixels, draws)
        return augmentation.on_tensors(self.normalise(pixels), draws)


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
