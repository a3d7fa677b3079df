"""The module tree as the plain model would have it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_transfer.dissection.wrapping import unwrapped

_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ModuleTree:
    """Modules by plain name, in registration order: tuner layers and saved copies appear as the layer they wrap."""

    def __init__(self, root: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.children: dict[str, list[str]] = {}
        self.sizes: dict[str, int] = {}  # parameters under each module
        self._seen: set[int] = set()
        self._add("", root)

    def _add(self, name: str, module: nn.Module) -> None:
        module = unwrapped(module)
        self._seen.add(id(module))
        self.modules[name] = module
        self.children[name] = []
        size = sum(p.numel() for p in module.parameters(recurse=False))
        for key, child in module.named_children():
            if id(unwrapped(child)) not in self._seen:
                path = join(name, key)
                self.children[name].append(path)
                self._add(path, child)
                size += self.sizes[path]
        self.sizes[name] = size

    @property
    def root(self) -> nn.Module:
        return self.modules[""]

    def under(self, name: str) -> Iterator[str]:
        yield name
        for child in self.children[name]:
            yield from self.under(child)

    def atoms(self, name: str = "") -> Iterator[str]:
        """Parameters, buffers and modules without either, in registration order."""
        for path in self.under(name):
            tensors = self.own(path)
            yield from tensors
            if not tensors and not self.children[path] and path:
                yield path

    def own(self, path: str) -> list[str]:
        """The parameters and buffers that are a module's own."""
        module = self.modules[path]
        named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        return [join(path, key) for key, _ in named]

    def tensor(self, name: str) -> Any:
        """A parameter or buffer; None for a module."""
        path, _, key = name.rpartition(".")
        return None if name in self.modules else getattr(self.modules[path], key)

    def path_of(self, module: nn.Module) -> str:
        module = unwrapped(module)
        return next(path for path, other in self.modules.items() if other is module)

    def is_list(self, path: str) -> bool:
        return isinstance(self.modules[path], (nn.ModuleList, nn.Sequential))

    def is_module_list(self, path: str) -> bool:
        return isinstance(self.modules[path], nn.ModuleList)

    def is_leaf(self, path: str) -> bool:
        return not self.children[path]

    def has_weights(self, path: str) -> bool:
        """Whether a module holds more than a norm's scales and shifts."""
        return any(p.ndim >= 2 for name in self.under(path) for p in self.modules[name].parameters(recurse=False))

    def linears(self, path: str) -> list[str]:
        """Linear layers and convolutions under a module, in registration order."""
        return [name for name in self.under(path) if isinstance(self.modules[name], _LINEAR)]


@dataclass
class Parts:
    """What is known before every name has been placed."""

    rows: list[list[str]]  # the blocks, each a list of prefixes
    stem: list[str]
    neck: list[str]
    head: list[str]
    classifiers: tuple[str, ...]


def is_under(name: str, prefix: str) -> bool:
    """Whether a name is a prefix or inside it."""
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def join(path: str, key: str) -> str:
    """A child's path."""
    return f"{path}.{key}" if path else key


def final_layers(linears: list[str]) -> tuple[str, ...]:
    """The last of some linear layers, then those of distillation heads (head_dist, distillation_classifier)."""
    distilled = [name for name in linears if "dist" in name]
    return (*[name for name in linears if name not in distilled][-1:], *distilled[-1:])
