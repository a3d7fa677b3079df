"""A group for every name: the pieces found, and by position what none of them claims."""

from __future__ import annotations

import re
from bisect import bisect

from torch import nn

from hf_transfer.dissection.blocks import INPUT
from hf_transfer.dissection.tree import ModuleTree, Parts, is_under

STEM = 0
# what follows the blocks, though some models register it first
_OUTPUT = re.compile(r"^(norm|pooler|final\w*|project_out|\w*_after)$")


def place(tree: ModuleTree, parts: Parts) -> dict[str, int]:
    """A group for every parameter, buffer and module: claimed names first, then parameters, then what has none."""
    depth = len(parts.rows)
    given = dict.fromkeys(parts.stem, STEM)
    given |= {name: i for i, row in enumerate(parts.rows, 1) for name in row}
    given |= dict.fromkeys(parts.neck, depth + 1) | dict.fromkeys(parts.head, depth + 2)
    atoms = list(tree.atoms())
    groups = {name: group for name in atoms if (group := _given(name, given)) is not None}
    position = _Position(tree, atoms, groups, depth)
    parameters = {name for name in atoms if isinstance(tree.tensor(name), nn.Parameter)}
    groups |= {name: position.of(name) for name in atoms if name in parameters and name not in groups}
    beside = _groups_inside(tree, groups)
    groups |= {name: position.of(name, beside) for name in atoms if name not in groups}
    return groups | {path: max(inside) for path, inside in _groups_inside(tree, groups).items() if inside}


def _given(name: str, given: dict[str, int]) -> int | None:
    """The group of the longest given prefix of a name."""
    while name:
        if name in given:
            return given[name]
        name = name.rpartition(".")[0]
    return None


def _groups_inside(tree: ModuleTree, groups: dict[str, int]) -> dict[str, set[int]]:
    """For each module the groups of what is in it."""
    inside: dict[str, set[int]] = {}
    for path in reversed(tree.modules):  # children before parents
        own = {groups[name] for name in (path, *tree.own(path)) if name in groups}
        inside[path] = own.union(*(inside[child] for child in tree.children[path]))
    return inside


class _Position:
    """Where a name that nobody claimed belongs, by its place in the order of registration."""

    def __init__(self, tree: ModuleTree, atoms: list[str], claimed: dict[str, int], depth: int) -> None:
        self.tree, self.atoms, self.claimed, self.depth = tree, atoms, dict(claimed), depth
        self.at = {name: i for i, name in enumerate(atoms)}
        self.blocks = [i for i, name in enumerate(atoms) if 0 < claimed.get(name, 0) <= depth]
        inside = _groups_inside(tree, self.claimed)
        self.holds_blocks = {path for path, groups in inside.items() if any(0 < group <= depth for group in groups)}

    def of(self, name: str, beside: dict[str, set[int]] | None = None) -> int:
        """Stem before the first block, neck or head after the last, the nearer block's in between.

        Args:
            name: a parameter, or, with `beside`, a buffer or a module without parameters.
            beside: for each module the groups of the parameters in it: such a name goes where its neighbours are.
        """
        owner = name if name in self.tree.modules else name.rpartition(".")[0]
        around = owner
        while beside is not None and not beside[around] and around:
            around = around.rpartition(".")[0]
        if beside is not None and len(beside[around]) == 1:
            return min(beside[around])
        piece = self._piece(owner)
        key = piece.rpartition(".")[2]
        i = bisect(self.blocks, self.at[name])
        here = [k for k, at in enumerate(self.blocks) if is_under(self.atoms[at], piece.rpartition(".")[0])]
        if _OUTPUT.search(key) and here and here[0] >= i:  # registered before the blocks that it follows
            i = here[-1] + 1
        elif i == 0 or (self._feeds(piece) and (i == len(self.blocks) or not self.tree.linears(piece))):
            return STEM  # tables and norms of embeddings stand beside the blocks, wherever they were registered
        if i == len(self.blocks):
            if not _OUTPUT.search(key) and self._follows_table(piece):
                return STEM  # the norm and convolution of DeBERTa's relative positions
            return self.depth + 1 if beside is None else max(self.depth + 1, *beside[around])
        previous, following = (self.atoms[self.blocks[k]] for k in (i - 1, i))
        shared = _shared(name, previous), _shared(name, following)
        to_previous = shared[0] > shared[1] or (shared[0] == shared[1] and piece and not self.tree.has_weights(piece))
        return self.claimed[previous if to_previous else following]  # a norm or activation goes with what it follows

    def _feeds(self, piece: str) -> bool:
        key = piece.rpartition(".")[2]
        is_table = isinstance(self.tree.modules.get(piece), nn.Embedding)
        return is_table or bool(INPUT.search(key) and not _OUTPUT.search(key))

    def _follows_table(self, piece: str) -> bool:
        """Whether a table of embeddings was registered between the last block and a piece beside it."""
        beside = self.tree.children[piece.rpartition(".")[0]]
        last = max((i for i, path in enumerate(beside) if path in self.holds_blocks), default=len(beside))
        between = beside[last : beside.index(piece)] if piece in beside else []
        return any(isinstance(self.tree.modules[path], nn.Embedding) for path in between)

    def _piece(self, owner: str) -> str:
        """The largest module around a name that holds no block; empty where the owner itself does."""
        piece = ""
        while owner and owner not in self.holds_blocks:
            piece, owner = owner, owner.rpartition(".")[0]
        return piece


def prefixes_of(tree: ModuleTree, groups: dict[str, int], last: int) -> list[tuple[str, ...]]:
    """For each group the largest modules that belong to it alone, and single names where a module is shared."""
    found: list[list[str]] = [[] for _ in range(last + 1)]

    def visit(path: str) -> None:
        inside = {groups[name] for name in tree.atoms(path)}
        if len(inside) == 1 and path:
            found[inside.pop()].append(path)
            return
        for name in tree.own(path):
            found[groups[name]].append(name)
        for child in tree.children[path]:
            visit(child)

    visit("")
    return [tuple(names) for names in found]


def _shared(a: str, b: str) -> int:
    """Number of leading components that two names share."""
    pairs = zip(a.split("."), b.split("."), strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(a.count("."), b.count(".")) + 1)
