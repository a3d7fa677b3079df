"""Who judges whom: rows are told by classifiers that never saw them, under settings chosen on other rows still."""

from __future__ import annotations

import numpy as np

from ..errors import TransferError
from .classifiers import classifier

PARTS = 5  # that a validation split is cut into, so that no row has a say in the setting it is judged under


def fold_numbers(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """(N,) the fold of each row, stratified by class.

    Args:
        labels: (N,) class ids.
        folds: From 2 to the size of the smallest class.
        seed: Same seed, same folds.

    Raises:
        TransferError: If `folds` is out of range.
    """
    from sklearn.model_selection import StratifiedKFold

    smallest = int(np.unique(labels, return_counts=True)[1].min())
    if not 2 <= folds <= smallest:
        raise TransferError(
            f"folds={folds}: it must be between 2 and the size of the smallest class, {smallest}. With fewer than two "
            "rows a class, pass folds=None (--folds 0), which judges on the validation split."
        )
    numbers = np.empty(len(labels), dtype=np.int64)
    pairs = StratifiedKFold(folds, shuffle=True, random_state=seed).split(np.zeros(len(labels)), labels)
    for number, (_, held_out) in enumerate(pairs):
        numbers[held_out] = number
    return numbers


def part_numbers(n: int, seed: int) -> np.ndarray:
    """(N,) one of a few equal parts for each row, at random."""
    return np.random.default_rng(seed).permutation(n) % PARTS


def cross_predictions(
    method: str, x: np.ndarray, labels: np.ndarray, fold_of: np.ndarray, classes: int, seed: int
) -> np.ndarray:
    """(S, N) class ids by each setting: every row told by a classifier trained on the other folds.

    Args:
        method: One of `classifiers.METHODS`.
        x: (N, D) features.
        labels: (N,) class ids in [0, classes).
        fold_of: (N,) the fold of each row.
        classes: How many there are.
        seed: Of what a method draws.
    """
    told: dict[int, np.ndarray] = {}
    for fold in np.unique(fold_of):
        held_out = fold_of == fold
        told[fold] = classifier(method)(x[~held_out], labels[~held_out], x[held_out], classes, seed)
    together = np.empty((len(next(iter(told.values()))), len(x)), dtype=np.int64)
    for fold, predictions in told.items():
        together[:, fold_of == fold] = predictions
    return together


def best_setting(right: np.ndarray) -> int:
    """The row of (S, N), whether each setting was right on each example, that is right most often; the first."""
    return int(right.sum(1).argmax())


def right_under_others_choice(right: np.ndarray, part_of: np.ndarray) -> np.ndarray:
    """(N,) whether each row was told right under the setting that is best on the other parts.

    The best of S settings on the rows that it is the best on would flatter a method by how many settings it has.

    Args:
        right: (S, N) whether each setting was right on each row.
        part_of: (N,) the part (or fold) of each row.
    """
    chosen = {part: best_setting(right[:, part_of != part]) for part in np.unique(part_of)}
    return right[[chosen[part] for part in part_of], np.arange(right.shape[1])]
