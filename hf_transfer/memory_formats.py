"""Where the channels of convolutional weights lie in memory: last, where that makes a network faster.

Measured with torch 2.14 on one CPU core (benchmarks/memory_formats.py): a training step of networks with grouped
convolutions takes 0.6 to 0.8 of the time; of ResNets and transformers about the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

GROUPED_SHARE = 0.1  # of the 2-D convolutions, from which on it pays


def to_channels_last(model: nn.Module) -> None:
    """Lays out the weights of 2-D convolutions with the channels last; their values and shapes stay.

    A convolution with such a weight computes and returns its values so too, whatever it is given.

    Args:
        model: Any network; changed in place.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and "weight" in module._parameters:
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as files hold it, safetensors' among them: values in the order of their indices."""
    return {name: value.contiguous() for name, value in state.items()}


def channels_last_pays(model: nn.Module) -> bool:
    """Whether a network has as many grouped 2-D convolutions as those had that were measured to be faster.

    Args:
        model: Any network.
    """
    groups = [module.groups for module in model.modules() if isinstance(module, nn.Conv2d)]
    return sum(n > 1 for n in groups) > GROUPED_SHARE * len(groups)
