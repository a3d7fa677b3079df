"""Random boxes, a batch at a time: those that are cropped, and those that are erased; as torchvision draws them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .draws import Draws

_TRIES = 10  # torchvision's: then the crop is the largest one in the middle, and nothing is erased
_UNIFORMS = 2 * _TRIES + 3


def random_crops(
    heights: np.ndarray, widths: np.ndarray, draws: Draws, purpose: int, *, area: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of a random share of the area and an aspect ratio of 3/4 to 4/3, and a coin for each.

    Args:
        heights: (N,) of the images, in pixels.
        widths: (N,).
        draws: Of the N rows, on the CPU.
        purpose: What is drawn.
        area: The least and the largest share of an image's area.

    Returns:
        (N, 4) int64 of top, left, height and width; and (N,) bool, heads.

    Source: torchvision's RandomResizedCrop; Szegedy et al. 2014, arXiv:1409.4842.
    """
    drawn = draws.uniform(purpose, _UNIFORMS).numpy()
    share, shape, (y, x, coin) = drawn[:, :_TRIES], drawn[:, _TRIES:-3], drawn[:, -3:].T
    wanted = (heights * widths)[:, None] * (area[0] + (area[1] - area[0]) * share)  # (N, tries)
    ratio = np.exp((2 * shape - 1) * math.log(4 / 3))
    width, height = np.rint(np.sqrt(wanted * ratio)), np.rint(np.sqrt(wanted / ratio))
    fits = (width >= 1) & (width <= widths[:, None]) & (height >= 1) & (height <= heights[:, None])
    first = (np.arange(len(fits)), fits.argmax(axis=1))
    none = ~fits.any(axis=1)
    h = np.where(none, np.minimum(heights, np.rint(widths * 4 / 3)), height[first]).astype(np.int64)
    w = np.where(none, np.minimum(widths, np.rint(heights * 4 / 3)), width[first]).astype(np.int64)
    top = np.where(none, (heights - h) // 2, np.floor(y * (heights - h + 1))).astype(np.int64)
    left = np.where(none, (widths - w) // 2, np.floor(x * (widths - w + 1))).astype(np.int64)
    return np.stack([top, left, h, w], axis=1), coin < 0.5


def erase(pixels: Tensor, draws: Draws, purpose: int) -> Tensor:
    """Sets a box of 2 to 33 % of the area to 0 in half of the images, in place.

    Args:
        pixels: (N, C, H, W), normalised: 0 is the mean colour.
        draws: Of the N rows.
        purpose: What is drawn.

    Source: Zhong et al. 2017, arXiv:1708.04896, as in torchvision's RandomErasing.
    """
    height, width = pixels.shape[-2:]
    drawn = draws.uniform(purpose, _UNIFORMS)
    share, shape, (y, x, coin) = drawn[:, :_TRIES], drawn[:, _TRIES:-3], drawn[:, -3:].T
    wanted = height * width * (0.02 + 0.31 * share)  # (N, tries)
    ratio = torch.exp(math.log(0.3) + (math.log(3.3) - math.log(0.3)) * shape)
    h, w = (wanted * ratio).sqrt().round(), (wanted / ratio).sqrt().round()
    fits = (h >= 1) & (h < height) & (w >= 1) & (w < width)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    h, w = h.gather(1, first), w.gather(1, first)  # (N, 1)
    top, left = (y[:, None] * (height - h + 1)).floor(), (x[:, None] * (width - w + 1)).floor()
    rows = torch.arange(height, device=pixels.device)
    columns = torch.arange(width, device=pixels.device)
    chosen = (coin < 0.5) & fits.any(dim=1)
    inside = ((top <= rows) & (rows < top + h) & chosen[:, None])[:, :, None]  # (N, H, 1)
    inside = inside & ((left <= columns) & (columns < left + w))[:, None]  # (N, H, W)
    return pixels.masked_fill_(inside[:, None], 0)
