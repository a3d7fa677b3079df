"""Terms that read labels: cross-entropy, focal loss, squared error, Kullback-Leibler divergence.

Each returns one value an item (a row, or a token), 0 where there is no label (-100), and counts the labelled items.
The pure functions work in log space and in float32 at least, so that they stay finite for saturated logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TransferError
from ..objective import UNLABELLED, Objective, Schedule, Step, wide
from ._labels import items_of, labelled_items, number_of


def cross_entropy(
    logits: Tensor, labels: Tensor, class_weights: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of each item.

    Args:
        logits: (..., C).
        labels: (...) integers, -100 = unlabelled; or (..., C) probabilities, a row of -100 = unlabelled.
        class_weights: (C,), each class's factor.
        label_smoothing: Share of each label, in [0, 1), that is spread over all classes (Szegedy et al. 2016,
            arXiv:1512.00567).

    Returns:
        (...), 0 at unlabelled items.
    """
    logits = wide(logits)
    flat = logits.reshape(-1, logits.shape[-1])  # (M, C)
    soft = labels.is_floating_point()
    targets = labels.to(logits.dtype).reshape_as(flat) if soft else labels.reshape(-1)
    weights = None if class_weights is None else class_weights.to(logits)
    loss = F.cross_entropy(
        flat, targets, weight=weights, ignore_index=UNLABELLED, label_smoothing=label_smoothing, reduction="none"
    )
    if not soft:
        return loss.view(labels.shape)  # ignored items are 0 already
    labelled = labelled_items(labels)  # (...)
    return torch.where(labelled, loss.view(labelled.shape), 0)


def adjust_logits(logits: Tensor, log_priors: Tensor, tau: float = 1.0) -> Tensor:
    """logits + tau * log(prior): trained so, the bare logits favour no class for being frequent.

    Source: Menon et al. 2021, "Long-tail learning via logit adjustment", arXiv:2007.07314, equation 10.

    Args:
        logits: (..., C).
        log_priors: (C,), log of each class's share of the training data.
        tau: Strength; 1 is Fisher consistent for the balanced error.
    """
    return logits + tau * log_priors.to(logits)


def focal(logits: Tensor, labels: Tensor, gamma: float = 2.0, alpha: Tensor | None = None) -> Tensor:
    """-alpha (1 - p)^gamma log p of each item, p being the probability of its class.

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", arXiv:1708.02002, with the softmax's p.

    Args:
        logits: (..., C).
        labels: (...) integers, -100 = unlabelled; or (..., C) probabilities, which weigh the losses of the classes.
        gamma: Focus, >= 0; 0 is cross-entropy.
        alpha: (C,), each class's factor.

    Returns:
        (...), 0 at unlabelled items.
    """
    log_p = F.log_softmax(wide(logits), dim=-1)  # (..., C)
    labelled = labelled_items(labels)
    soft = labels.is_floating_point()
    chosen = log_p if soft else log_p.gather(-1, labels.clamp(min=0)[..., None])  # (..., C) or (..., 1)
    # Where p rounds to 1 the power has an infinite slope for gamma < 1: the clamp gives it none.
    loss = -((-torch.expm1(chosen)).clamp(min=torch.finfo(chosen.dtype).tiny) ** gamma) * chosen
    if alpha is not None:
        loss = loss * (alpha if soft else alpha[labels.clamp(min=0)][..., None]).to(loss)
    if soft:
        loss = torch.where(labelled[..., None], labels, 0).to(loss) * loss
    return torch.where(labelled, loss.sum(dim=-1), 0)


def squared_error(predictions: Tensor, labels: Tensor) -> Tensor:
    """Squared error of each row, averaged over its K outputs.

    Args:
        predictions: (N, K); K = 1 where the labels are (N,).
        labels: (N,) or (N, K); a row of exactly -100 = unlabelled.

    Returns:
        (N,), 0 at unlabelled rows.
    """
    labels = labels.reshape(len(labels), -1)  # (N, K)
    labelled = (labels != UNLABELLED).any(dim=1)
    predictions = wide(predictions)
    error = predictions - torch.where(labelled[:, None], labels.to(predictions.dtype), predictions)
    return error.square().mean(dim=1)


def kl_divergence(logits: Tensor, labels: Tensor) -> Tensor:
    """KL(labels || softmax(logits)) of each item: what cross-entropy exceeds the labels' own entropy by.

    Args:
        logits: (..., C).
        labels: (..., C) probabilities, zeros allowed; a row of -100 = unlabelled.

    Returns:
        (...), 0 at unlabelled items.
    """
    log_q = F.log_softmax(wide(logits), dim=-1)
    labelled = labelled_items(labels)
    p = torch.where(labelled[..., None], labels, 0).to(log_q)
    return (torch.xlogy(p, p) - p * log_q).sum(dim=-1)


class CrossEntropy(Objective):
    """Cross-entropy with hard labels (N,), tokens (N, T) or soft labels (N, C).

    Class weights are normalised as in PyTorch: the weighted sum of losses is divided by the sum of the labels' weights
    (not by the number of labels). A soft label weighs the mean of its classes' weights, so that a one-hot row counts
    exactly as the hard label does (PyTorch itself divides by the number of rows there).

    Args:
        label_smoothing: In [0, 1).
        class_weights: (C,), >= 0: each class's factor; see `hf_transfer.data.sampling.class_weights`.
        logit_adjustment: (C,), > 0: the classes' counts or shares in the training data; their logarithm is added to
            the logits in the loss (Menon et al. 2021, arXiv:2007.07314). The model's own logits stay as they are.
        tau: Strength of the logit adjustment.
        shift: Token t's logits are for token t + 1's label, as in causal language models.
        weight: A number or a schedule of training progress.
        name: The name it is logged under.

    Raises:
        TransferError: If an argument is out of its range; in training, if labels and logits do not fit together.
    """

    in_evaluation = True

    def __init__(
        self,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | Tensor | None = None,
        logit_adjustment: Sequence[float] | Tensor | None = None,
        tau: float = 1.0,
        shift: bool = False,
        weight: float | Schedule = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        if not 0 <= label_smoothing < 1:
            raise TransferError(f"label_smoothing must be in [0, 1), got {label_smoothing!r}.")
        self.label_smoothing, self.tau, self.shift = label_smoothing, tau, shift
        priors = _per_class(logit_adjustment, "logit_adjustment", positive=True)
        self.class_weights: Tensor | None
        self.log_priors: Tensor | None
        # Not persistent: they are configuration, given anew with each run.
        self.register_buffer("class_weights", _per_class(class_weights, "class_weights"), persistent=False)
        self.register_buffer("log_priors", None if priors is None else (priors / priors.sum()).log(), persistent=False)

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        labels = batch.get("labels")
        if labels is not None and self.shift:
            labels = labels[:, 1:]
        if labels is None or self.class_weights is None:
            return number_of(None if labels is None else labelled_items(labels))
        weights = self.class_weights.to(labels.device)
        if labels.is_floating_point():
            return (torch.where(labelled_items(labels)[..., None], labels, 0).float() @ weights).sum()
        return weights[labels[labels != UNLABELLED]].sum()

    def forward(self, step: Step) -> Tensor:
        logits, labels = self._compared(step)
        return cross_entropy(logits, labels, self.class_weights, self.label_smoothing)

    def own_mean(self, step: Step) -> Tensor | None:
        logits, labels = self._compared(step)
        if labels.is_floating_point() or logits.device.type != "cpu":
            return None
        logits, weights = wide(logits), self.class_weights
        if logits.dim() != 2:
            logits, labels = logits.flatten(0, -2), labels.flatten()  # (M, C), (M,)
        if weights is not None:
            weights = weights.to(logits)
        mean = F.cross_entropy(
            logits, labels, weight=weights, ignore_index=UNLABELLED, label_smoothing=self.label_smoothing
        )
        return None if math.isnan(mean.item()) else mean  # NaN where there is no label at all, on a GPU too

    def _compared(self, step: Step) -> tuple[Tensor, Tensor]:
        """Logits and labels, item by item."""
        logits, labels = step.logits, _labels(step, self.name)
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]  # (N, T - 1, C), (N, T - 1)
        _check_classes(logits, labels, self.name, class_weights=self.class_weights, logit_adjustment=self.log_priors)
        if self.log_priors is not None:
            logits = adjust_logits(logits, self.log_priors, self.tau)
        return logits, labels


class Focal(Objective):
    """Focal loss: cross-entropy that fades for items which are already right. Lin et al. 2017, arXiv:1708.02002.

    Args:
        gamma: Focus, >= 0; 0 is cross-entropy.
        alpha: (C,), >= 0: each class's factor; `(1 - a, a)` is the paper's binary `a`. It does not enter the count.
        weight: A number or a schedule of training progress.
        name: The name it is logged under.

    Raises:
        TransferError: If an argument is out of its range; in training, if labels and logits do not fit together.
    """

    in_evaluation = True

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: Sequence[float] | Tensor | None = None,
        weight: float | Schedule = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        if not 0 <= gamma < math.inf:
            raise TransferError(f"gamma must be >= 0 and finite, got {gamma!r}.")
        self.gamma = gamma
        self.alpha: Tensor | None
        self.register_buffer("alpha", _per_class(alpha, "alpha"), persistent=False)

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        return number_of(items_of(batch))

    def forward(self, step: Step) -> Tensor:
        labels = _labels(step, self.name)
        _check_classes(step.logits, labels, self.name, alpha=self.alpha)
        return focal(step.logits, labels, self.gamma, self.alpha)


class MSE(Objective):
    """Mean squared error, for regression with labels (N,) or (N, K).

    Unlabelled rows are exactly -100 (in all K outputs): where -100 is a value that occurs, rescale the labels.
    """

    in_evaluation = True

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        labels = batch.get("labels")
        return number_of(None if labels is None else (labels.reshape(len(labels), -1) != UNLABELLED).any(dim=1))

    def forward(self, step: Step) -> Tensor:
        labels = _labels(step, self.name)
        if labels.reshape(len(labels), -1).shape != step.logits.shape:
            raise TransferError(
                f"The term '{self.name}' got labels of shape {tuple(labels.shape)} for predictions of shape "
                f"{tuple(step.logits.shape)}: regression needs (N, K) predictions and (N, K) labels, or (N,) with K = "
                "1. Load the model with labels=K and task='regression'."
            )
        return squared_error(step.logits, labels)


class KLDivergence(Objective):
    """KL(soft labels || prediction): cross-entropy's gradient, and a value that is 0 at the best prediction."""

    in_evaluation = True

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        return number_of(items_of(batch))

    def forward(self, step: Step) -> Tensor:
        labels = _labels(step, self.name)
        if not labels.is_floating_point():
            raise TransferError(
                f"The term '{self.name}' needs soft labels (N, C), got {labels.dtype} of shape {tuple(labels.shape)}: "
                "for class indices use CrossEntropy."
            )
        _check_classes(step.logits, labels, self.name)
        return kl_divergence(step.logits, labels)


def _labels(step: Step, term: str) -> Tensor:
    if step.labels is None:
        raise TransferError(
            f"The term '{term}' needs the rows' `labels` column, and the batch has none. Unlabelled rows have -100."
        )
    return step.labels


def _check_classes(logits: Tensor, labels: Tensor, term: str, **per_class: Tensor | None) -> None:
    """Raises where labels or per-class numbers do not fit the logits: by shape, so that no device waits."""
    expected = logits.shape if labels.is_floating_point() else logits.shape[:-1]
    if labels.shape != expected:
        raise TransferError(
            f"The term '{term}' got labels {labels.dtype} of shape {tuple(labels.shape)} for logits of shape "
            f"{tuple(logits.shape)}. Valid: class indices (integers) of shape {tuple(logits.shape[:-1])}, or soft "
            f"labels (floating) of shape {tuple(logits.shape)}. For regression use MSE."
        )
    for name, values in per_class.items():
        if values is not None and len(values) != logits.shape[-1]:
            raise TransferError(
                f"The term '{term}' has {name} of {len(values)} classes, and the model has {logits.shape[-1]}: "
                "pass one number a class, in label order."
            )


def _per_class(values: Sequence[float] | Tensor | None, name: str, positive: bool = False) -> Tensor | None:
    """(C,) float32, checked."""
    if values is None:
        return None
    tensor = torch.as_tensor(values, dtype=torch.float32)
    if tensor.dim() != 1 or not tensor.isfinite().all() or (tensor < 0).any() or not tensor.any():
        raise TransferError(f"{name} must be one finite number >= 0 a class, not all 0, got {values!r}.")
    if positive and not tensor.all():
        missing = (tensor == 0).nonzero().flatten().tolist()
        raise TransferError(f"{name} must be > 0 for every class: classes {missing} have 0, and log(0) is infinite.")
    return tensor
