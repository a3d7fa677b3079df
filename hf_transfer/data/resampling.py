"""Crop, antialiased resize and flip of 8-bit images in one go, in Pillow's arithmetic.

Each axis is resampled by a triangle or cubic filter that widens as the image shrinks, with weights of 16-bit integers,
and rounded to 8 bits: what Pillow does, and torch's `interpolate` on uint8. There are two ways of computing it here,
equal bit for bit: torch's own kernel, image by image, and, for small images, products with weight matrices, whose sums
are whole numbers that float32 holds exactly. At 32 px the kernel takes about 1.5 times as long as the products, at
48 px they are even, and at 224 px the products take 14 times as long (benchmarks/input_pipeline.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

Arrays = Sequence[np.ndarray] | np.ndarray
"""Images (H, W, C) uint8: a sequence of any sizes, or one array (N, H, W, C)."""

_SMALL = 40 * 40  # pixels before and after, up to which matrices are the faster way
_EXACT = 15  # bits of a weight whose products with 8 bits sum up within the 24 bits of a float32


def crop_resize(
    images: Arrays, boxes: np.ndarray, flipped: np.ndarray, size: tuple[int, int], *, cubic: bool
) -> Tensor:
    """Resizes a box of each image, and mirrors some left to right.

    Args:
        images: N of them, C being 1 or 3.
        boxes: (N, 4) int64: top, left, height and width of each box, in pixels and within its image.
        flipped: (N,) bool.
        size: Height and width of the result.
        cubic: Whether the filter is the cubic one (a = -0.5), rather than the triangle (bilinear).

    Returns:
        (N, C, height, width) uint8.
    """
    if size[0] * size[1] <= _SMALL and (stack := _stacked(images)) is not None:
        axes = _matrices(stack, boxes, flipped, size, cubic)
        if axes is not None:
            return _by_matrices(stack, *axes)
    return _one_by_one(images, boxes, flipped, size, cubic)


def memory(shape: Sequence[int], dtype: type[np.generic]) -> Tensor:
    """A CPU tensor that is yet to be filled.

    numpy asks the kernel for huge pages where an array is large, and torch does not: of a batch at 224 px, the page
    faults of torch's memory take longer than to normalise it. Delete this when torch.empty does so by default
    (https://github.com/pytorch/pytorch/pull/107697 left it to the environment, THP_MEM_ALLOC_ENABLE).
    """
    return torch.from_numpy(np.empty(shape, dtype))


def _stacked(images: Arrays) -> np.ndarray | None:
    """(N, H, W, C), if all are of one small size."""
    height, width, _ = shape = images[0].shape
    if height * width > _SMALL or any(image.shape != shape for image in images):
        return None
    return images if isinstance(images, np.ndarray) else np.stack(images)


def _one_by_one(images: Arrays, boxes: np.ndarray, flipped: np.ndarray, size: tuple[int, int], cubic: bool) -> Tensor:
    mode = "bicubic" if cubic else "bilinear"
    found = memory((len(images), images[0].shape[2], *size), np.uint8)
    for into, image, (top, left, height, width), flip in zip(found, images, boxes.tolist(), flipped, strict=True):
        box = torch.from_numpy(image[top : top + height, left : left + width]).permute(2, 0, 1)  # (C, h, w)
        resized = interpolate(box[None], size, mode=mode, antialias=True)[0]
        into.copy_(resized.flip(-1) if flip else resized)
    return found


def _matrices(
    stack: np.ndarray, boxes: np.ndarray, flipped: np.ndarray, size: tuple[int, int], cubic: bool
) -> tuple[Tensor, Tensor] | None:
    """(N, height, H) and (N, width, W) float32; None where float32 does not hold their sums."""
    tops, lefts, heights, widths = boxes.T.tolist()
    down = [_matrix(*box, size[0], stack.shape[1], cubic, False) for box in zip(tops, heights, strict=True)]
    across = [
        _matrix(left, width, size[1], stack.shape[2], cubic, flip)
        for left, width, flip in zip(lefts, widths, flipped.tolist(), strict=True)
    ]
    if any(matrix is None for matrix in (*down, *across)):
        return None
    return torch.from_numpy(np.stack(down)), torch.from_numpy(np.stack(across))  # type: ignore[arg-type]


def _by_matrices(stack: np.ndarray, down: Tensor, across: Tensor) -> Tensor:
    count, height, width, channels = stack.shape
    pixels = torch.from_numpy(stack).permute(0, 3, 1, 2)
    pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)  # (N, C, H, W)
    pixels = torch.bmm(pixels.view(count, channels * height, width), across.transpose(1, 2))
    pixels = pixels.add_(0.5).clamp_(0, 255).floor_()
    pixels = torch.matmul(down[:, None], pixels.view(count, channels, height, -1))  # (N, C, height, width)
    return pixels.add_(0.5).clamp_(0, 255).to(torch.uint8)  # cut off, as floor does


@lru_cache(maxsize=4096)  # small images have few different boxes
def _matrix(start: int, extent: int, length: int, pixels: int, cubic: bool, flipped: bool) -> np.ndarray | None:
    """(length, pixels) float32: how each result along one axis weighs the pixels; None if they are too fine.

    Args:
        start: Where the box begins.
        extent: Its length.
        length: Of the result.
        pixels: Of the image.
        cubic: The filter.
        flipped: Whether the results are in reverse order.
    """
    weights, bits = _weights(extent, length, cubic)
    if bits > _EXACT:
        return None
    found = np.zeros((length, pixels), np.float32)
    found[:, start : start + extent] = weights * 2.0**-bits
    return np.ascontiguousarray(found[::-1]) if flipped else found


def _weights(extent: int, length: int, cubic: bool) -> tuple[np.ndarray, int]:
    """(length, extent) whole numbers, and the number of bits that they are scaled up by; as in torch and Pillow."""
    scale = extent / length
    support = (2 if cubic else 1) * max(scale, 1)
    centre = (scale * (np.arange(length) + 0.5))[:, None]  # (length, 1)
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + support + 0.5).astype(np.int64), extent)
    places = np.arange(extent)
    distance = np.abs(places - centre + 0.5) * (1 / scale if scale >= 1 else 1.0)
    weights = np.where((first <= places) & (places < end), _filter(distance, cubic), 0.0)  # (length, extent)
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # summed one after another, so that the rounding is theirs
    bits = 0
    while bits < 22 and int(0.5 + weights.max() * 2.0 ** (bits + 1)) < 1 << 15:
        bits += 1
    return np.trunc(weights * 2.0**bits + np.copysign(0.5, weights)), bits


def _filter(distance: np.ndarray, cubic: bool) -> np.ndarray:
    if not cubic:
        return np.maximum(1 - distance, 0)
    a = -0.5
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * a
    return np.where(distance < 1, near, np.where(distance < 2, far, 0))
