"""The lists that hold a network's blocks, and which of these blocks a smaller network keeps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..anatomy import Anatomy
from ..errors import TransferError

_ITEM = re.compile(r"(.+)\.(\d+)")


@dataclass(frozen=True)
class Chain:
    """Blocks in a row that are the items of a list: a whole encoder, or a stage of it.

    Attributes:
        lists: Paths of the list; of several where they run in step (XLM).
        length: Number of its blocks.
    """

    lists: tuple[str, ...]
    length: int


@dataclass(frozen=True)
class Cut:
    """The blocks that stay.

    Attributes:
        chains: All chains, input to output.
        kept: For each the blocks that stay, ascending.
    """

    chains: tuple[Chain, ...]
    kept: tuple[tuple[int, ...], ...]

    @property
    def lengths(self) -> list[int]:
        """Number of blocks that stay in each chain."""
        return [len(each) for each in self.kept]

    def new_name(self, name: str) -> str | None:
        """The name that a tensor has in the smaller network; None where its block goes."""
        for path, kept in self._lists():
            if name.startswith(f"{path}."):
                number, dot, rest = name[len(path) + 1 :].partition(".")
                return f"{path}.{kept.index(int(number))}{dot}{rest}" if int(number) in kept else None
        return name

    def moves(self) -> Iterator[tuple[str, int, int]]:
        """List, old number and new number of each block that stays."""
        for path, kept in self._lists():
            yield from ((path, old, new) for new, old in enumerate(kept))

    def _lists(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for chain, kept in zip(self.chains, self.kept, strict=True):
            yield from ((path, kept) for path in chain.lists)


def refused(model: Any, reason: str) -> TransferError:
    """The error of a network that cannot be carved."""
    kind = getattr(model.config, "architecture", None) or model.config.model_type
    return TransferError(
        f"{type(model).__name__} ({kind}) cannot be carved: {reason}. Any smaller network of load_backbone() can be "
        "the student in its place."
    )


def chains_of(model: Any) -> tuple[Chain, ...]:
    """The lists that hold the blocks, input to output.

    Raises:
        TransferError: A block is not an item of a list, a list holds other things too, or there is no block to spare.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    lists = {name: len(each) for name, each in modules.items() if isinstance(each, (nn.ModuleList, nn.Sequential))}
    blocks = Anatomy.of(model).blocks
    # What is of a block but not in a list is its stage's, such as the layer that halves the resolution before it
    items = [[item for prefix in block.prefixes if (item := _item(lists, prefix))] for block in blocks]
    paths = {path for each in items for path, _ in each}
    items = [_inside_stage(lists, each, paths) for each in items]
    found: dict[tuple[str, ...], list[int]] = {}
    for block, each in zip(blocks, items, strict=True):
        if not each or len({number for _, number in each}) > 1:
            raise refused(model, f"its block {block.name} is not an item of a list of blocks")
        found.setdefault(tuple(path for path, _ in each), []).append(each[0][1])
    for chain, numbers in found.items():
        if any(numbers != list(range(lists[path])) for path in chain):
            raise refused(model, f"{chain[0]} holds other things than the blocks {numbers}")
    if len(blocks) == len(found):
        where = f" in each of {len(found)} stages" if len(found) > 1 else ""
        raise refused(model, f"it has no block to spare: one{where} (layers that share their weights count as one)")
    return tuple(Chain(chain, len(numbers)) for chain, numbers in found.items())


def _item(lists: dict[str, int], path: str) -> tuple[str, int] | None:
    """List and number of a path that is a list's item, or a list of one, by which the anatomy calls its only block."""
    match = _ITEM.fullmatch(path)
    if match is not None and match[1] in lists:
        return match[1], int(match[2])
    return (path, 0) if lists.get(path) == 1 else None


def _inside_stage(lists: dict[str, int], items: list[tuple[str, int]], paths: set[str]) -> list[tuple[str, int]]:
    """The only block of a stage, which the anatomy calls by the stage's name: found where other stages have theirs."""
    if len(items) != 1:
        return items
    path, number = items[0]
    inner = {match[1] for other in paths if (match := re.fullmatch(rf"{re.escape(path)}\.\d+(.*)", other))}
    single = [name for each in inner if lists.get(name := f"{path}.{number}{each}") == 1]
    return [(single[0], 0)] if single else items


def chosen(model: Any, chains: tuple[Chain, ...], layers: int | Sequence[int]) -> Cut:
    """Which blocks stay.

    Args:
        model: The network, for messages.
        chains: Its chains.
        layers: How many, or which by their index over all chains.

    Raises:
        TransferError: They are out of range, in disorder, or leave a chain empty.
    """
    lengths = [chain.length for chain in chains]
    depth, name = sum(lengths), type(model).__name__
    if isinstance(layers, int):
        if not len(chains) <= layers <= depth or isinstance(layers, bool):
            each = f" in {len(chains)} stages, each of which keeps one at least" if len(chains) > 1 else ""
            raise TransferError(
                f"layers={layers!r}: {name} has {depth} blocks{each}. Valid are {len(chains)} to {depth}, or a list "
                "of blocks."
            )
        return Cut(chains, tuple(spread(n, k) for n, k in zip(lengths, _shares(lengths, layers), strict=True)))
    indices = [number + depth if number < 0 else number for number in layers]
    if not indices or indices != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < depth:
        raise TransferError(
            f"layers={list(layers)!r} must be blocks of {name} in ascending order, each once, from 0 to {depth - 1} "
            f"(or -{depth} to -1, counted from the end)."
        )
    kept, start = [], 0
    for n in lengths:
        kept.append(tuple(i - start for i in indices if start <= i < start + n))
        if not kept[-1]:
            raise TransferError(
                f"layers={list(layers)!r} keeps none of the blocks {start} to {start + n - 1}, which are a stage of "
                f"{name}: each stage keeps one at least."
            )
        start += n
    return Cut(chains, tuple(kept))


def spread(length: int, count: int) -> tuple[int, ...]:
    """Evenly spaced blocks, the first and the last among them: DistilBERT's 0, 2, 4, 7, 9, 11 for 6 of 12."""
    return tuple(round(i * (length - 1) / max(count - 1, 1)) for i in range(count))


def _shares(lengths: list[int], total: int) -> list[int]:
    """How many blocks each stage keeps: in proportion (as Sainte-Laguë shares out seats), one at least."""
    shares = [1] * len(lengths)
    for _ in range(total - len(lengths)):
        open_stages = [i for i, n in enumerate(lengths) if shares[i] < n]
        shares[min(open_stages, key=lambda i: (2 * shares[i] + 1) / lengths[i])] += 1
    return shares
