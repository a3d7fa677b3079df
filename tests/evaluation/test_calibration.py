"""Calibration error by hand and by a plain loop, likelihood and temperature in closed form, bad input refused."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_transfer.errors import TransferError
from hf_transfer.evaluation.calibration import (
    confidence_gaps,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
)


def two_classes(p: list[float]) -> Tensor:
    """float64 logits whose probability of class 1 is p."""
    return torch.tensor([[0.0, math.log(x / (1 - x))] for x in p], dtype=torch.float64)


def sampled(n: int, classes: int, scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (n, C), and labels drawn from their probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)


def plain_loop_ece(logits: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """Equation 3 of Guo et al. 2017 item by item, from probabilities."""
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    total = 0.0
    for b in range(bins):
        inside = [i for i in range(len(p)) if b / bins < p[i].max() <= (b + 1) / bins]
        if inside:
            accuracy = np.mean([p[i].argmax() == labels[i] for i in inside])
            confidence = np.mean([p[i].max() for i in inside])
            total += len(inside) / len(p) * abs(accuracy - confidence)
    return total


def test_calibration_error_by_hand() -> None:
    # Two bins of width 1/5 hold items: (0.6, 0.8] with 0.7 right, 0.8 wrong; (0.8, 1] with 0.9 right, 0.95 right.
    logits = two_classes([0.7, 0.8, 0.9, 0.95])
    labels = torch.tensor([1, 0, 1, 1])
    by_hand = 2 / 4 * abs(1 / 2 - 0.75) + 2 / 4 * abs(1 - 0.925)
    assert float(expected_calibration_error(logits, labels, bins=5)) == pytest.approx(by_hand, abs=1e-12)
    # In one bin the errors of either sign cancel: |3/4 - 0.8375|.
    assert float(expected_calibration_error(logits, labels, bins=1)) == pytest.approx(0.0875, abs=1e-12)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_of_rows_and_tokens_is_the_papers(bins: int) -> None:
    logits, labels = sampled(60, 4, scale=2.0)
    labels = labels.roll(1)  # far from calibrated
    expected = plain_loop_ece(logits.numpy(), labels.numpy(), bins)
    assert expected > 0.1
    assert float(expected_calibration_error(logits, labels, bins)) == pytest.approx(expected, abs=1e-12)
    padded = torch.full((10, 9), -100)
    padded[:, 3:] = labels.view(10, 6)
    tokens = torch.full((10, 9, 4), torch.nan, dtype=torch.float64)
    tokens[:, 3:] = logits.view(10, 6, 4)
    assert float(expected_calibration_error(tokens, padded, bins)) == pytest.approx(expected, abs=1e-12)


def test_gaps_of_batches_add_up_and_certainty_has_a_bin() -> None:
    confidence = torch.tensor([0.0, 0.25, 0.2500001, 1.0], dtype=torch.float64)
    right = torch.tensor([True, False, True, False])
    gaps = confidence_gaps(confidence, right, bins=4)
    assert torch.allclose(gaps, torch.tensor([0.75, 0.7499999, 0, -1], dtype=torch.float64), atol=1e-12)
    parts = confidence_gaps(confidence[:1], right[:1], 4) + confidence_gaps(confidence[1:], right[1:], 4)
    assert torch.equal(parts, gaps)


def test_likelihood_in_closed_form() -> None:
    logits = two_classes([0.7, 0.8, 0.5])
    labels = torch.tensor([1, 0, -100])
    expected = -(math.log(0.7) + math.log(0.2)) / 2
    assert float(negative_log_likelihood(logits, labels)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 0.3, 1.0, 7.0, 1e5])
def test_temperature_in_closed_form(scale: float) -> None:
    """Where all logits differ by d and a share q is right, the best temperature makes the confidence q."""
    logits = torch.tensor([[scale, 0.0]] * 10, dtype=torch.float64)
    labels = torch.tensor([0] * 8 + [1] * 2)
    assert fit_temperature(logits, labels) == pytest.approx(scale / math.log(0.8 / 0.2), rel=1e-9)


@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
def test_temperature_recovers_the_scale_of_the_logits(scale: float) -> None:
    logits, labels = sampled(4000, 6, scale=2.0)
    true = fit_temperature(logits, labels)
    assert true == pytest.approx(1.0, rel=0.05)  # labels are draws
    assert fit_temperature(logits * scale, labels) == pytest.approx(true * scale, rel=1e-9)
    assert fit_temperature((logits * scale + 300).float().view(40, 100, 6), labels.view(40, 100)) == pytest.approx(
        true * scale, rel=1e-2 if scale < 1 else 1e-4
    )


def test_temperature_is_the_likelihoods_minimum_and_mends_calibration() -> None:
    logits, labels = sampled(1000, 5, scale=2.0, seed=3)
    sure = logits * 4
    best = fit_temperature(sure, labels)
    at_best = float(negative_log_likelihood(sure / best, labels))
    for factor in (0.9, 0.999, 1.001, 1.1):
        assert float(negative_log_likelihood(sure / (best * factor), labels)) > at_best
    assert float(expected_calibration_error(sure, labels)) > 0.2
    assert float(expected_calibration_error(sure / best, labels)) < 0.06


def test_the_fit_does_not_run_away_where_the_likelihood_is_flat() -> None:
    """Saturated rows have no curvature, and the rows that are unsure none either: Newton alone leaves every bound."""
    margins = torch.tensor([0.01] * 60 + [10.0] * 30 + [9.0] * 10, dtype=torch.float64)
    logits = torch.stack([margins, torch.zeros(100, dtype=torch.float64)], dim=1)
    labels = torch.tensor([0] * 90 + [1] * 10)
    best = fit_temperature(logits, labels)
    at_best = float(negative_log_likelihood(logits / best, labels))
    for factor in (0.5, 0.999, 1.001, 2.0):
        assert float(negative_log_likelihood(logits / (best * factor), labels)) > at_best


def test_impossible_classes_do_not_disturb_the_fit() -> None:
    logits, labels = sampled(200, 3, scale=2.0)
    masked = torch.cat([logits, torch.full((200, 1), -torch.inf, dtype=torch.float64)], dim=1)
    assert fit_temperature(masked, labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-9)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        ([[2.0, 0.0], [0.0, 1.0]], [0, 1]),  # all right: ever surer is ever better
        ([[2.0, 0.0], [0.0, 1.0]], [1, 0]),  # all wrong: ever less sure is ever better
        ([[3.0, 3.0], [0.0, 0.0]], [1, 0]),  # constant: all the same
    ],
    ids=["all right", "all wrong", "constant"],
)
def test_where_no_temperature_is_best_it_stays_one_and_says_so(
    logits: list[list[float]], labels: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert fit_temperature(torch.tensor(logits), torch.tensor(labels)) == 1.0
    assert "No temperature is best for these 2 items" in caplog.text


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([-100, -100]), "None of the 2 items has a label"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "Label 3 is not a class: ids are 0 to 2, or -100"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), "Label -1 is not a class"),
        (torch.zeros(2, 3), torch.zeros(2), r"Labels of type torch.float32 .* must be one class id \(an integer\)"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), r"shape \(3,\) do not fit logits \(2, 3\)"),
        (torch.full((2, 3), torch.nan), torch.tensor([0, 1]), "The logits hold NaN"),
    ],
)
def test_bad_input_is_refused(logits: Tensor, labels: Tensor, message: str) -> None:
    for function in (expected_calibration_error, negative_log_likelihood, fit_temperature):
        with pytest.raises(TransferError, match=message):
            function(logits, labels)


def test_no_bins_are_refused() -> None:
    with pytest.raises(TransferError, match="bins=0 is not valid"):
        expected_calibration_error(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), bins=0)
