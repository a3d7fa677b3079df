"""FSDP2 around a Learner: under which options training with terms is known to be that of DDP, and how it is cut.

tests/invariants/test_fsdp.py has the proof, on two processes without a GPU.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .anatomy import Anatomy, plain_model
from .shards import is_sharded


def why_not(plugin: Any, args: Any, model: nn.Module) -> str | None:
    """What of a run with terms is not known to work under FSDP, and what to do instead; None if nothing.

    Args:
        plugin: accelerate's FullyShardedDataParallelPlugin.
        args: The training arguments.
        model: The model that would be cut.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    policy = getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy)
    obstacles = {
        "version 1: set fsdp_config={'version': 2}": plugin.fsdp_version != 2,
        "an auto_wrap_policy other than TRANSFORMER_BASED_WRAP: leave it out": policy
        is not transformer_auto_wrap_policy,
        "fp16: set bf16=True": args.fp16,
        "cpu_offload: leave it out": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "cpu_ram_efficient_loading: leave it out": bool(plugin.cpu_ram_efficient_loading),
        "FSDP's own activation_checkpointing: leave it out": bool(plugin.activation_checkpointing),
        "torch_compile: leave it out": args.torch_compile,
        "auto_find_batch_size: leave it out": args.auto_find_batch_size,
        "a parallelism_config: leave it out": getattr(args, "parallelism_config", None) is not None,
        "channels_last: leave it out": getattr(args, "channels_last", False),
        "batch normalisation, whose statistics would differ from process to process": any(
            getattr(module, "running_mean", None) is not None for module in model.modules()
        ),
        "a model that is sharded already: save it, and load it anew": is_prepared(model),
    }
    return next((what for what, present in obstacles.items() if present), None)


def is_prepared(model: nn.Module) -> bool:
    """Whether a training has cut it before."""
    return any(is_sharded(p) for p in model.parameters())


def cut_by_blocks(plugin: Any, model: nn.Module, anatomy: Anatomy | None) -> None:
    """Tells accelerate what of a Learner's model to gather at a time: its blocks, and what is left of it.

    accelerate asks the module that it cuts for its blocks, and a Learner has none. The model is a unit of its own, so
    that it also runs without the Learner, as it does to predict rows without labels. What is computed in bfloat16 is
    left to autocast, as under DDP: FSDP's own way would round a Learner's counts and losses too.

    Args:
        plugin: accelerate's FullyShardedDataParallelPlugin, changed in place.
        model: The Learner's model, not yet cut.
        anatomy: Its map.
    """
    blocks = plugin.transformer_cls_names_to_wrap or _blocks(model, anatomy)
    plugin.transformer_cls_names_to_wrap = [*blocks, type(model).__name__]
    plugin.mixed_precision_policy = None


def _blocks(model: nn.Module, anatomy: Anatomy | None) -> list[str]:
    """Classes of the blocks: those that transformers would not split, or those of the map."""
    plain: Any = plain_model(model)
    kinds = {type(module).__name__ for module in plain.modules() if module is not plain}
    blocks = kinds.intersection(getattr(plain, "_no_split_modules", None) or ())
    if not blocks and anatomy is not None:
        blocks = {type(plain.get_submodule(block.name)).__name__ for block in anatomy.blocks}
    return sorted(blocks)


def keep_gathered(model: Any) -> None:
    """From its forward to its backward pass, what lies outside the blocks stays gathered: terms may run the head.

    So does FSDP itself with what lies outside the blocks of the module that it cuts.
    """
    model.set_reshard_after_forward(False, recurse=False)


def reshard(model: nn.Module) -> None:
    """Gives back what a forward pass without a backward pass has left gathered."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
