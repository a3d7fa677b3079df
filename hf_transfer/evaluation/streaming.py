"""`compute_metrics` for the Trainer that reads one batch at a time and keeps counts, not logits.

    Trainer(..., args=TrainingArguments(..., batch_eval_metrics=True),
            compute_metrics=compute_metrics_for("image-classification", labels))

The Trainer's own way concatenates all logits first: quadratic time and memory that grows with rows x classes. Here the
memory does not grow with the rows, but for AUROC (one number a row) and correlations (two numbers an output and row).
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import TransferError
from .accumulators import Accumulator, ClassCounts, Entities, NextToken, Numbers, ScoreCurve

LOWER_IS_BETTER = ("loss", "mse", "perplexity")
CLASSIFICATION = ("image-classification", "text-classification", "audio-classification")
TASKS = (*CLASSIFICATION, "token-classification", "regression", "causal-lm")


def compute_metrics_for(
    task: str, labels: int | Sequence[str] | None, names: Sequence[str] | None = None, *, auroc: bool | None = None
) -> StreamingMetrics:
    """The metrics of a task, ready to be a Trainer's `compute_metrics`.

    | task | result |
    |---|---|
    | {image, text, audio}-classification | accuracy, balanced_accuracy, macro_f1; top5_accuracy; auroc |
    | token-classification | accuracy of tokens; entity_f1, entity_precision, entity_recall if the names are IOB tags |
    | regression | mse, pearson, spearman |
    | causal-lm | accuracy of next tokens, perplexity |

    Top-5 accuracy comes with more than 5 classes, AUROC with two.

    Args:
        task: One of the tasks above.
        labels: Number of classes or outputs, or the label names in id order. A causal-lm needs none.
        names: The label names in id order, where `labels` is a number. Token classification needs them.
        auroc: Whether to compute the area under the ROC curve; by default with two classes. With C > 2 classes it is
            the mean of one class against the rest, and keeps C numbers a row.

    Returns:
        A callable `(eval_prediction, compute_result=True) -> dict`.

    Raises:
        TransferError: Unknown task, no label, or token classification without label names.
    """
    if task not in TASKS:
        raise TransferError(f"Unknown task {task!r}. Tasks are {', '.join(TASKS)}.")
    if task == "causal-lm":
        return StreamingMetrics([NextToken()])
    if names is None and not isinstance(labels, int):
        names = labels
    count = labels if isinstance(labels, int) else len(labels or ())
    if count < 1 or (names is not None and len(names) != count):
        raise TransferError(f"labels={labels!r} with names={names!r}: need at least one label, and one name for each.")
    if task == "regression":
        return StreamingMetrics([Numbers(count)])
    if task == "token-classification":
        if names is None:
            raise TransferError(
                "Token classification needs the label names in id order, such as ['O', 'B-PER', 'I-PER']."
            )
        parts: list[Accumulator] = [ClassCounts(count, per_class=False)]
        return StreamingMetrics([*parts, Entities(names)] if _are_iob(names) else [ClassCounts(count)])
    with_auroc = count == 2 if auroc is None else auroc
    return StreamingMetrics([ClassCounts(count), ScoreCurve(count)] if with_auroc else [ClassCounts(count)])


def check_best_metric(args: Any, names: Sequence[str]) -> None:
    """Whether `metric_for_best_model` is one that evaluations will give; call it before any work.

    The Trainer looks it up after the first evaluation, an epoch into the training. It also takes a higher value for
    the better one unless the name ends in "loss", and would keep the worst epoch by mean squared error.

    Args:
        args: The training arguments.
        names: The metrics of the task, such as `compute_metrics_for(...).names`; "loss" is always there.

    Raises:
        TransferError: If there is no such metric, or the wrong end of it would be kept.
    """
    asked = args.metric_for_best_model
    if asked is None or str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
        return
    name, known = asked.removeprefix("eval_"), ["loss", *names]
    if name not in known:
        near = "".join(f"; did you mean {each!r}" for each in difflib.get_close_matches(name, known, n=1))
        raise TransferError(
            f"metric_for_best_model={asked!r} is no metric of this task{near}. There are: {', '.join(known)}."
        )
    if name in LOWER_IS_BETTER and args.greater_is_better:
        raise TransferError(f"metric_for_best_model={asked!r} is better when lower: pass greater_is_better=False too.")


def _are_iob(names: Sequence[str]) -> bool:
    """Whether label names are the tags of entities that seqeval reads: `O`, and others like `B-PER`."""
    return "O" in names and len(names) > 1 and all(n == "O" or n[:2] in ("B-", "I-", "E-", "S-") for n in names)


class StreamingMetrics:
    """A Trainer's `compute_metrics` for `batch_eval_metrics=True`, also right when called once with everything.

    Args:
        accumulators: Where the numbers come from.
    """

    def __init__(self, accumulators: Sequence[Accumulator]):
        self.accumulators = list(accumulators)
        self.reset()

    @property
    def names(self) -> list[str]:
        """The metrics that an evaluation gives where they are defined."""
        return list(dict.fromkeys(name for part in self.accumulators for name in part.names))

    def reset(self) -> None:
        """Forgets the batches seen, such as those of an evaluation that was interrupted."""
        for accumulator in self.accumulators:
            accumulator.reset()

    @torch.no_grad()
    def __call__(self, eval_prediction: Any, compute_result: bool = True) -> dict[str, float]:
        """Takes one batch; after the last one, returns the metrics of all and starts anew.

        Args:
            eval_prediction: Its `predictions` (logits, or a tuple that starts with them) and `label_ids`, as tensors
                or arrays.
            compute_result: Whether this is the last batch.

        Returns:
            The metrics by name; empty before the last batch. Undefined ones are left out, and the log says why.

        Raises:
            TransferError: Predictions hold NaN, or do not fit the labels.
        """
        predictions, labels = eval_prediction.predictions, eval_prediction.label_ids
        if isinstance(predictions, (tuple, list)):
            predictions = predictions[0]  # the logits; the model's other outputs follow
        predictions = torch.as_tensor(predictions)
        labels = torch.as_tensor(labels, device=predictions.device)
        for accumulator in self.accumulators:
            accumulator.update(predictions, labels)
        if not compute_result:
            return {}
        metrics = {name: value for part in self.accumulators for name, value in part.compute().items()}
        self.reset()
        return {name: value for name, value in metrics.items() if value is not None}
