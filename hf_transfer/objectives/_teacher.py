"""Terms that compare logits with a teacher's: which items count, and what the teacher must have said."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import TransferError
from ..objective import UNLABELLED, Objective, Schedule, Step
from ._labels import labelled_items, number_of

if TYPE_CHECKING:
    from ..distillation.signal import TeacherSignal


class LogitTerm(Objective):
    """A term that compares the student's logits with the teacher's, prediction by prediction.

    Rows count whether they have a label or not: a teacher needs none. Tokens count where their label is not -100
    (padding, prompts, later pieces of a word are); without a `labels` column, each row counts as the mean over its
    attended tokens. Terms that need the labels themselves count labelled items only.

    Args:
        shift: Token t's logits are for token t + 1's label, as in causal language models.
        weight: A number or a schedule of training progress.
        name: The name it is logged under.
    """

    needs_labels: bool = False
    """Whether `compare` reads class indices."""
    needs_classes: bool = True
    """Whether logits are made probabilities: with one output these are always 1."""
    needs_all_logits: bool = True
    """Whether `compare` reads the teacher's logits of all classes; else the largest will do."""
    couples_batch: bool = False
    """Whether `compare` returns one number for all items, not one value each."""

    def __init__(self, shift: bool = False, weight: float | Schedule = 1.0, name: str | None = None) -> None:
        super().__init__(weight, name)
        self.shift = shift

    def compare(self, student: Tensor, teacher: TeacherSignal, labels: Tensor, progress: float) -> Tensor:
        """The term's values for M items.

        Args:
            student: (M, C).
            teacher: The teacher's predictions for these items.
            labels: (M,) class indices; empty if not `needs_labels`.
            progress: Share of training done, in [0, 1].

        Returns:
            (M,), or 0-d if it `couples_batch`.
        """
        raise NotImplementedError

    def count(self, batch: Mapping[str, Any]) -> Tensor | None:
        if self.couples_batch:
            return None
        labels = batch.get("labels")
        if labels is not None and (self.needs_labels or _of_tokens(labels)):
            return number_of(labelled_items(_shifted(labels) if self.shift else labels))
        return number_of(None) if self.needs_labels else rows_of(batch)

    def forward(self, step: Step) -> Tensor:
        student, teacher = self._logits(step)
        mask, share = self._items(step)  # (N,), (N, T) or None; (N, T) or None
        labels = torch.empty(0, dtype=torch.long, device=student.device)
        if self.needs_labels:
            labels = self._labels(step)[mask]
        if mask is not None:
            student, teacher = student[mask], teacher.predictions(mask)
        if not len(student) and self.couples_batch:
            return student.sum()  # 0, with a gradient
        value = self.compare(student, teacher, labels, step.progress)
        return value if share is None or self.couples_batch else value * share[mask]

    def _logits(self, step: Step) -> tuple[Tensor, TeacherSignal]:
        """Both networks' predictions; of language models over the words that both know."""
        signal: TeacherSignal = teacher_of(step, self.name)
        student = step.logits
        if self.shift:
            student, signal = signal.over_shared_words(student)
        shape = signal.logits_shape
        if shape is None:
            raise TransferError(f"The term '{self.name}' needs the teacher's logits, and it gave {signal.contents()}.")
        if shape != tuple(student.shape):
            raise TransferError(
                f"The term '{self.name}' got teacher logits of shape {shape} for student logits of shape "
                f"{tuple(step.logits.shape)}. Both need the same rows, tokens and classes, in the same order."
            )
        if shape[-1] == 1 and self.needs_classes:
            raise TransferError(
                f"The term '{self.name}' compares probabilities of classes, and the networks have one output, as for "
                "regression. Use LogitMSE."
            )
        return student, signal

    def _labels(self, step: Step) -> Tensor:
        """(N,) or (N, T) class indices, of the token that is predicted."""
        labels = step.labels
        if labels is None or labels.is_floating_point() or labels.shape != step.logits.shape[:-1]:
            got = "none" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise TransferError(
                f"The term '{self.name}' sets the true class apart and needs class indices (integers) of shape "
                f"{tuple(step.logits.shape[:-1])} as labels, got {got}. SoftTargets needs no labels."
            )
        return _shifted(labels) if self.shift else labels

    def _items(self, step: Step) -> tuple[Tensor | None, Tensor | None]:
        """Which items count, None for all; and each token's share of its row's value, None for 1."""
        tokens = step.logits.dim() == 3
        if step.labels is not None and _of_tokens(step.labels) != tokens:
            raise TransferError(
                f"The term '{self.name}' got labels of shape {tuple(step.labels.shape)} for logits of shape "
                f"{tuple(step.logits.shape)}: tokens have labels (N, T) and logits (N, T, C), rows (N,) and (N, C)."
            )
        if self.needs_labels:
            return self._labels(step) != UNLABELLED, None
        if not tokens:
            return None, None
        if step.labels is not None:
            return labelled_items(_shifted(step.labels) if self.shift else step.labels), None
        attended = step.inputs.get("attention_mask")
        mask = torch.ones(step.logits.shape[:2], device=step.logits.device) if attended is None else attended
        mask = mask.bool()
        if self.shift:
            mask = torch.cat([mask[:, 1:] & mask[:, :-1], torch.zeros_like(mask[:, :1])], dim=1)
        return mask, mask / mask.sum(dim=1, keepdim=True).clamp(min=1)


def teacher_of(step: Step, term: str) -> Any:
    """The teacher's signal for this batch.

    Raises:
        TransferError: If there is none.
    """
    if step.teacher is None:
        raise TransferError(f"The term '{term}' learns from a teacher, and the step has none: give the trainer one.")
    return step.teacher


def all_logits(teacher: TeacherSignal, term: str) -> Tensor:
    """The teacher's logits of all classes.

    Raises:
        TransferError: If the signal holds the largest only.
    """
    if teacher.logits is None:
        raise TransferError(
            f"The term '{term}' needs the teacher's logits of all classes, and the signal holds only the largest. "
            "Store all of them, use a live teacher, or use SoftTargets or JSD, which can do with the largest."
        )
    return teacher.logits


def rows_of(batch: Mapping[str, Any]) -> Tensor:
    """Rows of a collated batch, 0-d float32."""
    columns = [batch.get("example_id"), batch.get("labels"), *batch.values()]
    return torch.tensor(float(next(len(x) for x in columns if torch.is_tensor(x) and x.dim())))


def value_at(value: float | Schedule, progress: float) -> float:
    """A number, or a schedule at this progress in [0, 1]."""
    return value(progress) if callable(value) else value


def check_positive(value: float | Schedule, name: str) -> None:
    """Raises TransferError where a constant is not finite and > 0."""
    if not callable(value) and not 0 < value < math.inf:
        raise TransferError(f"{name} must be > 0 and finite, or a schedule, got {value!r}.")


def _of_tokens(labels: Tensor) -> bool:
    """Whether labels are a token's (N, T), or soft (N, T, C); else a row's (N,), or soft (N, C)."""
    return labels.dim() == (3 if labels.is_floating_point() else 2)


def _shifted(labels: Tensor) -> Tensor:
    """(N, T) or (N, T, C): at token t the label of token t + 1, none at the last."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], UNLABELLED)], dim=1)
