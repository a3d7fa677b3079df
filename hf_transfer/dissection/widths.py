"""Width at a block's output, as far as the module tree tells."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from hf_transfer.dissection.tree import ModuleTree


def width(tree: ModuleTree, path: str, after: tuple[str, ...]) -> int | None:
    """What a block's last layer puts out, if the next piece's first layer takes it, or its own first one did; where
    the library states widths, only if it states this one. Blocks that concatenate (Inception, DenseNet): None."""
    inside = list(tree.under(path))
    following = [name for prefix in after if prefix in tree.modules for name in tree.under(prefix)]
    out = _first_size(tree, reversed(inside), out=True)
    before, taken = _first_size(tree, inside, out=False), _first_size(tree, following, out=False)
    hidden = _hidden_size(tree)
    if hidden is not None:
        return hidden if hidden in (out, before, taken) else None
    stated = _stated_widths(tree)
    return out if out == taken or (out == before and (not stated or out in stated)) else None


def _hidden_size(tree: ModuleTree) -> int | None:
    """The one width of all blocks, of a transformers model without stages."""
    config = getattr(tree.root, "config", None)
    size = getattr(config, "hidden_size", None)
    return size if isinstance(size, int) and not hasattr(config, "depths") else None


def _stated_widths(tree: ModuleTree) -> set[int]:
    """timm's widths at the end of each stage."""
    info = getattr(tree.modules.get("timm_model", tree.root), "feature_info", None)
    return {stage["num_chs"] for stage in info} if isinstance(info, list) else set()


def _first_size(tree: ModuleTree, names: Iterable[str], *, out: bool) -> int | None:
    return next((size for name in names if (size := _size(tree.modules[name], out=out))), None)


def _size(module: Any, *, out: bool) -> int | None:
    """Features that a single layer puts out or takes; None for what is not a layer."""
    for attribute in ("out_features", "out_channels") if out else ("in_features", "in_channels"):
        if isinstance(getattr(module, attribute, None), int):
            return getattr(module, attribute)
    weight = getattr(module, "weight", None)  # a norm
    return weight.numel() if isinstance(weight, Tensor) and weight.ndim == 1 else None
