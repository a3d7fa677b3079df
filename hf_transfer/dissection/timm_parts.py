"""timm's own description of a network: `group_matcher` and `get_classifier`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from torch import nn

from hf_transfer.dissection.blocks import expand, is_auxiliary, rows_of_children
from hf_transfer.dissection.tree import ModuleTree, Parts, final_layers, is_under, join
from hf_transfer.dissection.wrapping import is_instance, plain_name
from hf_transfer.errors import TransferError


def timm_parts(tree: ModuleTree) -> Parts | None:
    root = tree.root
    wrapped = is_instance(root, "transformers", "TimmWrapperForImageClassification")
    at = "timm_model" if wrapped else ""
    net: Any = tree.modules[at]
    if not (wrapped or type(net).__module__.startswith("timm.models")):
        return None
    heads = net.get_classifier()
    heads = list(heads) if isinstance(heads, tuple) else [heads]
    heads = [tree.path_of(head) for head in heads if not isinstance(head, nn.Identity)]
    heads = [part for head in heads for part in (tree.children[head] if tree.is_module_list(head) else [head])]
    if not heads:
        raise TransferError(
            f"{type(net).__name__} was built without a classifier (num_classes=0). Build it with num_classes >= 1."
        )
    classifiers = tuple(name for head in heads for name in final_layers(tree.linears(head)))
    if not hasattr(net, "group_matcher"):  # pit, metaformer, csatv2 in timm 1.0.31
        rows, stem = rows_of_children(tree, at, heads)
        return Parts(rows, stem, [], heads, classifiers)
    stem, rows = _matched(tree, at, net, classifiers[0])
    heads += [path for path in tree.modules if is_auxiliary(path)]
    rows = [part for row in rows for part in _stage_split(tree, row)]
    return Parts(rows, stem, [], heads, classifiers)


def _matched(tree: ModuleTree, at: str, net: Any, classifier: str) -> tuple[list[str], list[list[str]]]:
    """Stem and blocks as timm's own matcher has them. What it sends to the tail, with the classifier, is left out."""
    matcher = net.group_matcher(coarse=False)
    if isinstance(matcher, dict):
        first = next(iter(matcher))
        stem_of = {name: group == 0 for name, group in _grouped(tree, at, net, {first: matcher[first]})}
        matcher = {key: _without_tail(spec) for key, spec in matcher.items()}
        groups = dict(_grouped(tree, at, net, matcher))
    else:
        groups = dict(_grouped(tree, at, net, matcher))
        stem_of = {name: group == 0 for name, group in groups.items()}
    tail = next(group for name, group in groups.items() if is_under(name, classifier))
    rows: dict[int, list[str]] = {}
    for name, group in sorted(groups.items(), key=lambda item: item[1]):
        if group != tail and not stem_of[name]:
            rows.setdefault(group, []).append(name)
    return [name for name in groups if stem_of[name] and groups[name] != tail], list(rows.values())


def _stage_split(tree: ModuleTree, row: list[str]) -> list[list[str]]:
    """The blocks of a stage, where timm's matcher knows no finer than stages (pvt_v2, maxxvit, gcvit and others)."""
    columns = zip(*(name.split(".") for name in row), strict=False)
    path = ".".join(keys[0] for keys in takewhile(lambda keys: len(set(keys)) == 1, columns))
    parameters = [name for name in tree.atoms(path) if isinstance(tree.tensor(name), nn.Parameter)]
    if re.search(r"stages\.\d+$", path) is None or set(parameters) != set(row):
        return [row]
    split = expand(tree, path, 1, [])
    return split if len(split) > 1 else [row]


def _grouped(tree: ModuleTree, at: str, net: Any, matcher: Any) -> Iterator[tuple[str, int]]:
    """timm's group of each parameter; an adapter's own are left out."""
    from timm.models import group_parameters

    parameters = {name for name in tree.atoms(at) if name not in tree.modules}
    for wrapped, group in group_parameters(net, matcher, reverse=True).items():
        name = join(at, plain_name(wrapped))
        if name in parameters:
            yield name, group


def _without_tail(spec: Any) -> Any:
    """Drops what timm sends behind everything (`norm`, `conv_head`; ordinal 99999): that is neck, not a block."""
    if isinstance(spec, str) or spec is None:
        return spec
    return [(pattern, suffix) for pattern, suffix in spec if suffix != (99999,) or re.compile(pattern).groups]
