"""Whether a model's probabilities mean what they say, and the one temperature that mends them.

    temperature = fit_temperature(validation_logits, validation_labels)
    probabilities = (logits / temperature).softmax(dim=-1)

Logits are (N, C) with labels (N,), or (N, T, C) with labels (N, T) for tokens; -100 is unlabelled and does not count.
For causal language models cut both first: `logits[:, :-1]`, `labels[:, 1:]`.
"""

from __future__ import annotations

import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TransferError
from ..objective import UNLABELLED

logger = logging.getLogger(__name__)

BINS = 15
"""Bins of the calibration error, as in Guo et al. 2017."""
RANGE = 1e3
"""Temperatures are sought within this factor of the logits' own scale."""


@torch.no_grad()
def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> Tensor:
    """How far confidence is from accuracy: the mean over items of |accuracy - mean confidence| of the item's bin.

    Confidence is the probability of the predicted class; bin b of B holds ((b - 1) / B, b / B].

    Source: Naeini et al. 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning", AAAI; Guo et al.
    2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599, equation 3. It is never 0 on finite data:
    perfectly calibrated predictions measure 0.02 to 0.06 on 1,000 rows, and below 0.02 on 10,000.

    Args:
        logits: (N, C) or (N, T, C).
        labels: (N,) or (N, T) class ids; -100 does not count.
        bins: Number of bins of equal width, >= 1.

    Returns:
        0-d float64, in [0, 1].

    Raises:
        TransferError: No item has a label, logits and labels do not fit, or logits hold NaN.
    """
    logits, labels = labelled_logits(logits, labels)
    confidence, guess = F.log_softmax(logits.double(), dim=-1).max(dim=-1)  # (M,)
    return confidence_gaps(confidence.exp(), guess == labels, bins).abs().sum() / len(labels)


@torch.no_grad()
def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over items of -log p of the true class.

    Args:
        logits: (N, C) or (N, T, C).
        labels: (N,) or (N, T) class ids; -100 does not count.

    Returns:
        0-d float64, >= 0.

    Raises:
        TransferError: No item has a label, logits and labels do not fit, or logits hold NaN.
    """
    logits, labels = labelled_logits(logits, labels)
    return F.cross_entropy(logits.double(), labels)


@torch.no_grad()
def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T > 0 for which `logits / T` has the least negative log-likelihood.

    It moves no prediction, only how sure each is. Fit it on validation data, never on test data. The likelihood is
    convex in 1 / T: its slope has one root, found by Newton's method on log(1 / T), halving where Newton leaves the
    bracket, in float64.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599, section 4.2.

    Args:
        logits: (N, C) or (N, T, C), those of the model before any temperature.
        labels: (N,) or (N, T) class ids; -100 does not count.

    Returns:
        T; above 1 where the model was too sure. 1.0, with a warning in the log, where no T is best: every item is
        predicted right, predictions tell nothing about the labels, or the logits are constant.

    Raises:
        TransferError: No item has a label, logits and labels do not fit, or logits hold NaN.
    """
    logits, labels = labelled_logits(logits, labels)
    logits = logits.double()
    logits = logits - logits.amax(dim=-1, keepdim=True)  # (M, C), <= 0: no exponential overflows
    scale = float(logits[logits.isfinite()].abs().mean())
    root = _log_slope_root(logits / scale, labels) if scale > 0 else None
    if root is None:
        logger.warning(
            "No temperature is best for these %d items: all are predicted right, or the predictions tell nothing "
            "about the labels. It stays 1.0; fit it on more validation data, which training has not seen.",
            len(labels),
        )
        return 1.0
    return scale / math.exp(root)


def confidence_gaps(confidence: Tensor, right: Tensor, bins: int = BINS) -> Tensor:
    """Each bin's sum of (right - confidence). Those of batches add up, so that calibration error can be streamed.

    Args:
        confidence: (M,) probabilities of the predicted classes.
        right: (M,) bool, whether the prediction is the label.
        bins: Number of bins of equal width, >= 1.

    Returns:
        (bins,) float64 on the CPU; the sum of their absolute values over M is the expected calibration error.

    Raises:
        TransferError: `bins` < 1.
    """
    if bins < 1:
        raise TransferError(f"bins={bins} is not valid: calibration error needs at least one bin, usually {BINS}.")
    confidence, right = confidence.cpu().double(), right.cpu()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bins are closed above
    return torch.zeros(bins, dtype=torch.float64).index_add_(0, index, right.double() - confidence)


def labelled_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (M, C) and class ids (M,) of the items that have a label.

    Args:
        logits: (N, C) or (N, T, C).
        labels: (N,) or (N, T) integers; -100 is unlabelled.

    Raises:
        TransferError: No item has a label, a label is no class, logits and labels do not fit, or logits hold NaN.
    """
    check_labels(labels, logits.shape)
    labelled = labels != UNLABELLED
    if not labelled.any():
        raise TransferError(f"None of the {labels.numel()} items has a label (one other than {UNLABELLED}).")
    chosen = logits[labelled]  # (M, C)
    if chosen.isnan().any():
        raise TransferError("The logits hold NaN: training diverged, or the inputs hold NaN.")
    return chosen, labels[labelled].long()


def check_labels(labels: Tensor, shape: torch.Size) -> None:
    """Raises TransferError unless labels are class ids, or -100, for logits of this shape (..., C)."""
    if labels.is_floating_point() or labels.shape != shape[:-1]:
        raise TransferError(
            f"Labels of type {labels.dtype} and shape {tuple(labels.shape)} do not fit logits {tuple(shape)}: they "
            f"must be one class id (an integer) an item, {tuple(shape[:-1])}."
        )
    wrong = labels[(labels != UNLABELLED) & ((labels < 0) | (labels >= shape[-1]))]
    if len(wrong):
        raise TransferError(
            f"Label {int(wrong[0])} is not a class: ids are 0 to {shape[-1] - 1}, or {UNLABELLED} for unlabelled."
        )


def _log_slope_root(logits: Tensor, labels: Tensor) -> float | None:
    """log(beta) where the likelihood of beta * logits is greatest; None outside (1 / RANGE, RANGE)."""
    low, high = -math.log(RANGE), math.log(RANGE)
    if _slope(logits, labels, low)[0] >= 0 or _slope(logits, labels, high)[0] <= 0:
        return None
    point = 0.0
    for _ in range(200):  # halving alone needs 50
        slope, curvature = _slope(logits, labels, point)
        low, high = (low, point) if slope > 0 else (point, high)
        step = slope / curvature if curvature > 0 else math.inf
        after = point - step if low < point - step < high else (low + high) / 2
        if abs(after - point) < 1e-12:
            break
        point = after
    return after


def _slope(logits: Tensor, labels: Tensor, log_beta: float) -> tuple[float, float]:
    """Slope in beta of the mean -log p at logits * beta, and that slope's own slope in log(beta)."""
    beta = math.exp(log_beta)
    p = F.softmax(logits * beta, dim=-1)  # (M, C)
    finite = torch.where(p > 0, logits, 0)  # a logit of -inf has no part in the mean
    mean = (p * finite).sum(dim=-1)
    variance = (p * finite.square()).sum(dim=-1) - mean.square()
    true = logits.gather(-1, labels[:, None]).squeeze(-1)
    return float((mean - true).mean()), beta * float(variance.mean())
