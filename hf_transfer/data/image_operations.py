"""Operations on batches of images, each image by its own factor, on any device.

Those on 8-bit images are Pillow's and torchvision's, rounded where those cut off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from .draws import Draws


def affine(pixels: Tensor, angle: Tensor, shift: Tensor, scale: Tensor, fill: Tensor) -> Tensor:
    """Rotates around the middle, scales and shifts; bilinear.

    Args:
        pixels: (N, C, H, W) uint8.
        angle: (N,) radians, clockwise.
        shift: (N, 2) to the right and down, in pixels.
        scale: (N,) > 0.
        fill: (C,) what is outside, 0 to 255.

    Returns:
        (N, C, H, W) uint8.
    """
    height, width = pixels.shape[-2:]
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    x = (torch.arange(width, device=pixels.device) + 0.5 - width / 2) - shift[:, :1]  # (N, W), of the result
    y = (torch.arange(height, device=pixels.device) + 0.5 - height / 2) - shift[:, 1:]  # (N, H)
    cos, sin, x, y = cos[:, None, None], sin[:, None, None], x[:, None, :], y[:, :, None]
    source = torch.stack([(cos * x + sin * y) * (2 / width), (cos * y - sin * x) * (2 / height)], dim=-1)
    fill = fill.view(-1, 1, 1)
    moved = grid_sample(pixels.float() - fill, source.float(), align_corners=False)  # (N, C, H, W), outside is 0
    return _bytes(moved + fill)


def brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Towards black at 0, as it is at 1. pixels (N, C, H, W) uint8, factor (N,) >= 0."""
    return _blend(pixels, torch.zeros((), device=pixels.device), factor)


def contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """Towards an image's mean grey at 0, as it is at 1."""
    mean = (grey(pixels).double().mean(dim=(1, 2, 3)) + 0.5).floor()
    return _blend(pixels, mean.float().view(-1, 1, 1, 1), factor)


def saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    """Towards grey at 0, as it is at 1."""
    return _blend(pixels, grey(pixels), factor)


def sharpness(pixels: Tensor, factor: Tensor) -> Tensor:
    """Towards a blurred image at 0, as it is at 1, sharper above; the border stays."""
    whole = pixels.float()
    across = whole[..., :-2] + whole[..., 1:-1] + whole[..., 2:]
    around = across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :]
    smooth = whole.clone()
    smooth[..., 1:-1, 1:-1] = ((around + 4 * whole[..., 1:-1, 1:-1]) / 13 + 0.5).floor()
    return _blend(pixels, smooth, factor)


def autocontrast(pixels: Tensor) -> Tensor:
    """Stretches each channel to 0 to 255; one of a single value stays."""
    lowest, highest = pixels.amin(dim=(2, 3), keepdim=True).float(), pixels.amax(dim=(2, 3), keepdim=True).float()
    span = highest - lowest
    stretched = (pixels.float() - lowest) * (255 / span.clamp(min=1))
    return torch.where(span > 0, _bytes(stretched), pixels)


def hue(pixels: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue of RGB images (N, 3, H, W) uint8 by shift (N,), in turns of the colour circle."""
    red, green, blue = (pixels.float() / 255).unbind(dim=1)  # (N, H, W)
    value, lowest = pixels.amax(dim=1).float() / 255, pixels.amin(dim=1).float() / 255
    chroma = value - lowest
    span = torch.where(chroma > 0, chroma, 1.0)
    sixth = torch.where(
        value == red,
        (green - blue) / span,
        torch.where(value == green, 2 + (blue - red) / span, 4 + (red - green) / span),
    )
    sixth = sixth + 6 * shift.float().view(-1, 1, 1)
    channels = []
    for offset in (5.0, 3.0, 1.0):  # red, green, blue, from hue, value and chroma
        k = torch.remainder(offset + sixth, 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return _bytes(torch.stack(channels, dim=1) * 255)


def grey(pixels: Tensor) -> Tensor:
    """(N, C, H, W) uint8 -> (N, 1, H, W) float32, whole numbers: the luma of ITU-R 601, as Pillow rounds it."""
    if pixels.shape[1] == 1:
        return pixels.float()
    red, green, blue = pixels.float().unbind(dim=1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536).floor()[:, None]


def changed_where(chosen: Tensor, operation: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """The images that are chosen, (N,) bool, changed, the others as they were."""
    if pixels.device.type != "cpu":  # to ask which they are would wait for the device
        return torch.where(chosen.view(-1, 1, 1, 1), operation(pixels), pixels)
    rows = chosen.nonzero().flatten()
    return pixels.index_copy(0, rows, operation(pixels[rows])) if len(rows) else pixels


def add_noise(pixels: Tensor, scale: Tensor, draws: Draws, purpose: int) -> Tensor:
    """Adds Gaussian noise in place.

    Args:
        pixels: (N, C, H, W) float32.
        scale: (N, C, 1, 1) its standard deviation.
        draws: Of the N rows.
        purpose: What is drawn.
    """
    count = pixels[0].numel()
    sixteen = draws.bits(purpose, math.ceil(count / 4)).view(torch.int16)[:, :count]  # 4 numbers of 16 bits in each
    noise = _normals(pixels.device)[sixteen.to(torch.int32) + 32768].view_as(pixels)
    return pixels.addcmul_(noise, scale)


@lru_cache
def _normals(device: torch.device) -> Tensor:
    """(65536,) float32: the normal quantiles of as many equal shares, so that 16 random bits draw one."""
    shares = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    return torch.special.ndtri(shares).float().to(device)


def _blend(pixels: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return _bytes(torch.lerp(other, pixels.float(), factor.float().view(-1, 1, 1, 1)))


def _bytes(values: Tensor) -> Tensor:
    return values.add_(0.5).clamp_(0, 255).to(torch.uint8)  # cut off, which rounds
