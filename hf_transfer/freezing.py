"""Freezing: which parameters train, and the parts that do not kept in eval mode.

A frozen part left in train mode still moves its BatchNorm statistics and still drops activations, and
`model.train()`, which a Trainer calls before every step, puts it there. So each frozen part carries a forward pre-hook
that puts it back. The hooks are functions of this module: they survive `copy.deepcopy`, pickle and DDP.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .anatomy import Anatomy, plain_model
from .errors import TransferError

if TYPE_CHECKING:
    from collections.abc import Collection

BatchNormPolicy = Literal["auto", "train", "eval"]

logger = logging.getLogger(__name__)

# The attribute of a model that names the parameters its architecture itself never trains (sinusoidal positions).
_FIXED = "_hf_transfer_fixed"


def keep_in_eval(module: nn.Module, inputs: tuple) -> None:
    """A forward pre-hook: the module and all in it run in eval mode, whatever `model.train()` said."""
    if module.training:
        module.eval()


def keep_in_eval_except_batch_norm(module: nn.Module, inputs: tuple) -> None:
    """A forward pre-hook: as `keep_in_eval`, except that BatchNorm layers stay in the mode of the model."""
    if module.training:
        for part in module.modules():
            if not isinstance(part, _BatchNorm):
                part.training = False


_HOOKS = (keep_in_eval, keep_in_eval_except_batch_norm)


def held_in_eval(model: nn.Module) -> set[nn.Module]:
    """The modules whose mode `model.train()` does not decide: they lie in a part that a hook holds in eval mode.

    Args:
        model: Any network.
    """
    held: set[nn.Module] = set()
    for module in model.modules():
        hooks = module._forward_pre_hooks.values()
        if keep_in_eval in hooks:
            held.update(module.modules())
        elif keep_in_eval_except_batch_norm in hooks:
            held.update(part for part in module.modules() if not isinstance(part, _BatchNorm))
    return held


def thaw(model: nn.Module) -> None:
    """Undoes every earlier freeze: our hooks are gone and every parameter trains that the architecture lets train.

    Args:
        model: Any network; changed in place.
    """
    for module in model.modules():
        # A RemovableHandle does not survive deepcopy or pickle; the function does, and is found by identity.
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook in _HOOKS]:
            del module._forward_pre_hooks[key]
    fixed = _fixed(model)
    for name, parameter in model.named_parameters():
        learnable = parameter.is_floating_point() or parameter.is_complex()  # quantised weights have no gradient
        parameter.requires_grad_(learnable and name not in fixed)


def _fixed(model: nn.Module) -> tuple[str, ...]:
    """The parameters that the architecture itself holds fixed, as found when the model was first tuned.

    No architecture makes a whole block or head untrainable. Where one is, somebody froze it (a teacher, an adapter
    folded in), and the next tuning decides anew.
    """
    known: tuple[str, ...] | None = getattr(model, _FIXED, None)
    if known is None:
        anatomy = Anatomy.of(model)
        flags: dict[int, list[bool]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            flags[anatomy.group(name)].append(parameter.requires_grad)
        by_hand = any(group != 0 and not any(trains) for group, trains in flags.items())
        known = () if by_hand else tuple(n for n, p in model.named_parameters() if not p.requires_grad)
        if known:
            logger.info("Stay fixed, as the model came: %s", ", ".join(known))
        setattr(model, _FIXED, known)
    return known


def train_only(model: nn.Module, anatomy: Anatomy, trained: Collection[str], batch_norm: BatchNormPolicy) -> None:
    """Freezes all of a network but the named parameters.

    Args:
        model: A network without adapters; changed in place, whatever was frozen in it before.
        anatomy: Its anatomy.
        trained: Names of the parameters that train.
        batch_norm: See `hold_frozen`.

    Raises:
        TransferError: If nothing is left to train. The model is then as it was.
    """
    fixed = _fixed(model)
    if not set(trained) - set(fixed):
        raise TransferError(
            "This freeze leaves nothing to train: "
            f"the head has the modules {list(anatomy.head)} and no parameter of its own that may train. "
            f"Train blocks too (PartialFreeze, FullFineTune); the blocks are: {block_names(anatomy)}."
        )
    thaw(model)
    for name, parameter in model.named_parameters():
        if name not in trained:
            parameter.requires_grad_(False)
    hold_frozen(model, anatomy, batch_norm)


def hold_frozen(model: nn.Module, anatomy: Anatomy, batch_norm: BatchNormPolicy) -> None:
    """Keeps in eval mode every part of stem, blocks and neck in whose group nothing trains, now and after `train()`.

    Args:
        model: The network, its `requires_grad` flags as they shall be; changed in place.
        anatomy: Its anatomy.
        batch_norm: "auto": BatchNorm runs in eval mode in frozen parts and where its own parameters are frozen (under
            adapters), in train mode elsewhere. "train": statistics move everywhere. "eval": nowhere.
    """
    plain = plain_model(model)
    frozen = _frozen_groups(plain, anatomy)
    touched = _groups_touched(plain, anatomy)
    hook = keep_in_eval_except_batch_norm if batch_norm == "train" else keep_in_eval

    head = anatomy.depth + 2

    def visit(name: str, module: nn.Module) -> None:
        asleep = touched[name] <= frozen
        if asleep:
            module.register_forward_pre_hook(hook)
        elif isinstance(module, _BatchNorm) and batch_norm != "train":
            own = [parameter.requires_grad for parameter in module.parameters()]
            adapted = bool(own) and not any(own) and anatomy.group(name) != head
            if adapted or batch_norm == "eval":
                module.register_forward_pre_hook(keep_in_eval)
        # Children of a container may be called one by one (forward_intermediates), past the container's own hook.
        if not asleep or isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            for child_name, child in module.named_children():
                visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", plain)


def _frozen_groups(plain: nn.Module, anatomy: Anatomy) -> set[int]:
    """Groups below the head in which nothing trains; one without parameters follows the frozen ones above it."""
    trains: dict[int, bool] = {}
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        group = anatomy.group(name)
        trains[group] = trains.get(group, False) or parameter.requires_grad
    below_head = range(anatomy.depth + 2)
    frozen = {group for group in below_head if trains.get(group) is False}
    return frozen | {group for group in below_head if group not in trains and group < max(frozen, default=0)}


def _groups_touched(plain: nn.Module, anatomy: Anatomy) -> dict[str, set[int]]:
    """Module path -> the groups of its parameters and of the modules in it that have none."""
    touched: dict[str, set[int]] = {}
    for name, module in reversed(list(plain.named_modules(remove_duplicate=False))):  # children before parents
        prefix = f"{name}." if name else ""
        groups = {anatomy.group(prefix + own) for own in module._parameters if module._parameters[own] is not None}
        for child, _ in module.named_children():
            groups |= touched[prefix + child]
        touched[name] = groups or {anatomy.group(name)}
    return touched


def parameters_inside(model: nn.Module, anatomy: Anatomy, name: str) -> set[str]:
    """The parameters of a block or module.

    Args:
        model: A network without adapters.
        anatomy: Its anatomy.
        name: Of a block, or the path of a module or parameter; the base model's prefix ("timm_model.", "bert.") may
            be left out.

    Returns:
        Their names.

    Raises:
        TransferError: If there are none.
    """
    prefix = getattr(model, "base_model_prefix", "")
    for candidate in [name, f"{prefix}.{name}"] if prefix else [name]:
        paths = next((block.prefixes for block in anatomy.blocks if block.name == candidate), (candidate,))
        starts = tuple(f"{path}." for path in paths)
        hits = {own for own, _ in model.named_parameters() if own in paths or own.startswith(starts)}
        if hits:
            return hits
    raise TransferError(
        f"train_blocks names {name!r}, which is no block or module with parameters of {type(model).__name__}. "
        f"Its blocks: {block_names(anatomy)}."
    )


def block_names(anatomy: Anatomy) -> str:
    """The names of a network's blocks, for an error message."""
    return ", ".join(shortened([block.name for block in anatomy.blocks])) or "none"


def shortened(names: Collection[str], most: int = 24) -> list[str]:
    """A list of names for an error message: all of a short one, the two ends of a long one.

    Args:
        names: The names, in order.
        most: How many are shown, >= 2.

    Returns:
        At most `most` names, with "... (n more) ..." in the middle where some are left out.
    """
    listed = list(names)
    if len(listed) <= most:
        return listed
    half = most // 2
    return [*listed[:half], f"... ({len(listed) - 2 * half} more) ...", *listed[-half:]]
