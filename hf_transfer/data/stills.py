"""What is done to an image before anything random: the same in every epoch, so a store need do it only once.

A Still takes decoded images to 8-bit arrays (H, W, C). Images that are cropped at random stay whole, large ones being
shrunk; all others take their final size as in evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._torchvision import make_torchvision_importable
from ..errors import TransferError
from .resampling import Arrays, memory

if TYPE_CHECKING:
    from PIL.Image import Image

SPARE_SIDE = 2
"""Images that are cropped at random are first shrunk to this many times the side of the crop, by their shorter side.

A crop of half the area at the narrowest aspect is 0.61 of that wide, 1.2 times the result: none is enlarged by it.
"""


_CACHED = 1 << 17  # numbers that stay in a core's cache from one operation to the next


class Still:
    """Decoded images -> 8-bit arrays, nothing random.

    Attributes:
        shape: (H, W, C) of every result; None where they differ.
        whole: Whether they are normalised already, and float32.
    """

    shape: tuple[int, int, int] | None = None
    whole = False

    def __str__(self) -> str:
        return "of any size" if self.shape is None else f"{self.shape[0]} x {self.shape[1]} pixels"

    def __call__(self, images: Iterable[Image]) -> Arrays:
        """N images, which may be decoded one by one as they are asked for -> N arrays (H, W, C) uint8."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """All that its results depend on, as JSON."""
        raise NotImplementedError


class Shrunk(Still):
    """Images as they are, those larger than a bound shrunk to it.

    Args:
        bound: The most that the shorter side may have, in pixels.
        cubic: Whether they are shrunk by Pillow's bicubic filter, rather than the bilinear one.
    """

    def __init__(self, bound: int, cubic: bool) -> None:
        self.bound, self.cubic = bound, cubic

    def __str__(self) -> str:
        return f"whole, up to {self.bound} pixels on the shorter side"

    def __call__(self, images: Iterable[Image]) -> Arrays:
        return [_array(self._shrunk(image)) for image in images]

    def _shrunk(self, image: Image) -> Image:
        from PIL.Image import Resampling

        size = self.size_of(*image.size)
        if size == image.size:
            return image
        return image.resize(size, Resampling.BICUBIC if self.cubic else Resampling.BILINEAR)

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the result for an image of such a size."""
        share = min(1, self.bound / min(width, height))
        return round(width * share), round(height * share)

    def facts(self) -> dict[str, Any]:
        return {"shrunk to": self.bound, "cubic": self.cubic, "pillow": version("pillow")}


class TimmGeometry(Still):
    """timm's evaluation transform up to the 8-bit image of the final size.

    Args:
        config: timm's data config.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        make_torchvision_importable()
        from timm.data.transforms_factory import create_transform

        keys = ("input_size", "interpolation", "crop_pct", "crop_mode")
        self.chosen = {key: config[key] for key in keys if config.get(key) is not None}
        steps = create_transform(**self.chosen, is_training=False, normalize=False).transforms
        self._transform = type(create_transform(**self.chosen))(steps[:-1])  # the last makes a tensor
        channels, height, width = config["input_size"]
        self.shape = (height, width, channels)

    def __call__(self, images: Iterable[Image]) -> Arrays:
        return np.stack([_array(self._transform(image)) for image in images])

    def facts(self) -> dict[str, Any]:
        return {"timm": version("timm"), "pillow": version("pillow"), **self.chosen}


class ProcessorGeometry(Still):
    """How a transformers image processor resizes and crops.

    Args:
        processor: The image processor.
        size: (C, H, W) of its results.
    """

    def __init__(self, processor: Any, size: tuple[int, int, int]) -> None:
        self.processor = processor
        self.shape = (*size[1:], size[0])

    def __call__(self, images: Iterable[Image]) -> Arrays:
        found = self.processor(images=list(images), return_tensors="pt", do_rescale=False, do_normalize=False)
        return found["pixel_values"].permute(0, 2, 3, 1).contiguous().numpy()

    def facts(self) -> dict[str, Any]:
        libraries = {name: version(name) for name in ("transformers", "torchvision", "pillow")}
        return {**libraries, "processor": json.loads(self.processor.to_json_string())}


class ProcessorWhole(Still):
    """All that a transformers image processor does in evaluation: for those that do not resize 8-bit images.

    Args:
        processor: The image processor.
    """

    whole = True

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, images: Iterable[Image]) -> Arrays:
        found = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        return found.permute(0, 2, 3, 1).numpy()

    def facts(self) -> dict[str, Any]:
        raise TransferError(
            f"{type(self.processor).__name__} resizes other than 8-bit images, which is all that a store holds."
        )


class Normalise:
    """8-bit images of one size -> (N, C, H, W) float32, (x / 255 - mean) / std: timm's bits, a batch at a time."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:  # (N, C, H, W) uint8, on any device
        mean, std = self.mean.to(pixels.device), self.std.to(pixels.device)
        if pixels.device.type != "cpu":
            return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255).sub_(mean).div_(std)
        found = memory(pixels.shape, np.float32)
        together = max(1, _CACHED // pixels[0].numel())
        for into, part in zip(found.split(together), pixels.split(together), strict=True):
            into.copy_(part).div_(255).sub_(mean).div_(std)
        return found


class ProcessorNormalise:
    """8-bit images of one size -> (N, C, H, W) float32, by a transformers image processor."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, pixels: Tensor) -> Tensor:  # (N, C, H, W) uint8, on any device
        found = self.processor(images=pixels, return_tensors="pt", do_resize=False, do_center_crop=False)
        return found["pixel_values"]


def separable(geometry: ProcessorGeometry, normalise: ProcessorNormalise) -> bool:
    """Whether a processor's work on a picture of noise is what these two do one after the other, bit for bit."""
    from PIL import Image

    assert geometry.shape is not None
    height, width, _ = geometry.shape
    noise = np.random.default_rng(0).integers(0, 256, (height + height // 2, width + 1, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    whole = geometry.processor(images=[image], return_tensors="pt")["pixel_values"]
    try:
        first = torch.from_numpy(np.asarray(geometry([image])))
    except TypeError:  # EfficientNet's normalises a second time, which cannot be turned off, and not 8-bit images
        return False
    return first.dtype == torch.uint8 and torch.equal(normalise(first.permute(0, 3, 1, 2)), whole)


def _array(image: Image) -> np.ndarray:
    found = np.array(image)  # a copy: Pillow's own memory is read-only, which torch warns of
    return found if found.ndim == 3 else found[..., None]
