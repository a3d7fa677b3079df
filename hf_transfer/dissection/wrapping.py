"""Looking through what PEFT, DDP and `torch.compile` put around a model and its layers."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

_WRAPPERS = ("base_model.model.", "base_model.", "module.", "_orig_mod.")
# DLA has a `base_layer` of its own, a Sequential: numbers follow it, and never PEFT's
_PEFT_PARTS = re.compile(
    r"\.(?:base_layer(?!\.\d)|original_module|modules_to_save\.[^.]+|modules_to_save|lora_[^.]+.*)(?=\.|$)"
)


def plain_name(name: str) -> str:
    """Strips what PEFT, DDP and `torch.compile` add to a parameter's or module's name.

    Args:
        name: for example `base_model.model.bert.pooler.dense.base_layer.weight`.

    Returns:
        The name in the plain model: `bert.pooler.dense.weight`. A parameter of a LoRA adapter gives its module.
    """
    for wrapper in ("module.", "_orig_mod.", "base_model.model."):
        name = name.removeprefix(wrapper)
    return _PEFT_PARTS.sub("", f".{name}")[1:]


def plain_model(model: Any) -> nn.Module:
    """Looks through DistributedDataParallel, `torch.compile` and PeftModel to the model itself.

    Args:
        model: any module.

    Returns:
        The innermost model. Adapter layers injected into it stay where they are.
    """
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif is_instance(model, "peft", "PeftModel"):
            model = model.get_base_model()
        else:
            return model


def candidates(name: str) -> Iterator[str]:
    """A wrapped name as it may read in the plain model, most literal first."""
    yield name
    yield _PEFT_PARTS.sub("", f".{name}")[1:]
    for wrapper in _WRAPPERS:
        if name.startswith(wrapper):
            yield from candidates(name.removeprefix(wrapper))


def unwrapped(module: Any) -> nn.Module:
    """The layer inside PEFT's tuner layer or saved copy."""
    while True:
        if is_instance(module, "peft.tuners.tuners_utils", "BaseTunerLayer"):
            module = module.get_base_layer()
        elif is_instance(module, "peft.utils.other", "AuxiliaryTrainingWrapper"):
            module = module.original_module
        else:
            return module


def is_instance(module: Any, library: str, name: str) -> bool:
    """isinstance without the import: nothing can be of a class whose library was never imported."""
    return library in sys.modules and isinstance(module, getattr(sys.modules[library], name))
