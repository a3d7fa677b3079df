"""Which axis of a module's 4-D values holds the channels: some image networks keep maps as (N, H, W, C)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


class ChannelAxis:
    """Reads it off the shape and off the layers of a module.

    Two signs in the shape: the channels are a size that the module's parameters have, and stand beside two equal axes
    where the map is square. If these agree they are right. Else convolutions work on (N, C, H, W), linear layers and
    layer norms on (N, H, W, C), and a module that holds both (ConvNeXt's blocks, TinyViT's) turns maps around inside:
    there either sign decides, and where all three axes are equal, timm's `output_fmt`.

    Args:
        module: Whose values they are.
        network: The plain model around it.
    """

    def __init__(self, module: nn.Module, network: nn.Module) -> None:
        root: Any = getattr(network, "timm_model", network)
        self._channels_last = getattr(root, "output_fmt", None) == "NHWC"
        layers = list(module.modules())
        self._first = any(_is_first(layer) for layer in layers)
        self._last = any(_is_last(layer) for layer in layers)
        self._sizes = {size for parameter in module.parameters() for size in parameter.shape[:2]} - {1}

    def of(self, shape: Sequence[int]) -> int:
        """The axis.

        Args:
            shape: Of a value, (N, C, H, W) or (N, H, W, C).

        Returns:
            1 or 3.
        """
        _, a, b, c = shape
        by_size = 0 if (a in self._sizes) == (c in self._sizes) else 1 if a in self._sizes else 3
        by_square = 0 if (b == c) == (a == b) else 1 if b == c else 3
        by_layers = 0 if self._first == self._last else 1 if self._first else 3
        if by_layers == 1 and self._channels_last:
            by_layers = 0  # a convolution among layers on (N, H, W, C) may be turned around in the module
        if by_size != by_square and by_layers:
            return by_layers
        return (
            by_size or by_square or by_layers or (3 if self._channels_last and (self._last or not self._first) else 1)
        )


def _is_first(layer: nn.Module) -> bool:
    """Convolutions, and norms over channels: timm's LayerNorm2d is an nn.LayerNorm all the same."""
    return isinstance(layer, (nn.Conv2d, nn.GroupNorm)) or "2d" in type(layer).__name__.lower()


def _is_last(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Linear, nn.LayerNorm)) and not _is_first(layer)
