"""Named random augmentations of images, by torchvision. They combine: "light+colour+occlusion"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._torchvision import make_torchvision_importable
from ..errors import TransferError

if TYPE_CHECKING:
    from PIL.Image import Image

Augment = Callable[[Any], Any]

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
_TENSOR = ("noise", "occlusion")  # after normalisation, in this order


class Augmentation:
    """The random operations of a set of names, in a fixed order: crop, then Pillow operations, then tensor operations.

    Args:
        names: Of AUGMENTATIONS.
        config: timm's data config.
    """

    def __init__(self, names: Sequence[str], config: dict[str, Any]) -> None:
        make_torchvision_importable()
        from timm.data.transforms import str_to_interp_mode

        self._interpolation = str_to_interp_mode(config["interpolation"])
        self._fill = [round(255 * m) for m in config["mean"]]
        self.crop = self._random_crop(config["input_size"][1:]) if "light" in names else None
        self.on_images = [operation for name in names for operation in self._image_operations(name)]
        self.on_tensors = [self._tensor_operation(name, config["std"]) for name in _TENSOR if name in names]

    def image(self, image: Image, geometry: Augment | None) -> Image:
        """One image, cropped at random or else as in evaluation, then changed."""
        image = self.crop(image) if self.crop is not None else geometry(image) if geometry is not None else image
        for operation in self.on_images:
            image = operation(image)
        return image

    def tensor(self, pixels: Tensor) -> Tensor:
        """One normalised image (C, H, W), changed."""
        for operation in self.on_tensors:
            pixels = operation(pixels)
        return pixels

    def _random_crop(self, size: Sequence[int]) -> Augment:
        from torchvision.transforms import Compose, RandomHorizontalFlip, RandomResizedCrop

        crop = RandomResizedCrop(list(size), scale=(0.5, 1.0), interpolation=self._interpolation)
        return Compose([crop, RandomHorizontalFlip()])

    def _image_operations(self, name: str) -> list[Augment]:
        from torchvision import transforms as tv

        bilinear = tv.InterpolationMode.BILINEAR
        if name == "geometric":
            return [tv.RandomAffine(15, (0.1, 0.1), (0.9, 1.1), interpolation=bilinear, fill=self._fill)]
        if name == "photometric":
            return [
                tv.ColorJitter(brightness=0.4, contrast=0.4),
                tv.RandomAdjustSharpness(2.0),
                tv.RandomAutocontrast(0.1),
            ]
        if name == "colour":
            return [tv.ColorJitter(0.4, 0.4, 0.4, 0.1), tv.RandomGrayscale(0.1)]
        if name == "randaugment":  # torchvision's: timm's posterises to 0 bits, which Pillow >= 13 refuses
            return [tv.RandAugment(2, 9, interpolation=bilinear, fill=self._fill)]
        if name == "trivialaugment":
            return [tv.TrivialAugmentWide(interpolation=bilinear, fill=self._fill)]
        return []

    def _tensor_operation(self, name: str, std: Sequence[float]) -> Augment:
        from torchvision.transforms import RandomErasing

        return GaussianNoise(std) if name == "noise" else RandomErasing(0.5)  # erases to 0, the mean colour


class GaussianNoise:
    """Adds noise to a normalised image; its standard deviation is drawn from [0, 0.1] of the pixels' range.

    Args:
        std: The standard deviation of the normalisation, by channel.
    """

    def __init__(self, std: Sequence[float]) -> None:
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:  # (C, H, W)
        return pixels + torch.randn_like(pixels) * (0.1 * torch.rand(())) / self.std


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
