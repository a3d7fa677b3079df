"""A network with fewer blocks: the settings that say how many, the weights by their new numbers.

Nothing here knows an architecture. The anatomy gives the blocks; settings that count them are changed by name; and
the network built from these settings must be the chosen blocks of the old one: the same names and shapes, and in each
block the same kinds of module with the same settings. Whatever does not come out so is refused, with the first
difference.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TransferError
from .chains import Chain, Cut, chains_of, chosen, refused

# What configurations of transformers call the number of blocks, and arguments of timm that or the list of numbers.
_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
    "num_blocks",
)
_TIMM_COUNTS = ("depth", "depths", "layers", "num_blocks")
_BY_STAGE = re.compile("depth|layer|block")  # a list with the number of blocks of each stage
_BY_BLOCK = re.compile("layer|attn|attention|block|window")  # a list with a value for each block
_OUTPUTS = re.compile("_?(?:out_features|out_indices)|stage_names")  # of a network as a part of a detector, by block
_RANDOM = re.compile("drop", re.IGNORECASE)  # stochastic depth grows with depth, and is nothing in eval mode
_BUILD_ERRORS = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def carved(model: Any, layers: int | Sequence[int]) -> tuple[Any, Cut]:
    """Builds the smaller network.

    Args:
        model: A transformers model, timm's in its wrapper among them, without adapters. It stays as it is.
        layers: How many blocks, or which, by their index in the anatomy.

    Returns:
        The network in eval mode with its own weights, and which blocks it has.

    Raises:
        TransferError: The choice is out of range, or this network cannot be cut so: why.
    """
    cut = chosen(model, chains_of(model), layers)
    try:
        return _cut(model, cut), cut
    except TransferError:
        matched = _of_their_kind(model, cut) if isinstance(layers, int) else None
        if matched is None or matched == cut:
            raise
    return _cut(model, matched), matched


def _cut(model: Any, cut: Cut) -> Any:
    """The network of the blocks that stay, with their weights."""
    weights = {new: value for name, value in model.state_dict().items() if (new := cut.new_name(name)) is not None}
    build = _build_timm if model.config.model_type == "timm_wrapper" else _build_transformers
    student = build(model, cut, weights)
    _check_blocks(model, student, cut)
    student.load_state_dict(weights)
    fresh = [cut.new_name(name) for name in getattr(model, "fresh_parameters", ())]
    student.fresh_parameters = tuple(name for name in fresh if name is not None)
    if student.can_generate():
        student.generation_config = copy.deepcopy(model.generation_config)
    return student.to(model.device).eval()


# ---- the network that has them --------------------------------------------------------------------------------------


def _build_transformers(model: Any, cut: Cut, weights: Mapping[str, Tensor]) -> Any:
    settings = {key: value for key, value in model.config.to_dict().items() if not _OUTPUTS.fullmatch(key)}
    _edit(model, settings, cut)
    try:
        # From plain settings, as they will be read from config.json: what the saved folder gives is what is checked
        config = type(model.config).from_dict(settings)
        student = rebuilt(model, config)
    except _BUILD_ERRORS as error:
        raise refused(model, f"with {cut.lengths} blocks it cannot be built: {_sentence(error)}") from error
    if (difference := _difference(weights, student.state_dict())) is not None:
        raise refused(model, difference)
    return student


def rebuilt(model: Any, config: Any) -> Any:
    """A network of the model's class, dtype and attention with another configuration, at random."""
    attention = model.config._attn_implementation
    options = {} if attention is None else {"attn_implementation": attention}
    student: Any = type(model)._from_config(config, dtype=model.dtype, **options)
    student.config._name_or_path = student.name_or_path = ""  # nothing there gives these weights
    return student


def _edit(model: Any, settings: dict[str, Any], cut: Cut) -> None:
    """Changes the settings that count the blocks, and cuts those that have a value for each."""
    lengths = [chain.length for chain in cut.chains]
    own = _settings_of(model, settings, cut.chains[0])
    by_stage = [name for name, value in own.items() if _BY_STAGE.search(name) and _listed(value) == lengths]
    if by_stage:
        own.update(dict.fromkeys(by_stage, cut.lengths))
        return
    for i, (chain, kept) in enumerate(zip(cut.chains, cut.kept, strict=True)):
        own = _settings_of(model, settings, chain)
        counts = [name for name in _COUNTS if own.get(name) == chain.length and _is_of(name, chain, i)]
        if not counts:
            raise refused(
                model, f"no setting of its configuration says that {chain.lists[0]} has {chain.length} blocks"
            )
        own.update(dict.fromkeys(counts, len(kept)))
        for name, value in own.items():
            if _BY_BLOCK.search(name) and len(_listed(value)) == chain.length:
                own[name] = [value[block] for block in kept]


def _settings_of(model: Any, settings: dict[str, Any], chain: Chain) -> dict[str, Any]:
    """The part of the settings that a chain is built from: networks of two towers nest a configuration for each."""
    path = chain.lists[0]
    while path:
        path = path.rpartition(".")[0]
        config = getattr(model.get_submodule(path), "config", None)
        for name in type(model.config).sub_configs:
            if config is not None and config is getattr(model.config, name, None):
                return settings[name]
    return settings


def _is_of(name: str, chain: Chain, index: int) -> bool:
    """Whether a count is this chain's: by side of an encoder-decoder; one without a side is the first chain's."""
    side = next((side for side in ("encoder", "decoder") if side in name), None)
    return index == 0 if side is None else side in chain.lists[0]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _build_timm(model: Any, cut: Cut, weights: Mapping[str, Tensor]) -> Any:
    """timm has no one name for the number of blocks: tries those there are, until the blocks come out right."""
    from ..loading.timm_models import PREFIX

    reasons = []
    value = cut.lengths[0] if len(cut.chains) == 1 else cut.lengths
    wanted = {name.removeprefix(PREFIX): weight for name, weight in weights.items()}
    for name in _TIMM_COUNTS:
        arguments = {**(model.config.model_args or {}), name: value}
        try:
            network = timm_network(model, arguments)
        except TypeError:
            continue  # no argument of this network, or one that it does not let be changed
        except _BUILD_ERRORS as error:
            reasons.append(f"; with {name}, {_sentence(error)}")
            continue
        difference = _difference(wanted, network.state_dict())
        if difference is None:
            return wrapped_timm(model, network, arguments)
        reasons.append(f"; with {name}, {difference}")
    tried = ", ".join(_TIMM_COUNTS)
    raise refused(model, f"none of timm's arguments {tried} makes {value} blocks of it{''.join(reasons)}")


def timm_network(model: Any, arguments: dict[str, Any]) -> nn.Module:
    """A timm network of the wrapped model's architecture and classes, as timm starts it."""
    import timm

    return timm.create_model(model.config.architecture, num_classes=model.config.num_labels, **arguments)


def wrapped_timm(model: Any, network: nn.Module, arguments: dict[str, Any]) -> Any:
    """Puts a timm network into transformers' wrapper with the model's configuration and other arguments."""
    config = type(model.config).from_dict({**model.config.to_dict(), "model_args": arguments})
    student = rebuilt(model, config)
    student.timm_model = network.to(model.dtype)  # the wrapper starts it with values of its own
    return student


# ---- whether it is the same blocks ----------------------------------------------------------------------------------


def _difference(wanted: Mapping[str, Tensor], built: Mapping[str, Tensor]) -> str | None:
    """The first tensor that one has and the other has not, or in another shape."""
    if lost := [name for name in wanted if name not in built]:
        return f"its blocks would have no place for {len(lost)} tensors, first {lost[0]}"
    if strange := [name for name in built if name not in wanted]:
        return f"{len(strange)} tensors would be new, first {strange[0]}"
    return next(
        (
            f"{name} is {tuple(value.shape)} and would be {tuple(built[name].shape)}"
            for name, value in wanted.items()
            if value.shape != built[name].shape
        ),
        None,
    )


def _check_blocks(teacher: nn.Module, student: nn.Module, cut: Cut) -> None:
    """Raises where a block at its new place is of another kind: a shifted window, local attention, another scale."""
    for path, old, new in cut.moves():
        was, now = teacher.get_submodule(f"{path}.{old}"), student.get_submodule(f"{path}.{new}")
        if (change := _change(was, now, old, new)) is not None:
            raise refused(
                teacher,
                f"block {path}.{old} at place {new} would be another kind of block, as {change}. Choose blocks whose "
                "kinds follow each other as in the whole network, by layers=[...]",
            )


def _of_their_kind(teacher: nn.Module, cut: Cut) -> Cut | None:
    """As many blocks, where a network gives them their kind by place, such as Swin's shifted windows.

    At each place stays the block nearest to the one that was to stay there, among those of the same kind as the
    teacher's at that place. None where there are too few.
    """
    kept = []
    for chain, wished in zip(cut.chains, cut.kept, strict=True):
        lists = [teacher.get_submodule(path) for path in chain.lists]
        found: list[int] = []
        for place, wish in enumerate(wished):
            able = [
                i
                for i in range(found[-1] + 1 if found else 0, chain.length)
                if all(_change(blocks[i], blocks[place], i, place) is None for blocks in lists)  # type: ignore[index]
            ]
            if not able:
                return None
            found.append(min(able, key=lambda i: abs(i - wish)))
        kept.append(tuple(found))
    return Cut(cut.chains, tuple(kept))


def _change(was: nn.Module, now: nn.Module, old: int, new: int) -> str | None:
    """The first thing by which a block differs from another, but for the values of its weights and its number."""
    inside, others = _modules(was), _modules(now)
    if different := [name for name in (*inside, *others) if name not in inside or name not in others]:
        return f"{different[0]} is not in both"
    changes = (
        f"{f'{name}.{key}' if name else key} is {a!r} and would be {b!r}"
        for name, module in inside.items()
        for key, a, b in _changes(module, others[name], old, new)
    )
    return next(changes, None)


def _modules(block: nn.Module) -> dict[str, nn.Module]:
    """What a block consists of, without what does nothing in eval mode."""
    return {
        name: module
        for name, module in block.named_modules()
        if not isinstance(module, nn.Identity) and not _RANDOM.search(type(module).__name__)
    }


def _changes(was: nn.Module, now: nn.Module, old: int, new: int) -> Iterator[tuple[str, Any, Any]]:
    """Settings and unsaved buffers by which two modules differ, but for their number."""
    if type(was) is not type(now):
        yield "its kind", type(was).__name__, type(now).__name__
    shapes = [{key: tuple(p.shape) for key, p in each.named_parameters(recurse=False)} for each in (was, now)]
    if shapes[0] != shapes[1]:
        yield "the shape of its parameters", shapes[0], shapes[1]
    values, others = _values(was), _values(now)
    for key in sorted(values.keys() | others.keys()):
        a, b = values.get(key), others.get(key)
        number = type(a) is int and type(b) is int and a - old == b - new
        if a != b and not number and not _RANDOM.search(key):
            yield key, a, b
    for key in sorted(was._non_persistent_buffers_set & now._non_persistent_buffers_set):
        a, b = getattr(was, key), getattr(now, key)
        if a is not None and b is not None and not torch.equal(a.cpu(), b.cpu()):
            yield key, f"a buffer {tuple(a.shape)}", "another"


def _values(module: nn.Module) -> dict[str, Any]:
    """A module's own settings: numbers, texts and tuples of them."""
    own = vars(module).items()
    return {key: value for key, value in own if key != "training" and key[0] != "_" and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return (
        value is None
        or isinstance(value, (int, float, str))
        or (isinstance(value, (tuple, list)) and all(_is_plain(each) for each in value))
    )


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
