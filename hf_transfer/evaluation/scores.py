"""The arithmetic of the metrics: pure functions of NumPy arrays, computed by scikit-learn, SciPy and seqeval.

Each takes the truth first. What cannot be computed from the rows given is `None`, and the log says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

logger = logging.getLogger(__name__)


def accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Share of rows whose predicted class id is the label. Both (N,)."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predicted))


def top_k_accuracy(labels: np.ndarray, scores: np.ndarray, k: int) -> float:
    """Share of rows whose label is among the k classes scored highest. `labels` (N,), `scores` (N, C), 1 <= k <= C."""
    from sklearn.metrics import top_k_accuracy_score

    classes = np.arange(scores.shape[1])
    if len(classes) == 2:  # scikit-learn takes the positive class's score alone where there are two classes
        scores = scores[:, 1] - scores[:, 0]
        return 1.0 if k >= 2 else accuracy(labels, scores > 0)
    return float(top_k_accuracy_score(labels, scores, k=k, labels=classes))


def balanced_accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over the classes in `labels` of the share of their rows that were found. Both (N,)."""
    from sklearn.metrics import recall_score

    return float(recall_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0))


def macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over the classes that occur (in either array) of the F1 score. Both (N,)."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, average="macro", zero_division=0))


def auroc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Area under the ROC curve; with more than two classes the mean of one class against the rest.

    Args:
        labels: (N,) class ids.
        scores: (N,) scores of class 1, or (N, C) one column a class; only the order within a column matters.
            Two columns count as the score of class 1 over class 0.

    Returns:
        The area in [0, 1]; `None` where no class has both rows inside and rows outside it. With more than two
        classes, those without such rows are left out of the mean, and the log names them.
    """
    from sklearn.metrics import roc_auc_score

    if scores.ndim == 2 and scores.shape[1] == 2:
        scores = scores[:, 1] - scores[:, 0]
    columns = {1: scores} if scores.ndim == 1 else dict(enumerate(scores.T))
    undefined = [c for c in columns if np.all(labels == c) or not np.any(labels == c)]
    if undefined:
        what = "is undefined and left out" if len(undefined) == len(columns) else "is the mean of the other classes"
        logger.warning(
            "AUROC %s: class %s needs rows inside and outside it; the labels given hold only %s.",
            what,
            ", ".join(map(str, undefined)),
            np.unique(labels).tolist(),
        )
    areas = [roc_auc_score(labels == c, column) for c, column in columns.items() if c not in undefined]
    return float(np.mean(areas)) if areas else None


class EntityCounts(NamedTuple):
    """Entities found right (same type, same span), predicted, and true. Counts of separate sentences add up."""

    right: int
    predicted: int
    true: int

    def scores(self) -> dict[str, float]:
        """`entity_precision`, `entity_recall` and `entity_f1` over all entities (micro); 0 where there is none."""
        return {
            "entity_precision": self.right / max(self.predicted, 1),
            "entity_recall": self.right / max(self.true, 1),
            "entity_f1": 2 * self.right / max(self.predicted + self.true, 1),
        }


def count_entities(labels: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]) -> EntityCounts:
    """Counts the entities of IOB-style sentences the way seqeval (and CoNLL 2000's script) reads them.

    Args:
        labels: The true tags of each sentence, such as `["B-PER", "I-PER", "O"]`.
        predicted: The predicted tags, sentence by sentence of the same length.

    Returns:
        The counts, from which `EntityCounts.scores` gives precision, recall and F1.
    """
    get_entities = seqeval_reader()
    right = n_predicted = n_true = 0
    for true_tags, predicted_tags in zip(labels, predicted, strict=True):
        true_entities, found = set(get_entities(list(true_tags))), set(get_entities(list(predicted_tags)))
        right += len(true_entities & found)
        n_predicted += len(found)
        n_true += len(true_entities)
    return EntityCounts(right, n_predicted, n_true)


def seqeval_reader() -> Callable[[list[str]], list[tuple[str, int, int]]]:
    """seqeval's function from tags to entities (type, first, last).

    Raises:
        ImportError: seqeval, an optional dependency, is not installed.
    """
    try:
        from seqeval.metrics.sequence_labeling import get_entities
    except ImportError as error:
        raise ImportError("Entity F1 needs seqeval: pip install 'hf-transfer-learning[ner]'") from error
    return get_entities


def mean_squared_error(targets: np.ndarray, predicted: np.ndarray) -> float:
    """Mean of the squared differences over rows and outputs. Both (N,) or (N, outputs)."""
    from sklearn.metrics import mean_squared_error as sklearn_mean_squared_error

    return float(sklearn_mean_squared_error(targets, predicted))


def pearson(targets: np.ndarray, predicted: np.ndarray) -> float | None:
    """Linear correlation in [-1, 1], the mean over outputs. Both (N,) or (N, outputs). `None` where undefined."""
    from scipy.stats import pearsonr

    return _mean_correlation("Pearson", pearsonr, targets, predicted)


def spearman(targets: np.ndarray, predicted: np.ndarray) -> float | None:
    """Rank correlation in [-1, 1], the mean over outputs. Both (N,) or (N, outputs). `None` where undefined."""
    from scipy.stats import spearmanr

    return _mean_correlation("Spearman", spearmanr, targets, predicted)


def _mean_correlation(
    name: str, correlation: Callable[..., Any], targets: np.ndarray, predicted: np.ndarray
) -> float | None:
    targets, predicted = targets.reshape(len(targets), -1), predicted.reshape(len(predicted), -1)  # (N, outputs)
    if len(targets) < 2 or np.any(np.ptp(targets, axis=0) == 0) or np.any(np.ptp(predicted, axis=0) == 0):
        logger.warning("%s correlation is undefined and left out: it needs two rows, and neither side constant.", name)
        return None
    outputs = zip(targets.T, predicted.T, strict=True)
    return float(np.mean([correlation(true, guess).statistic for true, guess in outputs]))
