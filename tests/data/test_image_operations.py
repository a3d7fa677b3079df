"""Operations on batches are torchvision's and Pillow's on single images, to a level; no bit depends on the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from hf_transfer._torchvision import make_torchvision_importable
from hf_transfer.data import image_operations as ops
from hf_transfer.data.augmentations import AUGMENTATIONS, PER_IMAGE, Augmentation
from hf_transfer.data.draws import Draws
from hf_transfer.data.random_boxes import random_crops

make_torchvision_importable()

from torchvision.transforms.v2 import functional as tv  # noqa: E402


def photo(channels: int = 3) -> torch.Tensor:
    """(4, C, 33, 40) uint8, smooth, with every brightness and colour."""
    y, x = np.mgrid[0:33, 0:40] / 8
    waves = [[np.sin(a * x + b * y + c) for c in range(channels)] for a, b in ((1, 2), (2, 1), (1, -1), (0.5, 0.2))]
    return torch.from_numpy((127.5 + 127 * np.array(waves)).astype(np.uint8))


def pillow(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy().squeeze())


def array(image: Image.Image) -> torch.Tensor:
    found = torch.from_numpy(np.array(image))
    return found.permute(2, 0, 1) if found.ndim == 3 else found[None]


def assert_close(found: torch.Tensor, expected: list[torch.Tensor], levels: float = 1) -> None:
    assert found.dtype == torch.uint8
    assert (found.int() - torch.stack(expected).int()).abs().max() <= levels


@pytest.mark.parametrize("channels", [1, 3])
def test_enhancements_are_pillows(channels):
    pixels, factors = photo(channels), torch.tensor([0.6, 1.0, 1.3, 2.0])
    by_pillow = {
        ops.brightness: ImageEnhance.Brightness, ops.contrast: ImageEnhance.Contrast,
        ops.saturation: ImageEnhance.Color, ops.sharpness: ImageEnhance.Sharpness,
    }  # fmt: skip
    for operation, enhancer in by_pillow.items():
        expected = [array(enhancer(pillow(x)).enhance(f)) for x, f in zip(pixels, factors.tolist(), strict=True)]
        assert_close(operation(pixels, factors), expected)
    assert_close(ops.autocontrast(pixels // 2), [array(ImageOps.autocontrast(pillow(x // 2))) for x in pixels])


def test_grey_is_pillows():
    pixels = photo()
    assert torch.equal(ops.grey(pixels).to(torch.uint8), torch.stack([array(pillow(x).convert("L")) for x in pixels]))


def test_hue_is_torchvisions():
    pixels, shifts = photo(), [-0.1, 0.0, 0.05, 0.1]
    expected = [tv.adjust_hue(x, shift) for x, shift in zip(pixels, shifts, strict=True)]
    assert_close(ops.hue(pixels, torch.tensor(shifts)), expected, levels=1)
    assert torch.equal(ops.hue(pixels, torch.zeros(4)), pixels)


def test_affine_is_torchvisions():
    """Inside; at the border torchvision blends a mask."""
    pixels, fill = photo(), torch.tensor([10.0, 20.0, 30.0])
    angles, shifts, scales = [15.0, -8.0, 0.0, 3.0], [[2, -3], [0, 0], [4, 1], [-1, 2]], [1.1, 0.9, 1.0, 1.05]
    found = ops.affine(
        pixels, torch.deg2rad(torch.tensor(angles)), torch.tensor(shifts).double(), torch.tensor(scales), fill
    )
    for i in range(4):
        expected = tv.affine(
            pixels[i], angles[i], shifts[i], scales[i], [0.0, 0.0], tv.InterpolationMode.BILINEAR, fill=[10, 20, 30]
        )
        inside = tv.affine(
            torch.full_like(pixels[i], 255), angles[i], shifts[i], scales[i], [0.0, 0.0],
            tv.InterpolationMode.BILINEAR, fill=[0, 0, 0],
        ) == 255  # fmt: skip
        assert (found[i].int() - expected.int()).abs()[inside].max() <= 1
        assert inside.float().mean() > 0.5
    corner = found[0][:, 0, 0].tolist()
    assert corner == [10, 20, 30]


def test_noise_is_normal_and_of_its_row():
    scale = torch.tensor([0.5, 2.0]).view(2, 1, 1, 1)
    found = ops.add_noise(torch.zeros(2, 3, 60, 70), scale, Draws(0, 0, torch.tensor([4, 9])), 5)
    for row, expected in zip(found.flatten(1), (0.5, 2.0), strict=True):
        z = (row / expected).double()
        assert abs(z.mean()) < 0.03
        assert z.std() == pytest.approx(1, abs=0.03)
        assert (z**4).mean() == pytest.approx(3, abs=0.3)
        assert abs((z[:-1] * z[1:]).mean()) < 0.03
    many = ops.add_noise(torch.zeros(20, 3, 60, 70), torch.ones(20, 1, 1, 1), Draws(0, 0, torch.arange(20)), 5)
    assert torch.equal(many[9] * 2.0, found[1])


def test_crops_are_distributed_as_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    blank = torch.empty(3, 60, 100)
    theirs = np.array([RandomResizedCrop.get_params(blank, [0.5, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    count = 4000
    found, coins = random_crops(
        np.full(count, 60), np.full(count, 100), Draws(0, 0, torch.arange(count)), 1, area=(0.5, 1.0)
    )
    assert (found[:, 0] + found[:, 2] <= 60).all() and (found[:, 1] + found[:, 3] <= 100).all() and found.min() >= 0
    for column in range(4):
        gaps = np.quantile(found[:, column], [0.1, 0.5, 0.9]) - np.quantile(theirs[:, column], [0.1, 0.5, 0.9])
        assert np.abs(gaps).max() <= 2
    assert coins.mean() == pytest.approx(0.5, abs=0.03)


def test_a_crop_that_never_fits_is_the_largest_in_the_middle():
    found, _ = random_crops(np.array([10]), np.array([200]), Draws(0, 0, torch.tensor([0])), 1, area=(0.5, 1.0))
    assert found.tolist() == [[0, 93, 10, 13]]  # 10 high, 4/3 as wide


NAMES = [name for name in AUGMENTATIONS if name not in ("none", *PER_IMAGE)]


@pytest.mark.parametrize("side", [32, 96])
@pytest.mark.parametrize("name", NAMES)
def test_bits_do_not_depend_on_the_batch(name, side):
    config = {
        "input_size": (3, side, side), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), "interpolation": "bicubic",
    }  # fmt: skip
    augmentation = Augmentation([name], config)
    stack = np.random.default_rng(0).integers(0, 256, (13, side, side, 3), dtype=np.uint8)

    def made(rows: list[int]) -> torch.Tensor:
        draws = Draws(0, 2, torch.tensor(rows))
        pixels = torch.from_numpy(stack[rows]).permute(0, 3, 1, 2)
        pixels = augmentation.crop(stack[rows], draws) if augmentation.crops else pixels
        return augmentation.on_tensors(augmentation.on_images(pixels, draws).float() / 255, draws)

    whole = made(list(range(13)))
    for rows in ([4], [12, 0, 7]):
        assert torch.equal(made(rows), whole[rows])
