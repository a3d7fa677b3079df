"""The one map of a network: stem, ordered blocks, neck, head, and the width at each.

Freezing, layer-wise learning rates, gradual unfreezing, LoRA targets, distillation layer maps, prefix caching and
Grad-CAM all ask `Anatomy.of(model)`; none of them knows an architecture by name. What the map is made of comes from
the libraries themselves: timm's `group_matcher` and `get_classifier`, transformers' `base_model_prefix`,
`get_output_embeddings` and `input_modalities`; the rest is read off the module tree (`dissection/`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hf_transfer.dissection.channels import ChannelAxis
from hf_transfer.dissection.placement import place, prefixes_of
from hf_transfer.dissection.timm_parts import timm_parts
from hf_transfer.dissection.transformers_parts import plain_parts, transformers_parts
from hf_transfer.dissection.tree import ModuleTree
from hf_transfer.dissection.widths import width
from hf_transfer.dissection.wrapping import candidates, plain_model, plain_name
from hf_transfer.errors import TransferError

__all__ = ["Anatomy", "Block", "Taps", "plain_model", "plain_name"]


@dataclass(frozen=True)
class Block:
    """One of the ordered pieces between stem and head.

    Attributes:
        name: module path of the block (of its heaviest module where it has several), in the plain model.
        prefixes: every module path and parameter name that makes it up.
        width: channels (CNN) or hidden size at its output; None where the module tree does not tell.
    """

    name: str
    prefixes: tuple[str, ...]
    width: int | None


@dataclass(frozen=True)
class Anatomy:
    """Where everything in a network is, from input to output.

    Attributes:
        stem: prefixes (module paths, parameter names) of embeddings, positions, patch embedding, first convolution.
        blocks: ordered input to output.
        neck: prefixes between the last block and the head: final norm, pooler, last convolution.
        head: prefixes of what is new for a new task.
        classifiers: module paths of the layers that give the logits. The input of the first is the feature vector.
    """

    stem: tuple[str, ...]
    blocks: tuple[Block, ...]
    neck: tuple[str, ...]
    head: tuple[str, ...]
    classifiers: tuple[str, ...]
    _groups: Mapping[str, int] = field(repr=False, compare=False)

    @classmethod
    def of(cls, model: nn.Module) -> Anatomy:
        """Maps a model.

        Args:
            model: a transformers model with a head, a timm model, bare or in transformers' wrapper, a plain nn.Module
                (its children in order), or a PeftModel of any of them.

        Returns:
            The map, with names of the plain model.

        Raises:
            TransferError: the model has no layer that could give logits.
        """
        plain = plain_model(model)
        tree = ModuleTree(plain)
        parts = timm_parts(tree) or transformers_parts(tree) or plain_parts(tree)
        groups = place(tree, parts)
        depth = len(parts.rows)
        prefixes = prefixes_of(tree, groups, depth + 2)
        names = [_main_module(tree, row, prefixes[i]) for i, row in enumerate(parts.rows, 1)]
        following = [*prefixes[2:-2], prefixes[-2] or prefixes[-1]]
        widths = [width(tree, name, after) for name, after in zip(names, following, strict=False)]
        blocks = tuple(map(Block, names, prefixes[1:], widths))
        return cls(prefixes[0], blocks, prefixes[-2], prefixes[-1], parts.classifiers, groups)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def group(self, name: str) -> int:
        """The group that a parameter, buffer or module belongs to.

        Args:
            name: as in `named_parameters()`, `named_buffers()` or `named_modules()`, of the plain or wrapped model.

        Returns:
            0 for the stem, 1 to n for the blocks, n + 1 for the neck, n + 2 for the head. A module that spans several
            groups has its last one. What the plain model does not have (a learned prompt) is new: head.
        """
        names = list(candidates(name))
        found = next((self._groups[candidate] for candidate in names if candidate in self._groups), None)
        if found is not None:
            return found
        for candidate in names:  # a name inside a module of the plain model: an adapter's
            while candidate := candidate.rpartition(".")[0]:
                if candidate in self._groups:
                    return self._groups[candidate]
        return self.depth + 2

    def group_name(self, group: int) -> str:
        """A group's name: `stem`, the block's name, `neck` or `head`.

        Args:
            group: 0 to n + 2.

        Returns:
            The name.
        """
        return ("stem", *(block.name for block in self.blocks), "neck", "head")[group]


class Taps:
    """Reads the values that flow through named modules; a context manager that removes its hooks on exit.

    It may be entered again within: the hooks go with the outermost exit.

    A module that runs several times in a forward (shared layers) leaves its last value. Maps are always (N, C, H, W),
    as a view where the network has them as (N, H, W, C): Swin, Sequencer, VOLO and others.

    Args:
        model: the model that will run, plain or wrapped.
        names: module paths in the plain model, for example `anatomy.blocks[-1].name`.
        inputs: read each module's first input instead of its output.

    Attributes:
        values: name -> tensor, of the last forward. First tensor where a module returns several.

    Raises:
        TransferError: a name is not a module of the model.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], *, inputs: bool = False) -> None:
        self.values: dict[str, Tensor] = {}
        self._inputs = inputs
        self._model = plain_model(model)
        self._modules = _modules_called(self._model, names)
        self._channels: dict[str, ChannelAxis] = {}
        self._handles: list[Any] = []
        self._entered = 0

    def __enter__(self) -> Taps:
        if not self._entered:
            for name, module in self._modules:
                self._handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
        self._entered += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._entered -= 1
        if not self._entered:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def _hook(self, name: str) -> Any:
        def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            value = _first_tensor((args, kwargs)) if self._inputs else _first_tensor(output)
            if value is not None:
                self.values[name] = self._map(name, module, value) if value.dim() == 4 else value

        return keep

    def _map(self, name: str, module: nn.Module, value: Tensor) -> Tensor:
        if name not in self._channels:
            self._channels[name] = ChannelAxis(module, self._model)
        return value.movedim(self._channels[name].of(value.shape), 1)


def _main_module(tree: ModuleTree, row: list[str], prefixes: tuple[str, ...]) -> str:
    """The heaviest module of a block that runs."""
    modules = [name for name in row if name in tree.modules] or [name for name in prefixes if name in tree.modules]
    runs = [name for name in modules if not tree.is_module_list(name)] or modules
    return max(runs, key=lambda name: tree.sizes[name])


def _modules_called(model: nn.Module, names: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The modules that run under each plain name: the outermost, and both copies where PEFT keeps two."""
    found: dict[str, list[nn.Module]] = {name: [] for name in names}
    for path, module in model.named_modules():
        name = plain_name(path)
        inner = path and plain_name(path.rpartition(".")[0]) == name
        if name in found and not inner and not re.search(r"\.lora_", path):
            found[name].append(module)
    missing = [name for name, modules in found.items() if not modules]
    if missing:
        close = [name for name, _ in model.named_children()]
        raise TransferError(f"no module named {missing} in {type(model).__name__}; its children are {close}.")
    return [(name, module) for name, modules in found.items() for module in modules]


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((tensor for item in items if (tensor := _first_tensor(item)) is not None), None)
