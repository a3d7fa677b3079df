"""Transferability scores: how well labels follow from features, without training. Higher is better in each.

    logme(features, labels)               # evidence of a linear model a class
    h_score(features, labels)             # spread between the classes over spread in all
    leep(source_probabilities, labels)    # what the backbone's own classes say of the new ones
    n_leep(features, labels)              # the same with a mixture of Gaussians in place of its own classes

Pure functions of arrays or tensors, computed in float64. A score ranks backbones on one data set: its scale says
nothing over data sets. Rows whose label is -100 do not count.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..errors import TransferError
from ..objective import UNLABELLED


def logme(features: Any, labels: Any, *, iterations: int = 200, tolerance: float = 1e-8) -> float:
    """Log maximum evidence a row, the mean over the classes.

    A class's indicator y is read as F w + noise with w ~ N(0, 1/alpha) and noise ~ N(0, 1/beta); the score is
    log p(y | F, alpha, beta) / N at its maximum over alpha and beta, found by MacKay's fixed point.
    You et al. 2021, "LogME", arXiv:2102.11005, algorithm 1; the spectrum of F is computed once for all classes.

    Args:
        features: (N, D).
        labels: (N,) class ids.
        iterations: Most updates of alpha and beta, from 1.
        tolerance: Relative change of alpha / beta below which they have arrived.

    Returns:
        The score, of any sign.

    Raises:
        TransferError: If the shapes do not go together, a number is not finite, or there are fewer than two classes.
    """
    x, y = _checked(features, labels, "features")
    n, d = x.shape
    indicators = (y[:, None] == np.unique(y)).astype(np.float64)  # (N, K)
    spectrum, seen = _spectrum(x, indicators)  # (R, 1) eigenvalues of F'F, (R, K)
    unseen = np.maximum(indicators.sum(0) - seen.sum(0), 0)  # (K,) of y outside the span of F
    alpha, beta = np.ones(indicators.shape[1]), np.ones(indicators.shape[1])  # (K,)
    for _ in range(iterations):
        before = alpha / beta
        effective = (beta * spectrum / (alpha + beta * spectrum)).sum(0)  # gamma in the paper
        weights, residual = _fit(spectrum, seen, unseen, alpha, beta)
        alpha, beta = effective / (weights + _TINY), (n - effective) / (residual + _TINY)
        if np.all(np.abs(alpha / beta - before) <= tolerance * before):
            break
    weights, residual = _fit(spectrum, seen, unseen, alpha, beta)
    log_determinant = np.log(alpha + beta * spectrum).sum(0) + (d - len(spectrum)) * np.log(alpha)  # of A
    evidence = n * np.log(beta) + d * np.log(alpha) - n * np.log(2 * np.pi)
    evidence = (evidence - beta * residual - alpha * weights - log_determinant) / 2  # (K,)
    return float(evidence.mean() / n)


_TINY = 1e-12  # labels that follow exactly from the features have no residual, and an evidence without bound


def _spectrum(x: np.ndarray, indicators: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared singular values (R, 1) of the features, and squared projections (R, K) of y on the left vectors.

    By the smaller of F'F and FF', which takes a fraction of the time of a singular value decomposition.
    """
    n, d = x.shape
    product = torch.from_numpy(x @ x.T if n <= d else x.T @ x)
    values, vectors = (found.numpy() for found in torch.linalg.eigh(product))  # NumPy's took 15 times as long
    kept = values > 1e-12 * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    if n <= d:
        return values[:, None], np.square(vectors.T @ indicators)
    return values[:, None], np.square(vectors.T @ (x.T @ indicators)) / values[:, None]


def _fit(
    spectrum: np.ndarray, seen: np.ndarray, unseen: np.ndarray, alpha: np.ndarray, beta: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Squared length (K,) of the mean weights m, and of what F m leaves of y."""
    shrunk = alpha + beta * spectrum  # (R, K)
    weights = (np.square(beta) * spectrum * seen / np.square(shrunk)).sum(0)
    return weights, (np.square(alpha) * seen / np.square(shrunk)).sum(0) + unseen


def h_score(features: Any, labels: Any, *, shrinkage: float | None = None) -> float:
    """Spread of the class means relative to the spread of the features.

    tr(C^-1 B), with C the covariance of the features and B that of the mean of each row's class: Bao et al. 2019, "An
    information-theoretic approach to transferability in task transfer learning" (ICIP). C from few rows has small
    eigenvalues that are noise, and its inverse makes them large; so it is shrunk, C' = (1 - a) C + a tr(C)/D I, and
    with it B' = (1 - a) B: Ibrahim et al. 2021, arXiv:2110.06893.

    Args:
        features: (N, D).
        labels: (N,) class ids.
        shrinkage: a in [0, 1]; by default that of Ledoit and Wolf (2004). 0 is the score of Bao et al., with the
            pseudo-inverse.

    Returns:
        The score, in [0, number of classes - 1].

    Raises:
        TransferError: As for `logme`; or if the shrinkage is out of range.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise TransferError(f"shrinkage={shrinkage} is not valid: it must be in [0, 1], or None for Ledoit-Wolf's.")
    x, y = _checked(features, labels, "features")
    x = x - x.mean(0)
    a = float(ledoit_wolf_shrinkage(x, assume_centered=True)) if shrinkage is None else shrinkage
    covariance = x.T @ x / len(x)  # (D, D)
    if not covariance.any():
        return 0.0  # features that never change tell nothing
    shrunk = (1 - a) * covariance + a * np.trace(covariance) / x.shape[1] * np.eye(x.shape[1])
    classes, members = np.unique(y, return_inverse=True)
    counts = np.bincount(members)
    means = np.stack([x[members == one].mean(0) for one in range(len(classes))])  # (K, D)
    solved = np.linalg.solve(shrunk, means.T) if a > 0 else np.linalg.pinv(shrunk, hermitian=True) @ means.T  # (D, K)
    return float((1 - a) * (counts / len(x)) @ (means * solved.T).sum(1))


def leep(source_probabilities: Any, labels: Any) -> float:
    """Log expected empirical prediction: the mean log-likelihood of the labels, given the backbone's own classes.

    Of each source class z the rows tell how its probability spreads over the new classes, P(y | z); a row's label then
    has probability sum_z P(y | z) p(z | row). Nguyen et al. 2020, "LEEP", arXiv:2002.12462, equations 1 to 3.

    Args:
        source_probabilities: (N, Z) what the backbone's own head says; each row sums to 1.
        labels: (N,) class ids.

    Returns:
        The score, at most 0.

    Raises:
        TransferError: As for `logme`; or if a row is no distribution.
    """
    p, y = _checked(source_probabilities, labels, "source_probabilities")
    off = np.flatnonzero((p < 0).any(1) | (np.abs(p.sum(1) - 1) > 1e-3))
    if len(off):
        raise TransferError(
            f"source_probabilities: row {off[0]} is no distribution (it sums to {p[off[0]].sum():.4g}). Pass "
            "probabilities, e.g. logits.softmax(-1)."
        )
    classes, members = np.unique(y, return_inverse=True)
    joint = np.stack([p[members == one].sum(0) for one in range(len(classes))]) / len(p)  # (K, Z)
    marginal = joint.sum(0)
    conditional = joint / np.where(marginal > 0, marginal, 1)  # (K, Z) P(y | z)
    return float(np.log((conditional[members] * p).sum(1)).mean())


def n_leep(features: Any, labels: Any, *, components: int | None = None, energy: float = 0.8, seed: int = 0) -> float:
    """LEEP with the components of a Gaussian mixture on the features as the source classes: no head is needed.

    Li et al. 2021, "Ranking neural checkpoints", arXiv:2011.11200: principal components, then the mixture, then LEEP
    on its posterior. Expectation-maximisation takes seconds where the other scores take milliseconds.

    Args:
        features: (N, D).
        labels: (N,) class ids.
        components: Of the mixture, 1 to N; by default five a class, as in the paper.
        energy: Share of the variance that the principal components hold, in (0, 1).
        seed: Of the mixture's start.

    Returns:
        The score, at most 0.

    Raises:
        TransferError: As for `logme`; or if a number is out of range.
    """
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    x, y = _checked(features, labels, "features")
    count = min(5 * len(np.unique(y)), len(x)) if components is None else components
    if not 1 <= count <= len(x):
        raise TransferError(f"components={components} of a mixture on {len(x)} rows: it must be 1 to that.")
    if not 0 < energy < 1:
        raise TransferError(f"energy={energy} is not valid: it must be in (0, 1).")
    principal = PCA(energy, svd_solver="full").fit_transform(x)  # (N, E)
    mixture = GaussianMixture(count, random_state=seed).fit(principal)
    return leep(mixture.predict_proba(principal), y)


def _checked(values: Any, labels: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) float64 and (N,) int64 of the rows that have a label."""
    x, y = _array(values).astype(np.float64), _array(labels)
    if x.ndim != 2 or y.shape != x.shape[:1] or y.dtype.kind not in "iu":
        raise TransferError(
            f"{name} of shape {x.shape} with labels of shape {y.shape} and type {y.dtype}: they must be (N, D) and "
            "whole numbers (N,)."
        )
    x, y = x[y != UNLABELLED], y[y != UNLABELLED]
    if not np.isfinite(x).all():
        row, column = np.argwhere(~np.isfinite(x))[0]
        raise TransferError(f"{name}: {x[row, column]} in row {row}. A backbone in half precision may overflow.")
    if len(np.unique(y)) < 2:
        raise TransferError(f"{name}: a score needs rows of two classes, and there are {len(np.unique(y))}.")
    return x, y


def _array(value: Any) -> np.ndarray:
    """An array of a tensor on any device, or of what NumPy takes."""
    if torch.is_tensor(value):
        value = value.detach().cpu()
        return (value.double() if value.is_floating_point() else value).numpy()
    return np.asarray(value)
