"""Named random augmentations of images. They combine: "light+colour+occlusion".

There is one implementation, a batch at a time, whether the images come from their files or from a store, and whether
it runs on the CPU or an accelerator: what is drawn is a function of (seed, epoch, example_id), by `draws.Draws`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._torchvision import make_torchvision_importable
from ..errors import TransferError
from . import image_operations as ops
from .draws import Draws
from .random_boxes import erase, random_crops
from .replay import borrowed_generators, seed_all
from .resampling import Arrays, crop_resize

if TYPE_CHECKING:
    from PIL.Image import Image

AUGMENTATIONS = {
    "none": "as in evaluation",
    "light": "random crop of 50 to 100 % of the area, horizontal flip",
    "geometric": "rotation to 15 degrees, shift and scale to 10 %; no flip, for digits and medical images",
    "photometric": "brightness, contrast and sharpness; for grey images too",
    "colour": "brightness, contrast, saturation and hue; one in ten turned grey",
    "occlusion": "random erasing of 2 to 33 % of the area, in half of the images; Zhong et al. 2017, arXiv:1708.04896",
    "noise": "Gaussian noise of standard deviation up to 0.1 of the range",
    "randaugment": "two random operations of moderate strength; Cubuk et al. 2019, arXiv:1909.13719",
    "trivialaugment": "one random operation of random strength; Mueller and Hutter 2021, arXiv:2103.10158",
}
PER_IMAGE = ("randaugment", "trivialaugment")  # torchvision's, which draw from the global generators
_ON_IMAGES = ("geometric", "photometric", "colour", *PER_IMAGE)
_PURPOSE = {name: place for place, name in enumerate(AUGMENTATIONS)}  # what draws of a name are drawn for


class Augmentation:
    """The random operations of a set of names, in a fixed order: crop, then on 8-bit images, then on normalised ones.

    Args:
        names: Of AUGMENTATIONS.
        config: timm's data config. Crops are resized by its interpolation if that is bilinear, else by bicubic.
    """

    def __init__(self, names: Sequence[str], config: dict[str, Any]) -> None:
        self.names = list(names)
        self.size = tuple(config["input_size"][1:])
        self.cubic = config["interpolation"] != "bilinear"
        self.fill = [round(255 * mean) for mean in config["mean"]]
        self.std = list(config["std"])
        self.crops = "light" in names
        self._policies = {name: _policy(name, self.fill) for name in PER_IMAGE if name in names}

    @property
    def per_image(self) -> bool:
        """Whether some operation runs image by image, on the CPU."""
        return bool(self._policies)

    @property
    def after_crop(self) -> bool:
        """Whether there is more than a crop."""
        return self.names != ["light"]

    def crop(self, images: Arrays, draws: Draws) -> Tensor:
        """A random box of each of N images -> (N, C, *size) uint8."""
        sizes = [images.shape[1:3]] if isinstance(images, np.ndarray) else [image.shape[:2] for image in images]
        heights, widths = np.broadcast_to(sizes, (len(draws), 2)).T
        boxes, flipped = random_crops(heights, widths, draws, _PURPOSE["light"], area=(0.5, 1.0))
        return crop_resize(images, boxes, flipped, self.size, cubic=self.cubic)

    def on_images(self, pixels: Tensor, draws: Draws) -> Tensor:
        """(N, C, H, W) uint8, changed."""
        for name in _ON_IMAGES:
            if name in self._policies:
                pixels = self._by_policy(name, pixels, draws)
            elif name in self.names:
                pixels = getattr(self, f"_{name}")(pixels, draws)
        return pixels

    def on_tensors(self, pixels: Tensor, draws: Draws) -> Tensor:
        """(N, C, H, W) float32, normalised, changed in place."""
        if "noise" in self.names:
            share = draws.uniform(_PURPOSE["noise"], 1).float()  # (N, 1)
            scale = 0.1 * share / torch.tensor(self.std, device=pixels.device)  # (N, C)
            # The bits of the noise are of a purpose of their own, beside those of the names.
            pixels = ops.add_noise(pixels, scale[..., None, None], draws, len(_PURPOSE))
        if "occlusion" in self.names:
            pixels = erase(pixels, draws, _PURPOSE["occlusion"])
        return pixels

    def _geometric(self, pixels: Tensor, draws: Draws) -> Tensor:
        turn, right, down, scale = _centred(draws.uniform(_PURPOSE["geometric"], 4)).T
        side = torch.tensor(pixels.shape[:-3:-1], device=pixels.device)  # width, height
        shift = (0.1 * torch.stack([right, down], dim=1) * side).round()
        fill = torch.tensor(self.fill, dtype=torch.float32, device=pixels.device)
        return ops.affine(pixels, torch.deg2rad(15 * turn), shift, 1 + 0.1 * scale, fill)

    def _photometric(self, pixels: Tensor, draws: Draws) -> Tensor:
        drawn = draws.uniform(_PURPOSE["photometric"], 4)
        bright, contrasting = (1 + 0.4 * _centred(drawn[:, :2])).T
        pixels = ops.contrast(ops.brightness(pixels, bright), contrasting)
        pixels = ops.changed_where(drawn[:, 2] < 0.5, _sharpened, pixels)
        return ops.changed_where(drawn[:, 3] < 0.1, ops.autocontrast, pixels)

    def _colour(self, pixels: Tensor, draws: Draws) -> Tensor:
        drawn = draws.uniform(_PURPOSE["colour"], 5)
        bright, contrasting, saturated = (1 + 0.4 * _centred(drawn[:, :3])).T
        pixels = ops.contrast(ops.brightness(pixels, bright), contrasting)
        if pixels.shape[1] == 1:
            return pixels
        pixels = ops.hue(ops.saturation(pixels, saturated), 0.1 * _centred(drawn[:, 3]))
        return ops.changed_where(drawn[:, 4] < 0.1, _colourless, pixels)

    def _by_policy(self, name: str, pixels: Tensor, draws: Draws) -> Tensor:
        """Image by image, as Pillow images, with the global generators seeded by each row."""
        from torchvision.transforms.functional import pil_to_tensor, to_pil_image

        assert isinstance(draws.epoch, int)
        changed = torch.empty_like(pixels)
        with borrowed_generators():
            for into, image, example_id in zip(changed, pixels, draws.example_ids.tolist(), strict=True):
                seed_all(draws.seed, draws.epoch, example_id, _PURPOSE[name])
                into.copy_(pil_to_tensor(self._policies[name](to_pil_image(image))))
        return changed


def _sharpened(pixels: Tensor) -> Tensor:
    return ops.sharpness(pixels, torch.full((len(pixels),), 2.0, device=pixels.device))


def _colourless(pixels: Tensor) -> Tensor:
    return ops.grey(pixels).to(torch.uint8).expand_as(pixels)


def _centred(uniform: Tensor) -> Tensor:
    return 2 * uniform - 1


def _policy(name: str, fill: list[int]) -> Callable[[Image], Image]:
    make_torchvision_importable()
    from torchvision import transforms as tv

    bilinear = tv.InterpolationMode.BILINEAR
    if name == "randaugment":  # torchvision's: timm's posterises to 0 bits, which Pillow >= 13 refuses
        return tv.RandAugment(2, 9, interpolation=bilinear, fill=fill)
    return tv.TrivialAugmentWide(interpolation=bilinear, fill=fill)


def parse(augment: str | None) -> list[str]:
    """The names in "a+b"; [] for None and "none".

    Raises:
        TransferError: If a name is not one of AUGMENTATIONS.
    """
    names = [name.strip() for name in (augment or "none").split("+")]
    unknown = [name for name in names if name not in AUGMENTATIONS]
    if unknown:
        listed = "\n".join(f"  {name}: {what}" for name, what in AUGMENTATIONS.items())
        raise TransferError(
            f"augment={augment!r}: {unknown[0]!r} is unknown. Valid, also joined by '+', are\n{listed}"
        )
    return [name for name in AUGMENTATIONS if name in names and name != "none"]
