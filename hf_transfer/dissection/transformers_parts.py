"""What transformers says of a model: `base_model_prefix`, output embeddings, what its parts take as input."""

from __future__ import annotations

from typing import Any

from hf_transfer.dissection.blocks import INPUT, chains, is_auxiliary, rows_of_children
from hf_transfer.dissection.tree import ModuleTree, Parts, final_layers, is_under
from hf_transfer.dissection.wrapping import is_instance
from hf_transfer.errors import TransferError


def transformers_parts(tree: ModuleTree) -> Parts | None:
    root: Any = tree.root
    if not is_instance(root, "transformers", "PreTrainedModel"):
        return None
    prefix = root.base_model_prefix
    children = tree.children[""]
    if not children:
        return None
    if prefix in children:
        trunks = [prefix]
    else:
        trunks = [child for child in children if chains(tree, child, [])] or children[:1]
    last = children.index(trunks[-1])
    outside = [c for i, c in enumerate(children) if c not in trunks and (prefix in children or i > last)]
    outside = [c for c in outside if tree.sizes[c]]
    classifiers = _classifiers(tree, outside)
    if classifiers:
        neck = [c for c in outside if not tree.linears(c) and not any(is_under(k, c) for k in classifiers)]
        head = [c for c in outside if c not in neck]
        head += [name for name in tree.own("") if prefix in children]  # wav2vec2's layer_weights
    else:
        neck = []
        classifiers = _inner_classifiers(tree)
        head = [*classifiers]
    inputs = _other_inputs(tree)
    rows = [row for trunk in trunks for row in chains(tree, trunk, [*head, *inputs])]
    stem = inputs
    if rows:
        stem = stem + [name for name in rows[0] if INPUT.search(name.split(".")[-2])]  # PVT's patch_embeddings.0
        rows[0] = [name for name in rows[0] if name not in stem]
    else:
        rows, stem = rows_of_children(tree, trunks[0], head)
    return Parts(rows, stem, neck, head, classifiers)


def _classifiers(tree: ModuleTree, outside: list[str]) -> tuple[str, ...]:
    """The output embeddings, or the last linear layer outside the base model with those of distillation heads."""
    root: Any = tree.root
    output = root.get_output_embeddings()
    if output is not None:
        path = tree.path_of(output)
        if any(is_under(path, name) for name in outside):
            return (path,)
    return final_layers([linears[-1] for name in outside if (linears := tree.linears(name))])


def _inner_classifiers(tree: ModuleTree) -> tuple[str, ...]:
    """The last linear layer of a model that has no separate head."""
    linears = [name for name in tree.linears("") if not is_auxiliary(name)]
    if not linears:
        raise TransferError(
            f"{type(tree.root).__name__} has no linear layer or convolution that could give logits. "
            "Load it with a head, for example through load_backbone(..., task=...)."
        )
    return (linears[-1],)


def _other_inputs(tree: ModuleTree) -> list[str]:
    """Parts that only prepare inputs: the convolutions under a speech encoder, the vision tower of a text model."""
    found: list[str] = []
    for path, module in tree.modules.items():
        tower = is_instance(module, "transformers", "PreTrainedModel") and tree.root.main_input_name == "input_ids"
        frozen_by_custom = hasattr(module, "_freeze_parameters")  # what freeze_feature_encoder() calls
        if frozen_by_custom or (tower and "text" not in getattr(module, "input_modalities", "text")):
            found += [] if any(is_under(path, other) for other in found) else [path]
    return found


def plain_parts(tree: ModuleTree) -> Parts:
    classifiers = _inner_classifiers(tree)
    head = [*classifiers, *(path for path in tree.modules if is_auxiliary(path))]
    rows, stem = rows_of_children(tree, "", head)
    return Parts(rows, stem, [], head, classifiers)
