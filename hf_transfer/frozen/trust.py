"""No cut is taken on trust: from a stored value, what is behind it must answer and learn as the whole network does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..objective import logits_of
from .cut import Cut
from .trace import mode_of

TOLERANCE = 1e-5  # of logits and gradients, relative to the largest


def difference(cut: Cut, inputs: Mapping[str, Any]) -> str | None:
    """Why a cut is wrong.

    Args:
        cut: The candidate.
        inputs: The network's, for two rows or more.

    Returns:
        The reason; None where the rest of the network gives the logits and gradients of the whole, in evaluation and
        in training mode, and a text's value does not depend on its padding.
    """
    mask = inputs.get("attention_mask")
    kept = {name: value for name, value in inputs.items() if name not in cut.inputs}
    try:
        value = cut.capture(inputs)
        if mask is not None and (why := _differs_alone(cut, inputs, mask, value)):
            return why
        if mask is not None and cut.per_token:  # what a cache holds: attended tokens
            value = value * mask[..., None].to(value.dtype)
        for training in (False, True):
            whole = _answers(cut.model, partial(cut.model, **inputs), mask, training)
            rest = _answers(cut.model, partial(cut.rest, kept, value.clone()), mask, training)
            for ours, theirs in zip(rest, whole, strict=True):
                if not alike(ours, theirs):
                    return f"the rest is not the whole in {'training' if training else 'evaluation'} mode"
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError) as error:
        return " ".join(str(error).split())[:200]  # a forward that wants more than a placeholder
    return None


def _differs_alone(cut: Cut, inputs: Mapping[str, Any], mask: Tensor, value: Tensor) -> str | None:
    """Whether what crosses depends on how a text is padded."""
    row = int(mask.sum(1).argmin())
    kept = mask[row].bool()
    if kept.all():
        return None
    alone = {
        name: item[row : row + 1][:, kept] if item.shape[:2] == mask.shape else item[row : row + 1]
        for name, item in inputs.items()
    }
    there = value[row][kept] if cut.per_token else value[row]
    return None if alike(cut.capture(alone)[0], there) else "a text's values depend on how it is padded"


def _answers(model: nn.Module, run: Callable[[], Any], mask: Tensor | None, training: bool) -> list[Tensor | None]:
    """The logits, and the gradient of each parameter that trains; None for one that was not used."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with mode_of(model, training=training), torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        logits = logits_of(run()).float()
        if mask is not None and logits.dim() == 3 and logits.shape[:2] == mask.shape:
            logits = logits * mask[..., None]  # padding has no label
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.device)
        gradients = torch.autograd.grad((logits * weights).sum(), trained, allow_unused=True)
    return [logits.detach(), *gradients]


def alike(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are the same within TOLERANCE of the largest number of the second, at least of 1."""
    if a is None or b is None:
        return a is b
    scale = float(b.abs().max()) if b.numel() else 0.0
    return bool((a - b).abs().max() <= TOLERANCE * max(scale, 1.0)) if b.numel() else True
