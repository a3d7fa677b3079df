"""Blocks read off the module tree: the items of lists, the items of a stage's inner list, children in order."""

from __future__ import annotations

import re
from collections import Counter

from torch import nn

from hf_transfer.dissection.tree import ModuleTree, is_under

# what the libraries call a piece that feeds the blocks
INPUT = re.compile(r"(?:^|_)(?:emb|rel_pos|rotary|rope)")
_STEM_CHILD = re.compile(r"stem|\w*embed")


def rows_of_children(tree: ModuleTree, at: str, head: list[str]) -> tuple[list[list[str]], list[str]]:
    """Blocks of a module whose children run in order. Embeddings, and leaves before the first composite: stem."""
    rows: list[list[str]] = []
    for child in tree.children[at]:
        if child not in head:
            rows += expand(tree, child, 0 if tree.is_list(child) else 1, head, leaves=True)
    composite = [not tree.is_leaf(row[0]) for row in rows]
    first = composite.index(True) if any(composite) else 0
    start = len(at) + bool(at)
    is_stem = [
        i < first or isinstance(tree.modules[row[0]], nn.Embedding) or _STEM_CHILD.match(row[0], start) is not None
        for i, row in enumerate(rows)
    ]
    stem = [name for row, early in zip(rows, is_stem, strict=True) if early for name in row]
    return [row for row, early in zip(rows, is_stem, strict=True) if not early], stem


def chains(tree: ModuleTree, path: str, skip: list[str]) -> list[list[str]]:
    """Rows of every list of composite modules under a module; sibling lists of one length run in step (XLM, PVT)."""
    if any(is_under(path, other) for other in skip):
        return []
    if tree.is_list(path) and _is_chain(tree, path):
        return expand(tree, path, 0, skip)
    if INPUT.search(path.rpartition(".")[2]):
        return []
    rows: list[list[str]] = []
    done: set[str] = set()
    for child in tree.children[path]:
        if child in done or any(is_under(child, other) for other in skip):
            continue
        length = len(tree.children[child])
        step = [c for c in tree.children[path] if tree.is_module_list(c) and len(tree.children[c]) == length]
        if child in step and len(step) > 1 and length > 1 and any(_is_chain(tree, c) for c in step):
            done.update(step)
            for items in zip(*(tree.children[c] for c in step), strict=True):
                rows += _expand_row(tree, list(items), skip)
        else:
            rows += chains(tree, child, skip)
    return rows


def _expand_row(tree: ModuleTree, items: list[str], skip: list[str]) -> list[list[str]]:
    """One row of lists that run in step; the inner list of one of them carries the rest along."""
    inner = max(items, key=lambda item: tree.sizes[item])
    rows = expand(tree, inner, 1, skip) if tree.is_list(inner) else [[inner]]
    at = items.index(inner)
    rows[0] = [*items[:at], *rows[0]]
    rows[-1] = [*rows[-1], *items[at + 1 :]]
    return rows


def expand(tree: ModuleTree, path: str, level: int, skip: list[str], leaves: bool = False) -> list[list[str]]:
    """The blocks in a module: a list's items, a stage's inner list (two levels at most), or the module itself."""
    if any(is_under(path, other) for other in skip):
        return []
    inner = [path] if tree.is_list(path) else [c for c in tree.children[path] if _is_inner_chain(tree, path, c)]
    if inner and level < 2:
        return [row for item in tree.children[inner[0]] for row in expand(tree, item, level + 1, skip, leaves)]
    holds_head = any(is_under(other, path) for other in skip)
    if holds_head or not tree.has_weights(path) or (tree.is_leaf(path) and not leaves):
        return []
    return [[path]]


def _is_inner_chain(tree: ModuleTree, stage: str, path: str) -> bool:
    """Whether a child list is what a stage consists of: alike composite modules with most of its parameters."""
    items = [item for item in tree.children[path] if tree.sizes[item]]
    kinds = Counter(type(tree.modules[item]) for item in items)
    alike = any(count > len(items) / 2 for count in kinds.values())
    return tree.is_list(path) and alike and _is_chain(tree, path) and tree.sizes[path] >= tree.sizes[stage] / 2


def _is_chain(tree: ModuleTree, path: str) -> bool:
    return any(tree.sizes[item] and not tree.is_leaf(item) for item in tree.children[path])


def is_auxiliary(path: str) -> bool:
    """Auxiliary classifiers of Inception and GoogLeNet: beside the chain, used in training only."""
    return path.lower().rpartition(".")[2].startswith("aux") or ".aux" in f".{path.lower()}"
