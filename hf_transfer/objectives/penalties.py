"""Regularisers without a start: L1, L2 and elastic net on weights, and the confidence penalty on predictions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TransferError
from ..objective import Objective, Schedule, Step, wide
from ..shards import over_parts
from ._labels import items_of, labelled_items, number_of

if TYPE_CHECKING:
    from ..anatomy import Anatomy


def l1(weights: Iterable[Tensor]) -> Tensor:
    """Sum of absolute values, in float32 at least."""
    return torch.stack([wide(w).abs().sum() for w in weights]).sum()


def l2(weights: Iterable[Tensor]) -> Tensor:
    """Half the sum of squares, in float32 at least: its gradient is the weight itself."""
    return torch.stack([wide(w).square().sum() for w in weights]).sum() / 2


def elastic_net(weights: Iterable[Tensor], l1_ratio: float = 0.5) -> Tensor:
    """l1_ratio * l1 + (1 - l1_ratio) * l2. Zou & Hastie 2005, in scikit-learn's parametrisation."""
    weights = list(weights)
    return l1_ratio * l1(weights) + (1 - l1_ratio) * l2(weights)


def negative_entropy(logits: Tensor) -> Tensor:
    """sum p log p of each item: 0 for a certain prediction, -log C for a uniform one.

    Args:
        logits: (..., C).

    Returns:
        (...).
    """
    log_p = F.log_softmax(wide(logits), dim=-1)
    return (log_p.exp() * log_p).sum(dim=-1)


class WeightPenalty(Objective):
    """A penalty on the model's trainable weights: L1, L2 and ElasticNet. Its strength is `weight`.

    Args:
        weight: Strength: a number, or a schedule of training progress.
        biases_and_norms: Whether it reaches parameters of one dimension too (biases, norms, scales), which weight
            decay leaves alone as well.
        name: The name it is logged under.

    Raises:
        TransferError: Before training, if no trainable parameter is left to penalise.
    """

    def __init__(
        self, weight: float | Schedule = 1e-4, biases_and_norms: bool = False, name: str | None = None
    ) -> None:
        super().__init__(weight, name)
        self.biases_and_norms = biases_and_norms

    def prepare(self, model: nn.Module, anatomy: Anatomy | None) -> None:
        if not self.weights(model):
            raise TransferError(
                f"The term '{self.name}' has nothing to penalise: every trainable parameter is a bias, a norm or a "
                "scale. Pass biases_and_norms=True, drop the term, or train more of the model."
            )

    def weights(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters that are penalised."""
        return [p for p in model.parameters() if p.requires_grad and (self.biases_and_norms or p.dim() > 1)]

    def penalty(self, weights: list[nn.Parameter]) -> Tensor:
        """The penalty, 0-d: a sum over the elements of the weights."""
        raise NotImplementedError

    def forward(self, step: Step) -> Tensor:
        return over_parts(self.penalty, self.weights(step.model))


class L1(WeightPenalty):
    """Sum of the absolute weights: drives weights to zero."""

    def penalty(self, weights: list[nn.Parameter]) -> Tensor:
        return l1(weights)


class L2(WeightPenalty):
    """Half the sum of the squared weights. Unlike AdamW's weight decay, it passes through the optimizer's scaling."""

    def penalty(self, weights: list[nn.Parameter]) -> Tensor:
        return l2(weights)


class ElasticNet(WeightPenalty):
    """l1_ratio * L1 + (1 - l1_ratio) * L2. Zou & Hastie 2005.

    Args:
        weight: Strength: a number, or a schedule of training progress.
        l1_ratio: Share of L1, in [0, 1].
        biases_and_norms: Whether it reaches biases, norms and scales too.
        name: The name it is logged under.

    Raises:
        TransferError: If l1_ratio is not in [0, 1].
    """

    def __init__(
        self,
        weight: float | Schedule = 1e-4,
        l1_ratio: float = 0.5,
        biases_and_norms: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, biases_and_norms, name)
        if not 0 <= l1_ratio <= 1:
            raise TransferError(f"l1_ratio must be in [0, 1], got {l1_ratio!r}.")
        self.l1_ratio = l1_ratio

    def penalty(self, weights: list[nn.Parameter]) -> Tensor:
        return elastic_net(weights, self.l1_ratio)


class ConfidencePenalty(Objective):
    """Negative entropy of the predictions of labelled items: keeps a fine-tuned model from overconfidence.

    Source: Pereyra et al. 2017, "Regularizing Neural Networks by Penalizing Confident Output Distributions",
    arXiv:1701.06548; `weight` is their beta.
    """

    def __init__(self, weight: float | Schedule = 0.1, name: str | None = None) -> None:
        super().__init__(weight, name)

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        return number_of(items_of(batch))

    def forward(self, step: Step) -> Tensor:
        if step.labels is None:
            raise TransferError(f"The term '{self.name}' is for labelled items, and the batch has no `labels` column.")
        return torch.where(labelled_items(step.labels), negative_entropy(step.logits), 0)
