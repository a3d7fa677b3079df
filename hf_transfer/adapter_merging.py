"""Adapters folded into their layers' weights for the length of an evaluation, and the weights back bit for bit.

A merged layer costs what it did before it was adapted. peft's own `unmerge` subtracts what `merge` added, and leaves
rounding behind: here the layers get copies to merge into, and the tensors that they had are put back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .adapters import is_adapted


@contextmanager
def merged(model: nn.Module) -> Iterator[bool]:
    """Within it an adapted network computes with merged weights, where each of its adapters can be merged exactly.

    Args:
        model: Any network; only a PeftModel with LoRA on layers in float32 or more, all of them active, is merged.

    Yields:
        Whether it is merged; the network is as it was if not.
    """
    layers = _mergeable(model)
    kept = [
        (layer, parameter, parameter.data) for layer in layers for parameter in layer.get_base_layer().parameters()
    ]
    try:
        for _, parameter, data in kept:
            parameter.data = data.clone()
        for layer in layers:
            layer.merge()
        yield bool(layers)
    finally:
        for layer, parameter, data in kept:
            parameter.data = data
            layer.merged_adapters.clear()


def _mergeable(model: nn.Module) -> list[Any]:
    """All layers with adapters, if each can be merged; else none."""
    if not is_adapted(model):
        return []
    from peft.tuners.lora import Conv2d, Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1

    def fits(layer: Any) -> bool:
        if type(layer) not in (Linear, Conv2d) or layer.merged or layer.disable_adapters:
            return False
        if any(name in layer.lora_variant for name in layer.active_adapters):  # DoRA and its like
            return False
        base = layer.get_base_layer()
        return type(base) in (nn.Linear, nn.Conv2d) and all(
            parameter.dtype in (torch.float32, torch.float64) and owners[id(parameter)] == 1
            for parameter in base.parameters()
        )

    return layers if all(map(fits, layers)) else []
