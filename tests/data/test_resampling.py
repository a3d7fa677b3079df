"""Crop, resize and flip give Pillow's results, to a level; both ways of computing them are equal bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hf_transfer.data import resampling
from hf_transfer.data.resampling import crop_resize


def images(count: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def boxes_of(height: int, width: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    h, w = generator.integers(height // 2, height + 1, count), generator.integers(width // 2, width + 1, count)
    top, left = generator.integers(0, height - h + 1), generator.integers(0, width - w + 1)
    return np.stack([top, left, h, w], axis=1), generator.random(count) < 0.5


def reference(image: np.ndarray, box: np.ndarray, flip: bool, size: tuple[int, int], cubic: bool) -> np.ndarray:
    """(C, height, width) float64 by the formula: width first, clipped to what 8 bits hold, and not rounded."""
    top, left, height, width = box
    found = image[top : top + height, left : left + width].astype(np.float64)
    for axis, length in ((1, size[1]), (0, size[0])):
        extent = found.shape[axis]
        scale = max(extent / length, 1.0)
        centre = (np.arange(length)[:, None] + 0.5) * extent / length
        x = np.abs((np.arange(extent) + 0.5 - centre) / scale)
        if cubic:
            weights = np.where(
                x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0)
            )
        else:
            weights = np.maximum(1 - x, 0)
        weights /= weights.sum(axis=1, keepdims=True)
        found = np.clip(np.moveaxis(np.tensordot(weights, found, axes=(1, axis)), 0, axis), 0, 255)
    return (found[:, ::-1] if flip else found).transpose(2, 0, 1)


@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, (32, 32)), (28, 20, (36, 40)), (90, 120, (64, 48)), (300, 200, (32, 24))]
)
def test_it_is_pillows_and_the_formulas(height, width, size, cubic):
    found_in = images(6, height, width)
    boxes, flipped = boxes_of(height, width, 6)
    found = crop_resize(found_in, boxes, flipped, size, cubic=cubic).numpy().astype(int)
    resample = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    for pixels, image, box, flip in zip(found, found_in, boxes, flipped, strict=True):
        top, left, h, w = box.tolist()
        cut = Image.fromarray(image).crop((left, top, left + w, top + h))
        pillow = np.asarray(cut.resize(size[::-1], resample)).astype(int)
        pillow = (pillow[:, ::-1] if flip else pillow).transpose(2, 0, 1)
        assert np.abs(pixels - pillow).max() <= 1
        exact = reference(image, box, flip, size, cubic)
        assert np.abs(pixels - exact).max() <= (
            1.2 if cubic else 1.01
        )  # half a level for each axis; cubic weights sum up to more


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("cubic", [False, True])
def test_matrices_and_the_kernel_agree_bit_for_bit(cubic, channels):
    for height, width, size in ((32, 32, (32, 32)), (28, 28, (40, 40)), (40, 37, (30, 31)), (9, 12, (8, 9))):
        stack = images(8, height, width, channels)
        boxes, flipped = boxes_of(height, width, 8)
        axes = resampling._matrices(stack, boxes, flipped, size, cubic)
        assert axes is not None
        slow = resampling._one_by_one(list(stack), boxes, flipped, size, cubic)
        assert torch.equal(resampling._by_matrices(stack, *axes), slow)
        assert torch.equal(crop_resize(list(stack), boxes, flipped, size, cubic=cubic), slow)


def test_matrices_are_left_where_float32_would_not_hold_their_sums():
    stack = images(2, 40, 40)
    boxes, flipped = np.array([[0, 0, 40, 40]] * 2), np.zeros(2, bool)
    assert resampling._matrices(stack, boxes, flipped, (8, 8), False) is None
    found = crop_resize(stack, boxes, flipped, (8, 8), cubic=False)
    assert torch.equal(found, resampling._one_by_one(list(stack), boxes, flipped, (8, 8), False))
