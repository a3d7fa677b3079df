"""The student's images as the teacher takes them: the same augmented pixels in its own size, channels and scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TransferError

if TYPE_CHECKING:
    from ..backbones import Backbone

# Pillow's filters as torch has them. timm's "random" chooses among the first two in training.
_MODES = {
    "bilinear": "bilinear",
    "bicubic": "bicubic",
    "random": "bilinear",
    "nearest": "nearest-exact",
    "lanczos": "bicubic",  # which torch lacks; bicubic is nearest to it
}
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as Pillow turns colours to grey


@dataclass(frozen=True)
class Pixels:
    """How a network's images are scaled: x = p * scale + shift of pixels p in [0, 1].

    Attributes:
        scale: (C,).
        shift: (C,).
        reversed: Whether the channels are blue, green, red.
    """

    scale: Tensor
    shift: Tensor
    reversed: bool

    @classmethod
    def of(cls, backbone: Backbone) -> Pixels:
        """Measured on a black, a white and a red image, with what really prepares the backbone's images.

        Mean and std alone do not tell: some processors of transformers scale to [-1, 1], twice, or swap channels.

        Raises:
            TransferError: If the backbone has no data_config, or neither 1 nor 3 channels.
        """
        from ..data.image_transforms import ImageTransform

        transform = ImageTransform.for_backbone(backbone, "image", train=False)
        channels, height, width = transform.size
        colours = [[0], [255]] if channels == 1 else [[0, 0, 0], [255, 255, 255], [255, 0, 0]]
        images = torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, height, width)
        pixels = transform.normalise(images)[:, :, height // 2, width // 2]  # (2 or 3, C)
        swapped = channels == 3 and bool((pixels[2, 2] - pixels[1, 2]).abs() < (pixels[2, 2] - pixels[0, 2]).abs())
        return cls(pixels[1] - pixels[0], pixels[0], swapped)

    def equals(self, other: Pixels) -> bool:
        """Whether an image is the same in both, to the rounding of float32."""
        return (
            len(self.scale) == len(other.scale)
            and torch.allclose(self.scale, other.scale, rtol=1e-5, atol=1e-6)
            and torch.allclose(self.shift, other.shift, rtol=1e-5, atol=1e-6)
            and self.reversed == other.reversed
        )

    def to(self, device: torch.device) -> Pixels:
        """On another device."""
        return Pixels(self.scale.to(device), self.shift.to(device), self.reversed)


class ImageBridge:
    """A student's batch of images -> the teacher's.

    The student's scaling is undone, grey is repeated to three channels or colours are weighted to grey, the teacher's
    scaling is applied, and the image is resized by the teacher's filter, with antialiasing. Cropping is the student's:
    the teacher sees the very same view. Without a difference the tensor itself passes.

    Args:
        student: Whose images come.
        teacher: Its `data_config` says what it takes.

    Raises:
        TransferError: If either does not say what its images are, or a filter has no counterpart.
    """

    def __init__(self, student: Backbone, teacher: Backbone) -> None:
        own, theirs = _config(student, "student"), _config(teacher, "teacher")
        self.size: tuple[int, int] = tuple(theirs["input_size"][1:])
        if theirs["interpolation"] not in _MODES:
            raise TransferError(
                f"The teacher's images are resized by {theirs['interpolation']!r}, which torch lacks. Set its "
                f"data_config['interpolation'] to one of {', '.join(_MODES)}."
            )
        self.mode = _MODES[theirs["interpolation"]]
        self.student: Pixels | None = None  # None: nothing to rescale
        self.teacher: Pixels | None = None
        if own == theirs and student.processor is teacher.processor:
            return
        student_pixels, teacher_pixels = Pixels.of(student), Pixels.of(teacher)
        if not student_pixels.equals(teacher_pixels):
            self.student, self.teacher = student_pixels, teacher_pixels

    def __call__(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) of the student's -> (N, C', H', W') of the teacher's."""
        if self.student is not None and self.teacher is not None:
            if self.student.scale.device != pixels.device:  # once
                self.student, self.teacher = self.student.to(pixels.device), self.teacher.to(pixels.device)
            pixels = _rescaled(pixels, self.student, self.teacher)
        if tuple(pixels.shape[2:]) == self.size:
            return pixels
        if self.mode == "nearest-exact":
            return F.interpolate(pixels, self.size, mode=self.mode)
        return F.interpolate(pixels, self.size, mode=self.mode, antialias=True)

    def __str__(self) -> str:
        scales = [
            None if x is None else [x.scale.tolist(), x.shift.tolist(), x.reversed]
            for x in (self.student, self.teacher)
        ]
        return f"images {self.size} {self.mode} {scales}"


def _rescaled(x: Tensor, student: Pixels, teacher: Pixels) -> Tensor:
    if x.shape[1] != len(student.scale):
        raise TransferError(
            f"The student's images have {x.shape[1]} channels, by its data_config {len(student.scale)}."
        )
    p = (x - student.shift.view(-1, 1, 1)) / student.scale.view(-1, 1, 1)
    p = p.flip(1) if student.reversed else p  # red, green, blue
    if len(student.scale) < len(teacher.scale):
        p = p.expand(-1, 3, -1, -1)
    elif len(student.scale) > len(teacher.scale):
        p = (p * p.new_tensor(_LUMA).view(-1, 1, 1)).sum(dim=1, keepdim=True)
    p = p.flip(1) if teacher.reversed else p
    return p * teacher.scale.view(-1, 1, 1) + teacher.shift.view(-1, 1, 1)


def _config(backbone: Backbone, who: str) -> dict[str, Any]:
    if backbone.data_config is None:
        raise TransferError(
            f"The {who} {backbone.name!r} does not say what its images are (mean, std, size). Set "
            "backbone.data_config, e.g. from the processor it was trained with, or load it with load_backbone()."
        )
    return backbone.data_config
