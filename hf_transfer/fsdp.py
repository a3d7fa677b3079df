"""FSDP2 around a Learner: what is known to train under it as under DDP, and how learners and teachers are cut.

tests/invariants/test_fsdp.py has the proof, on two processes without a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .anatomy import Anatomy, plain_model
from .shards import is_sharded

if TYPE_CHECKING:
    from .objective import Learner


def why_not(plugin: Any, args: Any, model: nn.Module) -> str | None:
    """What of a run with terms is not known to work under FSDP, and what to do instead; None if nothing.

    Args:
        plugin: accelerate's FullyShardedDataParallelPlugin.
        args: The training arguments.
        model: The model that would be cut.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    policy = getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy)
    by_class = policy is transformer_auto_wrap_policy
    unknown = {
        f"torch {torch.__version__}, which cannot keep a unit gathered: upgrade it": (
            not hasattr(FSDPModule, "set_reshard_after_forward")
        ),
        "version 1: set fsdp_config={'version': 2}": plugin.fsdp_version != 2,
        "another auto_wrap_policy than TRANSFORMER_BASED_WRAP: choose that": not by_class,
        "cpu_offload: turn it off": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "cpu_ram_efficient_loading: turn it off": plugin.cpu_ram_efficient_loading,
        "the activation_checkpointing of fsdp_config: set that of the training arguments": (
            plugin.activation_checkpointing
        ),
        "fp16: set bf16": args.fp16,
        "torch_compile: turn it off": args.torch_compile,
        "auto_find_batch_size: turn it off": args.auto_find_batch_size,
        "a parallelism_config: leave it out": getattr(args, "parallelism_config", None) is not None,
        "channels_last: turn it off": getattr(args, "channels_last", False),
        "batch normalisation, whose statistics would drift apart: choose a network with another norm": any(
            getattr(module, "running_mean", None) is not None for module in model.modules()
        ),
        "a model that an earlier trainer has cut: save it, and load it anew": is_cut(model),
    }
    return next((what for what, present in unknown.items() if present), None)


def is_cut(model: nn.Module) -> bool:
    """Whether processes hold parts of its parameters."""
    return any(is_sharded(p) for p in model.parameters())


def plan_cut(plugin: Any, learner: Learner) -> None:
    """Tells accelerate what of a Learner to gather at a time: the blocks of its model, and what is left of the model.

    accelerate asks the module that it cuts for its blocks, and a Learner has none. The model is a unit of its own, so
    that it also runs without the Learner, as it does to predict rows without labels. Computing in bfloat16 is left to
    autocast, as under DDP: FSDP's own way would round a Learner's counts and losses too.

    Args:
        plugin: accelerate's FullyShardedDataParallelPlugin, changed in place.
        learner: What will be cut, unless a training has done so before.
    """
    if not is_cut(learner):
        blocks = plugin.transformer_cls_names_to_wrap or _blocks(learner.model, learner.anatomy)
        plugin.transformer_cls_names_to_wrap = [*blocks, type(learner.model).__name__]
    plugin.mixed_precision_policy = None


def shard(model: nn.Module, anatomy: Anatomy | None) -> None:
    """Cuts a network that is not trained into parts, in place, and moves them to this process's device.

    Every process must run it equally often. Outside its forward pass all of it is in parts.

    Args:
        model: The network, whole, on any device; or in parts already, which it stays.
        anatomy: Its map.
    """
    from torch.distributed.fsdp import fully_shard

    if is_cut(model):
        return
    blocks = set(_blocks(model, anatomy))
    for module in reversed(list(model.modules())[1:]):  # the innermost first
        if type(module).__name__ in blocks:
            fully_shard(module, reshard_after_forward=True)
    fully_shard(model, reshard_after_forward=True)


def _blocks(model: nn.Module, anatomy: Anatomy | None) -> list[str]:
    """Classes of the blocks: those that transformers would not split, else those of the map."""
    plain: Any = plain_model(model)
    kinds = {type(module).__name__ for module in plain.modules() if module is not plain}
    blocks = kinds.intersection(getattr(plain, "_no_split_modules", None) or ())
    if not blocks and anatomy is not None:
        blocks = {type(plain.get_submodule(block.name)).__name__ for block in anatomy.blocks}
    return sorted(blocks)


def keep_gathered(learner: Learner) -> None:
    """What lies outside the blocks stays gathered from the forward to the backward pass: terms may run the head.

    So does FSDP itself with what lies outside the blocks of the module that it cuts.
    """
    model: Any = learner.model
    model.set_reshard_after_forward(False, recurse=False)


def reshard(model: nn.Module) -> None:
    """Gives back what a forward pass without a backward pass has left gathered."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
