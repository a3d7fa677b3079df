"""`evaluate.Metric` modules that need no network: use them like those of `evaluate.load`.

    from hf_transfer.evaluation import AUROC, Accuracy, TopKAccuracy
    clf = evaluate.combine([Accuracy(), TopKAccuracy(k=5), AUROC()])
    clf.add_batch(predictions=logits, references=labels)
    clf.compute()                      # {"accuracy": ..., "top5_accuracy": ..., "auroc": ...}

Across processes: `Accuracy(num_process=2, process_id=rank, experiment_id="run-7", cache_dir="/a/shared/folder")`;
process 0 computes over everybody's rows. Rows whose reference is -100 (unlabelled) do not count.

Importing this module imports `evaluate`, which takes seconds; `compute_metrics_for` (in `streaming`) does not need it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np

from ..errors import TransferError
from ..objective import UNLABELLED
from . import scores
from .streaming import StreamingMetrics, compute_metrics_for

__all__ = [
    "AUROC",
    "Accuracy",
    "BalancedAccuracy",
    "EntityF1",
    "MacroF1",
    "MeanSquaredError",
    "Pearson",
    "Spearman",
    "StreamingMetrics",
    "TopKAccuracy",
    "compute_metrics_for",
]

_NUMBER = datasets.Value("float64")
_CLASS = datasets.Value("int64")
_TAGS = datasets.List(datasets.Value("string"))


class _Metric(evaluate.Metric):
    """What the modules below share: rows in memory in one process, in a named shared folder across several.

    Args:
        num_process: Processes that add rows to this metric.
        process_id: This process, 0 to num_process - 1.
        experiment_id: A name that this evaluation's processes share and no other evaluation on the file system has;
            required where `num_process` > 1, because under the default name two runs would mix their rows.
        **kwargs: Any other argument of `evaluate.Metric`, such as `cache_dir`, the folder where processes meet.

    Raises:
        TransferError: `num_process` > 1 without an `experiment_id`.
    """

    takes = ""  # what predictions and references are, in words
    schema: ClassVar[Any] = None  # the same for evaluate: one set of features, or a list to choose from

    def __init__(self, *, num_process: int = 1, process_id: int = 0, experiment_id: str | None = None, **kwargs: Any):
        if num_process > 1 and experiment_id is None:
            raise TransferError(
                f"num_process={num_process} without an experiment_id: processes meet by that name, and two runs under "
                "the default one would mix their rows. Pass one new name in all of them, e.g. experiment_id='run-7'."
            )
        kwargs.setdefault("keep_in_memory", num_process == 1)
        super().__init__(num_process=num_process, process_id=process_id, experiment_id=experiment_id, **kwargs)

    def _build_data_dir(self) -> str:
        return "" if self.keep_in_memory else super()._build_data_dir()  # else evaluate makes a folder it never uses

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description=self.takes,
            features=self.schema,
        )

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        """Adds the rows given, if any, and scores all the rows added since the last call.

        Returns:
            The scores by name in process 0; `{}` in the others, where evaluate returns None, on which its `combine`
            fails (0.4.6, `CombinedEvaluations._merge_results`). Delete this method when that takes None.
        """
        return super().compute(predictions=predictions, references=references, **kwargs) or {}


class _Score(_Metric):
    """One number of labels and predictions, under the metric's own name."""

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predicted, labels = np.asarray(predictions, dtype=np.float64), np.asarray(references)
        labelled = (labels != UNLABELLED).reshape(len(labels), -1).any(axis=1)
        if not labelled.any():
            raise TransferError(
                f"{self.name}: none of the {len(labels)} rows has a label (a reference other than {UNLABELLED})."
            )
        value = self.score(labels[labelled], predicted[labelled])
        return {} if value is None else {self.key: value}

    @property
    def key(self) -> str:
        return self.name

    def score(self, labels: np.ndarray, predicted: np.ndarray) -> float | None:
        raise NotImplementedError


class _ClassScore(_Score):
    takes = "predictions: class ids (N,), or scores (N, C). references: class ids (N,); -100 does not count."
    schema: ClassVar[Any] = [
        datasets.Features(predictions=_NUMBER, references=_CLASS),
        datasets.Features(predictions=datasets.List(_NUMBER), references=_CLASS),
    ]

    def class_ids(self, predicted: np.ndarray) -> np.ndarray:
        if predicted.ndim == 2:
            return predicted.argmax(axis=1)
        fractions = predicted[predicted != np.floor(predicted)]
        if len(fractions):
            raise TransferError(
                f"{self.name}: {fractions[0]} is not a class id. Predictions are class ids (N,) or one score a class "
                "(N, C); turn the score of the positive class into an id first, e.g. (scores > 0.5).astype(int)."
            )
        return predicted.astype(np.int64)


class Accuracy(_ClassScore):
    """Share of rows whose predicted class is the label. Key `accuracy`."""

    def score(self, labels: np.ndarray, predicted: np.ndarray) -> float:
        return scores.accuracy(labels, self.class_ids(predicted))


class BalancedAccuracy(_ClassScore):
    """Mean over the classes of the share of their rows that were found. Key `balanced_accuracy`."""

    def score(self, labels: np.ndarray, predicted: np.ndarray) -> float:
        return scores.balanced_accuracy(labels, self.class_ids(predicted))


class MacroF1(_ClassScore):
    """Mean over the classes of the F1 score. Key `macro_f1`."""

    def score(self, labels: np.ndarray, predicted: np.ndarray) -> float:
        return scores.macro_f1(labels, self.class_ids(predicted))


class TopKAccuracy(_Score):
    """Share of rows whose label is among the k highest scores. Key `top{k}_accuracy`.

    Args:
        k: How many classes count as predicted, 1 to the number of classes.
        **kwargs: As for every metric here: `num_process`, `process_id`, `experiment_id`, `cache_dir`, ...
    """

    takes = "predictions: scores (N, C). references: class ids (N,); -100 does not count."
    schema: ClassVar[Any] = datasets.Features(predictions=datasets.List(_NUMBER), references=_CLASS)

    def __init__(self, *, k: int = 5, **kwargs: Any):
        self.k = k
        super().__init__(**kwargs)

    @property
    def key(self) -> str:
        return f"top{self.k}_accuracy"

    def score(self, labels: np.ndarray, predicted: np.ndarray) -> float:
        if not 1 <= self.k <= predicted.shape[1]:
            raise TransferError(f"k={self.k} with {predicted.shape[1]} classes: k is 1 to the number of classes.")
        return scores.top_k_accuracy(labels, predicted, self.k)


class AUROC(_ClassScore):
    """Area under the ROC curve, with more than two classes the mean of one against the rest. Key `auroc`.

    Left out of the result, with a warning in the log, where the references hold one class only.
    """

    takes = (
        "predictions: scores of class 1 (N,), or one score a class (N, C), such as probabilities. "
        "references: class ids (N,); -100 does not count."
    )

    def score(self, labels: np.ndarray, predicted: np.ndarray) -> float | None:
        return scores.auroc(labels, predicted)


class EntityF1(_Metric):
    """Precision, recall and F1 of whole entities by seqeval. Keys `entity_f1`, `entity_precision`, `entity_recall`."""

    takes = "predictions, references: the tags of each sentence, such as ['B-PER', 'I-PER', 'O']."
    schema: ClassVar[Any] = datasets.Features(predictions=_TAGS, references=_TAGS)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return scores.count_entities(references, predictions).scores()


class _NumberScore(_Score):
    takes = "predictions, references: numbers (N,), or (N, outputs); rows whose references are -100 do not count."
    schema: ClassVar[Any] = [
        datasets.Features(predictions=_NUMBER, references=_NUMBER),
        datasets.Features(predictions=datasets.List(_NUMBER), references=datasets.List(_NUMBER)),
    ]


class MeanSquaredError(_NumberScore):
    """Mean of the squared differences over rows and outputs. Key `mse`."""

    key = "mse"

    def score(self, labels: np.ndarray, predicted: np.ndarray) -> float:
        return scores.mean_squared_error(labels, predicted)


class Pearson(_NumberScore):
    """Linear correlation, the mean over outputs; left out, with a warning, where a side is constant. Key `pearson`."""

    def score(self, labels: np.ndarray, predicted: np.ndarray) -> float | None:
        return scores.pearson(labels, predicted)


class Spearman(_NumberScore):
    """Rank correlation, the mean over outputs; left out, with a warning, where a side is constant. Key `spearman`."""

    def score(self, labels: np.ndarray, predicted: np.ndarray) -> float | None:
        return scores.spearman(labels, predicted)
