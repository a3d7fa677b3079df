"""What streaming metrics keep of the batches they have seen: counts where counts suffice, else vectors."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import TransferError
from ..objective import UNLABELLED
from . import scores

logger = logging.getLogger(__name__)


class Accumulator(Protocol):
    """What one family of metrics keeps of the batches it has seen."""

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics that it computes where they are defined."""
        ...

    def reset(self) -> None:
        """Forgets all batches."""

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Takes one batch: logits (N, C), (N, T, C) or (N, outputs), with labels (N,), (N, T) or (N, outputs)."""

    def compute(self) -> dict[str, float | None]:
        """The metrics of all batches since the last reset; `None` is undefined."""


class ClassCounts:
    """Accuracy, balanced accuracy, macro F1 and top-5 accuracy, from three counts a class.

    Args:
        classes: Number of classes C.
        per_class: Whether the metrics that average over classes are wanted.
    """

    def __init__(self, classes: int, *, per_class: bool = True):
        self.classes, self.per_class = classes, per_class
        self.reset()

    @property
    def names(self) -> tuple[str, ...]:
        averages = ("balanced_accuracy", "macro_f1") if self.per_class else ()
        return ("accuracy", *averages, *(("top5_accuracy",) if averages and self.classes > 5 else ()))

    def reset(self) -> None:
        self.right, self.predicted, self.true = (np.zeros(self.classes, dtype=np.int64) for _ in range(3))  # (C,)
        self.in_top5 = 0

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        logits, ids = _labelled_items(predictions, labels, self.classes)  # (M, C), (M,)
        guess = _argmax(logits)
        if self.classes > 5:
            self.in_top5 += _in_top(5, logits, ids)
        guessed, true = guess.cpu().numpy(), ids.cpu().numpy()
        self.right += self._count(true[guessed == true])
        self.predicted += self._count(guessed)
        self.true += self._count(true)

    def _count(self, ids: np.ndarray) -> np.ndarray:
        return np.bincount(ids, minlength=self.classes)

    def compute(self) -> dict[str, float | None]:
        total = int(self.true.sum())
        if total == 0:
            logger.warning("No row of the evaluation set has a label (all are %d): no metrics.", UNLABELLED)
            return {}
        metrics: dict[str, float | None] = {"accuracy": float(self.right.sum() / total)}
        if self.per_class:
            seen, occurring = self.true > 0, self.true + self.predicted > 0
            metrics["balanced_accuracy"] = float((self.right[seen] / self.true[seen]).mean())
            metrics["macro_f1"] = float((2 * self.right[occurring] / (self.true + self.predicted)[occurring]).mean())
            if self.classes > 5:
                metrics["top5_accuracy"] = self.in_top5 / total
        return metrics


class ScoreCurve:
    """AUROC, from the log-odds of class 1, or of every class where there are more than two.

    Log-odds order the rows as softmax probabilities do, and never saturate to ties as those do.
    """

    names = ("auroc",)

    def __init__(self, classes: int):
        self.classes = classes
        self.reset()

    def reset(self) -> None:
        self.log_odds: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        logits, labels = _labelled_items(predictions, labels, self.classes)
        self.log_odds.append(_log_odds(logits.double()).cpu().numpy())  # (M,) or (M, C)
        self.labels.append(labels.cpu().numpy())

    def compute(self) -> dict[str, float | None]:
        return {"auroc": scores.auroc(np.concatenate(self.labels), np.concatenate(self.log_odds))}


class Entities:
    """Precision, recall and F1 of whole entities: sentences do not share entities, so their counts add up.

    Args:
        names: The tags in id order.
    """

    names = ("entity_precision", "entity_recall", "entity_f1")

    def __init__(self, names: Sequence[str]):
        scores.seqeval_reader()  # missing? said before the first batch
        self.tags = list(names)
        self.reset()

    def reset(self) -> None:
        self.counts = scores.EntityCounts(0, 0, 0)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        guess = predictions.argmax(dim=-1).cpu().numpy()  # (N, T)
        truth = labels.cpu().numpy()
        kept = truth != UNLABELLED
        batch = scores.count_entities(*(self._tags(ids, kept) for ids in (truth, guess)))
        self.counts = scores.EntityCounts(*(old + new for old, new in zip(self.counts, batch, strict=True)))

    def _tags(self, ids: np.ndarray, kept: np.ndarray) -> list[list[str]]:
        return [[self.tags[i] for i in row[keep]] for row, keep in zip(ids, kept, strict=True)]

    def compute(self) -> dict[str, float | None]:
        return {**self.counts.scores()}


class Numbers:
    """Mean squared error, Pearson and Spearman correlation, from the two vectors themselves: ranks need them all.

    Args:
        outputs: Numbers a row.
    """

    names = ("mse", "pearson", "spearman")

    def __init__(self, outputs: int):
        self.outputs = outputs
        self.reset()

    def reset(self) -> None:
        self.predicted: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        if predictions.numel() != labels.numel() or predictions.numel() % self.outputs:
            raise TransferError(
                f"Predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)} do not hold {self.outputs} "
                "number(s) a row each. Load the model with as many labels as the label column has numbers."
            )
        _refuse_nan(predictions)
        predicted, targets = (x.reshape(-1, self.outputs).double() for x in (predictions, labels))  # (N, outputs)
        labelled = (targets != UNLABELLED).any(dim=1)
        self.predicted.append(predicted[labelled].cpu().numpy())
        self.targets.append(targets[labelled].cpu().numpy())

    def compute(self) -> dict[str, float | None]:
        targets, predicted = np.concatenate(self.targets), np.concatenate(self.predicted)
        if len(targets) == 0:
            logger.warning("No row of the evaluation set has a label (all are %d): no metrics.", UNLABELLED)
            return {}
        return {
            "mse": scores.mean_squared_error(targets, predicted),
            "pearson": scores.pearson(targets, predicted),
            "spearman": scores.spearman(targets, predicted),
        }


class NextToken:
    """Accuracy and perplexity of next tokens: the logits at position t are for the token at t + 1."""

    names = ("accuracy", "perplexity")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.tokens = self.right = 0
        self.nll = 0.0

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        for logits, targets in zip(predictions[:, :-1], labels[:, 1:], strict=True):  # (T-1, V), (T-1,): a row bounds
            logits, targets = logits[targets != UNLABELLED].float(), targets[targets != UNLABELLED]  # the float32 copy
            self.tokens += len(targets)
            self.right += int((logits.argmax(dim=-1) == targets).sum())
            self.nll += float(F.cross_entropy(logits, targets, reduction="sum"))

    def compute(self) -> dict[str, float | None]:
        if self.tokens == 0:
            logger.warning("No token of the evaluation set has a label (all are %d): no metrics.", UNLABELLED)
            return {}
        mean = self.nll / self.tokens
        return {"accuracy": self.right / self.tokens, "perplexity": math.exp(mean) if mean < 700 else math.inf}


def _log_odds(logits: Tensor) -> Tensor:
    """log(p / (1 - p)) of class 1 (M,) for two classes, else of every class (M, C). `logits` (M, C), float64."""
    if logits.shape[1] == 2:
        return logits[:, 1] - logits[:, 0]
    log_p = logits.log_softmax(dim=1)
    log_odds = log_p - torch.log(-torch.expm1(log_p))
    best = logits.argmax(dim=1, keepdim=True)  # the one p that can round to 1: its 1 - p is the sum of the others
    others = logits.scatter(1, best, -torch.inf).logsumexp(dim=1, keepdim=True)
    return log_odds.scatter(1, best, logits.gather(1, best) - others)


def _argmax(logits: Tensor) -> Tensor:
    """(M,) the first class with the highest logit."""
    if (array := _quick(logits)) is None or not len(logits):
        return logits.argmax(dim=1)
    return torch.from_numpy(array.argmax(axis=1))


def _in_top(k: int, logits: Tensor, ids: Tensor) -> int:
    """In how many rows a class is among the k highest; of equal logits those of lower ids come first."""
    own = logits.gather(1, ids[:, None])  # (M, 1)
    if (array := _quick(logits)) is None:
        ahead = (logits > own).sum(dim=1)  # (M,)
    else:  # summed as bytes
        ahead = torch.from_numpy((array > own.numpy()).view(np.uint8).sum(axis=1, dtype=np.int64))
    possible = ahead < k
    if not bool(possible.any()):
        return 0
    logits, own, ids, ahead = logits[possible], own[possible], ids[possible], ahead[possible]
    equal = logits == own
    if bool((equal.sum(dim=1) > 1).any()):
        classes = torch.arange(logits.shape[1], device=logits.device)
        ahead = ahead + (equal & (classes < ids[:, None])).sum(dim=1)
    return int((ahead < k).sum())


def _quick(logits: Tensor) -> np.ndarray | None:
    """The logits as numpy has them, which takes a tenth to a half of torch's time on a CPU; None elsewhere."""
    return logits.numpy() if logits.device.type == "cpu" and logits.dtype != torch.bfloat16 else None


def _labelled_items(predictions: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Logits (M, C) and class ids (M,) of the rows or tokens that have a label."""
    if predictions.shape[:-1] != labels.shape or predictions.shape[-1] != classes:
        raise TransferError(
            f"Logits {tuple(predictions.shape)} do not fit labels {tuple(labels.shape)} of {classes} classes: "
            f"they must be {(*labels.shape, classes)}, with one class id a row or token."
        )
    labelled = labels != UNLABELLED
    if bool(labelled.all()):  # no copy
        logits, ids = predictions.reshape(-1, classes), labels.reshape(-1).long()
    else:
        logits, ids = predictions[labelled], labels[labelled].long()
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < classes:
        wrong = ids[(ids < 0) | (ids >= classes)][0]
        raise TransferError(
            f"Label {int(wrong)} is not a class of the model: ids are 0 to {classes - 1}, or {UNLABELLED}."
        )
    _refuse_nan(logits)
    return logits, ids


def _refuse_nan(predictions: Tensor) -> None:
    if predictions.numel() and predictions.amax().isnan():  # a NaN is the largest of any
        raise TransferError(
            "The model's predictions hold NaN: training diverged, or the inputs hold NaN. Lower the learning "
            "rate, train in bf16 or float32 instead of fp16, and check the inputs."
        )
