"""The classifiers that probe features: linear (a grid of settings in one pass), nearest neighbours, LDA, logistic.

Each is a function of training features (N, D), their labels (N,) and the features to tell (M, D) that gives the class
ids of every one of its settings, (S, M). Choosing among settings is `selection`'s.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..errors import TransferError
from .features import default_device
from .linear_probes import GRID, fit_probes

Array = np.ndarray
NEIGHBOURS = (1, 5, 20)
STRENGTHS = (0.01, 1.0)  # scikit-learn's C of logistic regression, on features of length 1 times the square root of D


def linear(x: Array, labels: Array, unseen: Array, classes: int, seed: int) -> Array:
    """Softmax regression by SGD under a grid of learning rates and weight decays, on the accelerator if there is one.

    Args:
        x: (N, D) training features.
        labels: (N,) their class ids, in [0, classes).
        unseen: (M, D) features to tell.
        classes: How many there are.
        seed: Of the order of rows.

    Returns:
        (S, M) class ids, by the settings of `linear_probes.GRID`.
    """
    device = default_device()
    probes = fit_probes(torch.tensor(x, device=device), torch.tensor(labels, device=device), classes, seed=seed)
    return probes.predict(torch.tensor(unseen, device=device)).cpu().numpy()


def knn(x: Array, labels: Array, unseen: Array, classes: int, seed: int) -> Array:
    """Majority of the nearest rows by cosine similarity, of 1, 5 and 20 (of all rows, where there are fewer).

    Args and returns are as for `linear`; there is nothing to draw.
    """
    from sklearn.neighbors import KNeighborsClassifier

    counts = [min(k, len(x)) for k in NEIGHBOURS]
    fitted = KNeighborsClassifier(max(counts), metric="cosine", algorithm="brute").fit(x, labels)
    nearest = labels[fitted.kneighbors(unseen, return_distance=False)]  # (M, K), nearest first
    votes = (np.eye(classes, dtype=np.int32)[nearest[:, :k]].sum(1) for k in counts)  # (M, C)
    return np.stack([vote.argmax(1) for vote in votes])


def lda(x: Array, labels: Array, unseen: Array, classes: int, seed: int) -> Array:
    """Linear discriminant analysis, with the covariance shrunk after Ledoit and Wolf.

    Args and returns are as for `linear`; there is nothing to draw.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(x, labels)
    return fitted.predict(unseen)[None]


def logistic(x: Array, labels: Array, unseen: Array, classes: int, seed: int) -> Array:
    """Logistic regression to convergence, on standardised features, with an L2 penalty of two strengths.

    Args and returns are as for `linear`; there is nothing to draw.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    models = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000, tol=1e-3)) for c in STRENGTHS]
    return np.stack([model.fit(x, labels).predict(unseen) for model in models])


_CLASSIFIERS: dict[str, Callable[[Array, Array, Array, int, int], Array]] = {
    "linear": linear,
    "knn": knn,
    "lda": lda,
    "logistic": logistic,
}
METHODS = tuple(_CLASSIFIERS)


def classifier(method: str) -> Callable[[Array, Array, Array, int, int], Array]:
    """The function of a method's name.

    Raises:
        TransferError: If there is none of that name.
    """
    if method not in _CLASSIFIERS:
        raise TransferError(f"method {method!r} is not known; valid are {', '.join(METHODS)}.")
    return _CLASSIFIERS[method]


def setting_name(method: str, setting: int) -> str:
    """What a row of a method's answers was made with, in words; empty for LDA, which has nothing to set."""
    if method == "linear":
        return str(GRID[setting])
    if method == "knn":
        return f"{NEIGHBOURS[setting]} neighbours"
    return f"C {STRENGTHS[setting]:g}" if method == "logistic" else ""
