"""Transferability scores against the formulas of their papers, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from hf_transfer.errors import TransferError
from hf_transfer.frozen.scores import h_score, leep, logme, n_leep


def rows(n: int = 40, d: int = 5, classes: int = 3, apart: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Clouds around class means."""
    draw = np.random.default_rng(0)
    y = np.arange(n) % classes
    return draw.normal(size=(n, d)) + apart * draw.normal(size=(classes, d))[y] + 0.3, y


def evidence(x: np.ndarray, y: np.ndarray, alpha: float, beta: float) -> float:
    """log p(y | F, alpha, beta), with the weights integrated out: y is Gaussian."""
    covariance = x @ x.T / alpha + np.eye(len(x)) / beta
    return float(multivariate_normal.logpdf(y, cov=covariance))


@pytest.mark.parametrize("d", [5, 60])  # fewer features than rows, and more
def test_logme_is_the_evidence_at_its_maximum(d: int) -> None:
    x, y = rows(d=d)
    expected = []
    for one in range(3):
        target = (y == one).astype(float)
        best = minimize(
            lambda p, target=target: -evidence(x, target, *np.exp(p)),
            [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-11, "maxiter": 4000},
        )  # fmt: skip
        expected.append(-best.fun / len(x))
    assert logme(x, y) == pytest.approx(np.mean(expected), abs=1e-6)


def test_logme_prefers_features_that_tell_the_classes() -> None:
    near, y = rows(apart=0.1)
    far, _ = rows(apart=3.0)
    assert logme(far, y) > logme(near, y)


def test_logme_of_labels_that_follow_exactly_is_finite() -> None:
    y = np.arange(30) % 2
    assert np.isfinite(logme(np.stack([y == 0, y == 1], 1), y))


def test_h_score_is_the_trace_of_the_paper() -> None:
    x, y = rows()
    means = np.stack([x[y == y[i]].mean(0) for i in range(len(x))])  # E[f | y] of each row
    expected = np.trace(np.linalg.inv(np.cov(x.T, bias=True)) @ np.cov(means.T, bias=True))
    assert h_score(x, y, shrinkage=0) == pytest.approx(expected, rel=1e-10)


def test_features_that_are_constant_or_repeat_have_a_score() -> None:
    x, y = rows()
    assert h_score(np.ones_like(x), y) == 0 and h_score(np.ones_like(x), y, shrinkage=0) == 0
    assert h_score(np.concatenate([x, x], 1), y, shrinkage=0) == pytest.approx(h_score(x, y, shrinkage=0), rel=1e-8)
    assert logme(np.concatenate([x, 0 * x], 1), y) == pytest.approx(logme(x, y), rel=1e-8)


def test_shrinkage_is_that_of_ledoit_and_wolf() -> None:
    x, y = rows(n=30, d=12)
    centred = x - x.mean(0)
    n, d = x.shape
    covariance = centred.T @ centred / n
    mu = np.trace(covariance) / d
    # Ledoit and Wolf 2004, lemmas 3.2 to 3.4, with squared Frobenius norms.
    spread = np.square(covariance - mu * np.eye(d)).sum()
    noise = sum(np.square(np.outer(row, row) - covariance).sum() for row in centred) / n**2
    a = min(noise, spread) / spread
    means = np.stack([centred[y == y[i]].mean(0) for i in range(n)])
    shrunk = (1 - a) * covariance + a * mu * np.eye(d)
    expected = np.trace(np.linalg.inv(shrunk) @ ((1 - a) * np.cov(means.T, bias=True)))  # Ibrahim et al., equation 5
    assert 0.05 < a < 1
    assert h_score(x, y) == pytest.approx(expected, rel=1e-10)
    assert h_score(x, y, shrinkage=a) == pytest.approx(expected, rel=1e-10)


def test_shrinkage_tells_noise_from_classes_where_rows_are_few() -> None:
    """The plain score of 30 random rows in 60 dimensions is the highest there is; the shrunk one knows better."""
    noise, y = rows(n=30, d=60, apart=0.0)
    told, _ = rows(n=30, d=60, apart=3.0)
    assert h_score(noise, y, shrinkage=0) == pytest.approx(2.0)
    assert h_score(noise, y) < 0.5 * h_score(told, y)


def test_leep_is_the_sum_of_the_paper() -> None:
    draw = np.random.default_rng(1)
    theta, y = draw.dirichlet(np.ones(4), size=25), np.arange(25) % 3
    n, score = len(y), 0.0
    for i in range(n):
        likelihood = 0.0
        for z in range(4):
            joint = sum(theta[j, z] for j in range(n) if y[j] == y[i]) / n
            likelihood += joint / (sum(theta[j, z] for j in range(n)) / n) * theta[i, z]
        score += np.log(likelihood) / n
    assert leep(theta, y) == pytest.approx(score, rel=1e-12)


def test_leep_of_classes_that_map_one_to_one_is_zero() -> None:
    y = np.arange(12) % 3
    assert leep(np.eye(4)[y + 1], y) == pytest.approx(0)  # the source class that nothing falls into counts for nothing


def test_n_leep_is_leep_of_a_mixture_on_principal_components() -> None:
    from sklearn.mixture import GaussianMixture

    x, y = rows(n=60, apart=3.0)
    centred = x - x.mean(0)
    _, s, directions = np.linalg.svd(centred, full_matrices=False)
    kept = int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), 0.8)) + 1
    principal = centred @ directions[:kept].T
    mixture = GaussianMixture(4, random_state=0).fit(principal)
    assert n_leep(x, y, components=4) == pytest.approx(leep(mixture.predict_proba(principal), y), abs=1e-6)
    near, _ = rows(n=60, apart=0.1)
    assert n_leep(x, y) > n_leep(near, y)


@pytest.mark.parametrize("score", [logme, h_score])
def test_scores_take_tensors_and_leave_out_rows_without_a_label(score) -> None:
    x, y = rows()
    expected = score(x, y)
    more_x, more_y = np.concatenate([x, x[:3] + 7]), np.concatenate([y, [-100] * 3])
    assert score(torch.tensor(more_x), torch.tensor(more_y)) == pytest.approx(expected, rel=1e-12)
    assert score(torch.tensor(x, dtype=torch.float32), y) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x, y: logme(x[:, 0], y), r"\(N, D\)"), (lambda x, y: logme(x[:5], y), r"\(5, 5\)"),
        (lambda x, y: logme(x, y.astype(float)), "whole numbers"), (lambda x, y: logme(x * np.nan, y), "nan in row 0"),
        (lambda x, y: logme(x, y * 0), "two classes"), (lambda x, y: h_score(x, y, shrinkage=1.5), "shrinkage=1.5"),
        (lambda x, y: leep(x, y), "row 0 is no distribution"), (lambda x, y: n_leep(x, y, components=99), "99"),
        (lambda x, y: n_leep(x, y, energy=1.0), "energy=1.0"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, says: str) -> None:
    with pytest.raises(TransferError, match=says):
        call(*rows())
