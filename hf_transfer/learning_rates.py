"""How fast each part of a network learns: parameter groups with layer-wise decay and a rate of the head's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from .anatomy import Anatomy
from .errors import TransferError

if TYPE_CHECKING:
    from torch import nn


def group_rates(
    depth: int,
    *,
    learning_rate: float,
    head_learning_rate: float | None = None,
    layer_decay: float | None = None,
) -> list[float]:
    """The learning rate of every group of a network, from the stem (0) to the head (depth + 2).

    As in BEiT (Bao et al. 2021, arXiv:2106.08254) the neck learns at the full rate, as the head does; the last block
    learns at `layer_decay` times that, the block below it at `layer_decay ** 2`, and the stem slowest.

    Args:
        depth: Number of the network's blocks.
        learning_rate: The full rate, > 0.
        head_learning_rate: The head's rate, > 0; `learning_rate` if None.
        layer_decay: Factor from a block to the one below it, in (0, 1]; 1 if None.

    Returns:
        depth + 3 rates.

    Raises:
        TransferError: For a value out of its range.
    """
    for name, rate in (("learning_rate", learning_rate), ("head_learning_rate", head_learning_rate)):
        if rate is not None and not 0 < rate < float("inf"):
            raise TransferError(f"{name} must be a positive number, got {rate}.")
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise TransferError(f"layer_decay must be in (0, 1], got {layer_decay}. Typical: 0.65 to 0.95; 1 is no decay.")
    decay = 1.0 if layer_decay is None else layer_decay
    neck = depth + 1
    rates = [learning_rate * decay ** (neck - group) for group in range(neck + 1)]
    return [*rates, learning_rate if head_learning_rate is None else head_learning_rate]


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    head_learning_rate: float | None = None,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """The groups of trainable parameters for an optimizer.

    Without `head_learning_rate` and `layer_decay` these are transformers.Trainer's own two groups, its parameters in
    its order. With either, there are up to two for each group of the anatomy, and what is 1-d (biases, the scales of
    every kind of norm) is never decayed.

    Args:
        model: Any network, tuned or not, with adapters or not.
        learning_rate: Of all groups (or the highest, with `layer_decay`), > 0.
        weight_decay: Of all but biases and norms, >= 0.
        head_learning_rate: Of the head, > 0; `learning_rate` if None.
        layer_decay: Factor of the rate from a block to the one below it, in (0, 1]; see `group_rates`.

    Returns:
        Dicts with "params", "lr", "weight_decay" and "name" ("decay", "head/no_decay", ...), in an order that depends
        on the network alone.

    Raises:
        TransferError: For a value out of its range.
    """
    if not 0 <= weight_decay < float("inf"):
        raise TransferError(f"weight_decay must be a number >= 0, got {weight_decay}.")
    by_depth = head_learning_rate is not None or layer_decay is not None
    anatomy = Anatomy.of(model) if by_depth else None
    rates = group_rates(
        anatomy.depth if anatomy else 0,
        learning_rate=learning_rate,
        head_learning_rate=head_learning_rate,
        layer_decay=layer_decay,
    )
    decayed = _decayed_by_the_trainer(model)
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if anatomy is None:
        return [
            {
                "params": [parameter for name, parameter in trainable if (name in decayed) is decays],
                "lr": learning_rate,
                "weight_decay": weight_decay if decays else 0.0,
                "name": "decay" if decays else "no_decay",
            }
            for decays in (True, False)
        ]
    members: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in trainable:
        decays = name in decayed and parameter.ndim > 1
        members.setdefault((anatomy.group(name), decays), []).append(parameter)
    return [
        {
            "params": members[group, decays],
            "lr": rates[group],
            "weight_decay": weight_decay if decays else 0.0,
            "name": f"{anatomy.group_name(group)}/{'decay' if decays else 'no_decay'}",
        }
        for group in range(anatomy.depth + 3)
        for decays in (True, False)
        if (group, decays) in members
    ]


def _decayed_by_the_trainer(model: nn.Module) -> set[str]:
    """Names of the parameters that transformers.Trainer decays: its own rule, of whatever version is installed."""
    from transformers import Trainer

    # The method asks nothing of its instance; called so, it cannot drift from the Trainer's.
    return set(Trainer.get_decay_parameter_names(cast(Any, None), model))
