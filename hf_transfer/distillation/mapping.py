"""Which layers of student and teacher a term compares: from the user's words to module paths and shapes.

    Hint(layers="last")                       # the last block of each
    Hint(layers=0.5)                          # the block at half the depth of each
    Hint(layers={0.5: 0.5, 1.0: 1.0})         # student -> teacher, by depth
    Hint(layers={"layer3": "blocks.8"})       # by module path; by index: {2: 8, -1: -1}
    ReviewKD(layers="stages")                 # where the resolution changes
    PKD(layers="uniform")                     # every block of the student, at the teacher's relative depth

`connect` resolves the words of all terms, sizes what they own, and tries each term once before training starts.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import TransferError
from ..objective import CONTRACT_COLUMNS, Objective, Step
from ..objectives._layers import FEATURES, FeatureTerm, LayerPair, Layers, Role
from ..objectives.transformers_distillation import QUERY_KEY_VALUE, MiniLMRelation, TinyBERT
from .signal import TeacherSignal
from .survey import LAST, ROWS, Survey

if TYPE_CHECKING:
    from ..backbones import Backbone

logger = logging.getLogger(__name__)

UNIFORM, STAGES = "uniform", "stages"
QUARTERS = 4  # stages of a network whose resolution never changes


def resolve(layers: Layers, student: Survey, teacher: Survey, role: Role = "hidden") -> tuple[LayerPair, ...]:
    """The pairs of layers that a user's words mean.

    Args:
        layers: "uniform", "stages", "last", "features", a module's path, a block's index (an int, from the end where
            negative), a depth (a float in [0, 1]), a sequence of these, or a mapping student -> teacher of these.
        student: After `run`, if shapes are to be known.
        teacher: The same.
        role: What to read of a layer: what it puts out, its queries, keys or values, or the network's embeddings,
            which are one pair whatever the layers.

    Returns:
        Input to output, as the student runs.

    Raises:
        TransferError: If a layer does not exist, or has nothing of this role.
    """
    if role == "embedding":
        names = [(student.embedding, teacher.embedding)]
    else:
        names = [(_of_role(a, student, role), _of_role(b, teacher, role)) for a, b in _named(layers, student, teacher)]
    pairs = [
        LayerPair(a, b, tuple(student.value(a).shape[1:]), tuple(teacher.value(b).shape[1:]), role) for a, b in names
    ]
    order = list(student.values)
    return tuple(sorted(pairs, key=lambda pair: order.index(pair.student)))


def connect(
    terms: Sequence[Objective],
    student: Backbone,
    teacher: Backbone,
    student_batch: Mapping[str, Any],
    teacher_batch: Mapping[str, Any],
) -> str:
    """Tells every term that compares layers which they are, and tries it on the batch.

    Each network runs once, on a few rows, as it will be: adapters on, dropout off. Nothing of it changes.

    Args:
        terms: Terms of any kind; those that compare no layers are left alone.
        student: The network that learns.
        teacher: The network that it learns from.
        student_batch: Collated, on any device.
        teacher_batch: The same examples, as the teacher takes them.

    Returns:
        The plan, which is also logged: each term's layers, their shapes, and the linear maps between them. Empty if
        no term compares layers.

    Raises:
        TransferError: If a layer does not exist, or a term cannot compare what it was told to.
    """
    own = [term for term in terms if isinstance(term, FeatureTerm)]
    if not own:
        return ""
    networks = Survey("student", student), Survey("teacher", teacher)
    for side, (network, batch) in enumerate(zip(networks, (student_batch, teacher_batch), strict=True)):
        network.run(batch, _to_read(own, network, side), embedding=any("embedding" in _roles(term) for term in own))
    for term in own:
        pairs = [pair for role in _roles(term) for pair in resolve(term.layers, *networks, role)]
        _check_heads(term, pairs, networks)
        term.connect(pairs)
        term.uses_features = any(FEATURES in (pair.student, pair.teacher) for pair in pairs)
        _try(term, *networks, student_batch)
    plan = "\n".join(["Layers compared, student ~ teacher, shapes of one example:", *map(_described, own)])
    logger.info("%s", plan)
    return plan


def _roles(term: FeatureTerm) -> tuple[Role, ...]:
    """What a term reads of each layer."""
    if isinstance(term, MiniLMRelation):
        return "query", "key", "value"
    return ("embedding", "hidden", "query", "key") if isinstance(term, TinyBERT) else ("hidden",)


def _named(layers: Layers, student: Survey, teacher: Survey) -> list[tuple[str, str]]:
    """Layers of the student, each with the teacher's."""
    if layers == UNIFORM:
        depth = len(student.blocks)
        return [(name, teacher.layer((i + 1) / depth)) for i, name in enumerate(student.blocks)]
    if layers == STAGES:
        return _stages(student, teacher)
    return [(student.layer(a), teacher.layer(b)) for a, b in _words(layers)]


def _words(layers: Layers) -> list[tuple[Any, Any]]:
    """The user's words, student's and teacher's."""
    if isinstance(layers, Mapping):
        return list(layers.items())
    if isinstance(layers, (str, int, float)):
        return [(layers, layers)]
    if not isinstance(layers, Sequence):
        raise TransferError(
            f"layers={layers!r} names no layers. Valid: 'uniform', 'stages', 'last', 'features', a module's path, a "
            "block's index, a depth in [0.0, 1.0], a list of these, or a mapping student -> teacher of these."
        )
    return [(word, word) for word in layers]


def _stages(student: Survey, teacher: Survey) -> list[tuple[str, str]]:
    """Ends of stages, deepest with deepest; where a network has none, blocks at equal distances."""
    ends = [network.stages() for network in (student, teacher)]
    with_stages = [len(each) for each in ends if len(each) > 1]
    count = min(with_stages or [QUARTERS])
    count = min(count, *(len(network.blocks) for network in (student, teacher)))
    chosen = [
        each[-count:] if len(each) > 1 else _evenly(network, count)
        for each, network in zip(ends, (student, teacher), strict=True)
    ]
    return list(zip(*chosen, strict=True))


def _evenly(network: Survey, count: int) -> list[str]:
    depth = len(network.blocks)
    return [network.blocks[math.ceil((i + 1) * depth / count) - 1] for i in range(count)]


def _of_role(layer: str, network: Survey, role: Role) -> str:
    """The module that puts out what a role asks of a layer."""
    if role not in QUERY_KEY_VALUE:
        return layer
    if layer == FEATURES:
        raise TransferError(f"'{FEATURES}' has no {role}: name a layer with self-attention, such as '{LAST}'.")
    attention = network.attention(layer)
    return dict(zip(QUERY_KEY_VALUE, (attention.query, attention.key, attention.value), strict=True))[role]


def _to_read(terms: Sequence[FeatureTerm], network: Survey, side: int) -> list[str]:
    """The layers beside the blocks that terms may ask for, of one network: 0 student, 1 teacher."""
    found: list[str] = []
    for term in terms:
        if term.layers not in (UNIFORM, STAGES):
            found += [network.layer(pair[side]) for pair in _words(term.layers)]
        if set(_roles(term)) & set(QUERY_KEY_VALUE):
            found += [path for layer in (*network.blocks, *found) for path in network.projections(layer)]
    return [layer for layer in dict.fromkeys(found) if layer != FEATURES]


def _check_heads(term: FeatureTerm, pairs: Sequence[LayerPair], networks: tuple[Survey, Survey]) -> None:
    """TinyBERT compares attention head by head: each network must have as many heads as it was told, each its own."""
    if not isinstance(term, TinyBERT):
        return
    for side, network in enumerate(networks):
        for layer in {(pair.student, pair.teacher)[side] for pair in pairs if pair.role == "query"}:
            attention = network.attention(layer.rpartition(".")[0])
            has = ""
            if attention.fused:
                has = "puts out queries and keys together"
            elif attention.heads not in (None, term.heads):
                has = f"belongs to {attention.heads} heads"
            elif network.value(attention.query).shape != network.value(attention.key).shape:
                has = "has wider queries than keys, which several heads share"
            if has:
                raise TransferError(
                    f"The term '{term.name}' compares queries and keys of {term.heads} heads, head by head, and the "
                    f"{network.who}'s '{layer}' {has}. MiniLMRelation reads all of these."
                )


def _try(term: FeatureTerm, student: Survey, teacher: Survey, batch: Mapping[str, Any]) -> None:
    """Computes a copy of a connected term on the networks' values, so that what fails does so before step 1."""
    device = student.logits.device
    names = {pair.student for pair in term.pairs}, {pair.teacher for pair in term.pairs}
    values = [
        {name: network.value(name).float().to(device) for name in read}
        for network, read in zip((student, teacher), names, strict=True)
    ]
    features = [each.pop(FEATURES, None) for each in values]
    columns = {name: batch[name][:ROWS].to(device) for name in CONTRACT_COLUMNS if batch.get(name) is not None}
    columns.setdefault("example_id", torch.zeros(len(student.logits), dtype=torch.long, device=device))
    step = Step(
        student.backbone.model, student.inputs, None, student.logits, features=features[0], hidden=values[0],
        teacher=TeacherSignal(teacher.logits.to(device), features=features[1], hidden=values[1]), **columns,
    )  # fmt: skip
    tried = copy.deepcopy(term).float().to(device).eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            tried(step)
    except (RuntimeError, IndexError) as error:
        why = " ".join(str(error).split())[:300]
        raise TransferError(
            f"The term '{term.name}' with layers={term.layers!r} cannot compare {[*map(str, term.pairs)]}: {why}."
        ) from error


def _described(term: FeatureTerm) -> str:
    """A term's part of the plan."""
    maps = [f"{m.in_features} -> {m.out_features}" for m in term.modules() if isinstance(m, nn.Linear)]
    size = sum(parameter.numel() for parameter in term.parameters())
    owned = f", {size:,} parameters of its own" if size else ""
    owned += f" (linear {', '.join(maps)})" if maps else ""
    roles = [f"  {pair}" + ("" if pair.role == "hidden" else f", {pair.role}") for pair in term.pairs]
    return "\n".join([f"{term.name}, layers={term.layers!r}{owned}", *roles])
