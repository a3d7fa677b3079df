"""Adapters by peft: where they go, what is saved with them, and how they fold into the base.

peft matches module names by suffix and knows no timm network. Targets here are whole paths taken from the anatomy:
layers of blocks and neck only, so that `proj` never hits `patch_embed.proj`. The head is trained and saved whole.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import re
import sys
import warnings
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from ._torchvision import make_torchvision_importable
from .anatomy import Anatomy
from .errors import TransferError
from .freezing import BatchNormPolicy, hold_frozen, shortened, thaw

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from peft import PeftConfig

logger = logging.getLogger(__name__)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (nn.Linear, nn.MultiheadAttention, *_CONVOLUTIONS)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)  # in the path of every attention layer of timm, transformers


def is_adapted(model: nn.Module) -> bool:
    """Whether a network is a peft.PeftModel."""
    return _is_instance(model, "peft", "PeftModel")


def _is_instance(module: nn.Module, library: str, kind: str) -> bool:
    """isinstance without the import: nothing is of a class whose library was never imported."""
    return library in sys.modules and isinstance(module, getattr(sys.modules[library], kind))


def adaptable_layers(model: nn.Module, anatomy: Anatomy) -> dict[str, nn.Module]:
    """The layers of blocks and neck that LoRA can adapt.

    Left out are convolutions that peft's twin cannot follow (grouped, dilated, with padding that depends on the input,
    with standardised weights), and layers whose weight is read past their call: an adapter there would never run.

    Args:
        model: A network without adapters.
        anatomy: Its anatomy.

    Returns:
        Module path -> module, input to output.
    """
    modules = dict(model.named_modules())
    found, left_out = {}, []
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        inside = 1 <= anatomy.group(name) <= anatomy.depth + 1 and not _within(name, (*anatomy.head, *anatomy.stem))
        if not inside or not _is_layer(module):
            continue
        if _is_followed(module) and not _is_read_past(modules[parent], child):
            found[name] = module
        elif not isinstance(modules[parent], nn.MultiheadAttention):
            left_out.append(name)
    if left_out:
        logger.info("%d layers take no adapter: %s", len(left_out), ", ".join(shortened(left_out, 6)))
    return found


def _is_layer(module: nn.Module) -> bool:
    """Linear layers, GPT-2's transposed ones among them, convolutions, and torch's attention, adapted as a whole."""
    return isinstance(module, _LAYERS) or _is_instance(module, "transformers.pytorch_utils", "Conv1D")


def _is_followed(module: nn.Module) -> bool:
    """Whether the low-rank branch that peft puts beside a layer has the layer's own geometry."""
    if isinstance(module, _CONVOLUTIONS):
        # peft 0.21 copies kernel, stride and padding, and no more, into a layer of the same class, whatever that does
        plain = type(module).forward in [kind.forward for kind in _CONVOLUTIONS] and module.padding_mode == "zeros"
        return plain and module.groups == 1 and set(module.dilation) == {1} and not parametrize.is_parametrized(module)
    if isinstance(module, nn.MultiheadAttention):
        return bool(module._qkv_same_embed_dim)
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        return _is_product(module) and not parametrize.is_parametrized(module)
    return not parametrize.is_parametrized(module)


@torch.no_grad()
def _is_product(layer: nn.Linear) -> bool:
    """Whether a linear layer with a forward of its own still gives W x + b: Falcon's does, a mixture's router not."""
    weight = layer.weight
    x = torch.linspace(-1, 1, layer.in_features, dtype=weight.dtype, device=weight.device)[None]  # (1, D)
    try:
        found = layer(x)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    product = nn.functional.linear(x, weight, layer.bias)
    if not torch.is_tensor(found) or found.shape != product.shape:
        return False
    return found.is_meta or torch.allclose(found.float(), product.float(), rtol=1e-2, atol=1e-3)


def _is_read_past(parent: nn.Module, child: str) -> bool:
    """Whether a module uses its layer `child` otherwise than by calling it.

    torch's MultiheadAttention and WavLM compute with the weight alone. So do timm's BEiT, EVA and SwinV2 where q and v
    have biases of their own, and torch's TransformerEncoderLayer in eval mode, although their code also has the call.
    DaViT asks a convolution for its kernel size, which peft's twin does not have.
    """
    if isinstance(parent, nn.TransformerEncoderLayer):
        return True
    read, called, measured = _uses(cast(Any, type(parent)), child)
    own_biases = child == "qkv" and getattr(parent, "q_bias", None) is not None
    own_biases = own_biases and not getattr(parent, "qkv_bias_separate", False)
    return measured or (read and (own_biases or not called))


@functools.cache
def _uses(kind: Any, child: str) -> tuple[bool, bool, bool]:
    """Whether a module class reads the weight of its layer `child`, calls the layer, in its forward asks its shape."""
    try:
        whole, forward = inspect.getsource(kind), inspect.getsource(kind.forward)
    except (OSError, TypeError):  # defined in an interactive session: there is no source to look at
        return False, True, False
    read = re.search(rf"self\.{child}\.weight\b(?!\.(dtype|device|shape))", whole)
    measured = re.search(rf"self\.{child}\.(kernel_size|stride|padding|dilation)\b", forward)
    return read is not None, f"self.{child}(" in whole, measured is not None


def lora_targets(model: nn.Module, anatomy: Anatomy, targets: str | Sequence[str]) -> list[str]:
    """The paths of the layers that LoRA adapts.

    Args:
        model: A network without adapters.
        anatomy: Its anatomy.
        targets: "all" (every adaptable layer of blocks and neck), "attention" (those inside attention), or names:
            whole paths, or their last parts ("query", "attn.qkv"), which are looked for in blocks and neck.

    Returns:
        Paths, input to output.

    Raises:
        TransferError: For an unknown preset or a name that matches no layer that can be adapted.
    """
    layers = adaptable_layers(model, anatomy)
    if targets == "all":
        chosen = list(layers)
    elif targets == "attention":
        chosen = [name for name in layers if _ATTENTION.search(name)]
    elif isinstance(targets, str):
        raise TransferError(
            f'LoRA targets are "all", "attention" or a list of names, got {targets!r}: write [{targets!r}].'
        )
    else:
        chosen = _named(model, anatomy, layers, targets)
    if not chosen:
        raise TransferError(
            f"LoRA targets {targets!r} match no layer of {type(model).__name__}. {_available(layers)} "
            'Use targets="all" or name some of them.'
        )
    return chosen


def _named(model: nn.Module, anatomy: Anatomy, layers: dict[str, nn.Module], targets: Sequence[str]) -> list[str]:
    modules = dict(model.named_modules())
    chosen: set[str] = set()
    for target in targets:
        if _within(target, anatomy.head):
            raise TransferError(f"LoRA target {target!r} is the head, which trains and is saved whole. Leave it out.")
        hits = {name for name in layers if name == target or name.endswith(f".{target}")}
        module = modules.get(target)
        if module is not None and _is_layer(module) and _is_followed(module):
            hits.add(target)  # a whole path is meant as it is written, in the stem too
        if not hits:
            raise TransferError(f"LoRA target {target!r} matches no layer that can be adapted. {_available(layers)}")
        chosen |= hits
    return [name for name in modules if name in chosen]


def _available(layers: Iterable[str]) -> str:
    """What can be named, for an error: the last parts of the paths, with numbers taken out."""
    endings = {".".join(part for part in name.split(".")[-3:] if not part.isdigit()): None for name in layers}
    return f"Layers that can be adapted end in: {', '.join(shortened(list(endings))) or 'there are none'}."


def _within(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def head_to_save(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """The modules of the head, which an adapter trains and saves whole.

    A language model's output layer is pretrained and as large as its vocabulary: it stays frozen.

    Args:
        model: A network without adapters.
        anatomy: Its anatomy.

    Returns:
        Paths for peft's `modules_to_save`.
    """
    modules = dict(model.named_modules())
    transformer: Any = model if _is_instance(model, "transformers", "PreTrainedModel") else None
    words = transformer and transformer.get_output_embeddings()
    names = []
    for prefix in anatomy.head:
        for name in _callable_parts(prefix, modules):
            if modules[name] is not words and any(True for _ in modules[name].parameters()):
                names.append(name)
    return names


def _callable_parts(name: str, modules: dict[str, nn.Module]) -> list[str]:
    """A module, or the members of a list, which peft cannot wrap."""
    if name not in modules:
        return []  # a bare parameter
    if isinstance(modules[name], nn.ModuleList | nn.ModuleDict):
        return [f"{name}.{child}" for child, _ in modules[name].named_children()]
    return [name]


def attach(model: nn.Module, anatomy: Anatomy, config: PeftConfig, batch_norm: BatchNormPolicy) -> nn.Module:
    """Wraps a network into a peft.PeftModel that trains adapters and head.

    Args:
        model: A network without adapters; its layers are replaced in place.
        anatomy: Its anatomy.
        config: Any of peft's; it is not changed. Where it has no `modules_to_save`, the head is put there.
        batch_norm: See `freezing.hold_frozen`. Under "train" the BatchNorm layers are saved with the adapter: their
            statistics have moved.

    Returns:
        The PeftModel.

    Raises:
        TransferError: If peft cannot adapt this network so.
    """
    make_torchvision_importable()
    from peft import get_peft_model

    config = copy.deepcopy(config)
    saves_by_anatomy = getattr(config, "modules_to_save", ...) is None
    if saves_by_anatomy:
        names = head_to_save(model, anatomy)
        if batch_norm == "train":
            names += [n for n, m in model.named_modules() if isinstance(m, _BatchNorm) and not _within(n, names)]
        config.modules_to_save = names or None  # type: ignore[attr-defined]
    thaw(model)
    try:
        with warnings.catch_warnings():
            # Where a network mixes Linear and Conv1D, peft sets this per layer, and says so for each.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            # peft 0.21 asks transformers >= 5.20 by a name that it renames; goes when PeftModel.__init__ asks for
            # `is_activation_checkpointing`.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            adapted: nn.Module = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        layers = adaptable_layers(model, anatomy)
        raise TransferError(f"peft cannot adapt this network: {error} {_available(layers)}") from error
    if saves_by_anatomy:
        _train_only_head(adapted, anatomy)
    hold_frozen(adapted, anatomy, batch_norm)
    return adapted


def _train_only_head(adapted: nn.Module, anatomy: Anatomy) -> None:
    """Of what is saved whole, BatchNorm is there for its statistics, and more of it (`se.fc`) because peft takes every
    module whose path ends in a name (`fc`)."""
    for name, parameter in adapted.named_parameters():
        if ".modules_to_save." in name and anatomy.group(name) != anatomy.depth + 2:
            parameter.requires_grad_(False)


def merge(model: nn.Module) -> nn.Module:
    """Folds the adapters of a PeftModel into its base network.

    Args:
        model: A PeftModel, which is used up; any other network is returned as it is.

    Returns:
        The plain network, its trained head and its labels in place; everything in it trains again.

    Raises:
        TransferError: If its kind of adapter cannot be folded into weights.
    """
    if not is_adapted(model):
        return model
    peft_model: Any = model
    try:
        merged: nn.Module = peft_model.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError) as error:
        kind = peft_model.peft_config[peft_model.active_adapter].peft_type
        raise TransferError(f"peft cannot fold {kind} adapters into the base: {error}") from error
    thaw(merged)
    return merged
