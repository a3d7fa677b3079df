"""Predictions up to scale and in relation to one another: DIST, multi-level distillation, logit standardisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TransferError
from ..objective import Objective, Schedule, Step
from ._precision import correlation_distance, full_precision, kl, standardized
from ._teacher import LogitTerm, all_logits, check_positive, teacher_of, value_at

if TYPE_CHECKING:
    from ..anatomy import Anatomy
    from ..distillation.signal import TeacherSignal


@full_precision
def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float = 2.0,
    gamma: float = 2.0,
    temperature: float = 1.0,
) -> Tensor:
    """T^2 (beta inter + gamma intra): 1 - Pearson's correlation of the probabilities, within rows and within classes.

    A correlation does not change when a row or a column is scaled: each is scaled to a largest entry of 1, so that
    none vanishes for saturated logits.

    Source: Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher", arXiv:2205.10536, equations 7 to 9;
    the factor T^2 is the authors' code's.

    Args:
        student_logits: (N, C), N >= 1.
        teacher_logits: (N, C).
        beta: Weight of the relation between classes, within each row.
        gamma: Weight of the relation between rows, within each class.
        temperature: T > 0: 1 on ImageNet, 4 on CIFAR-100.

    Returns:
        0-d, 0 at equal predictions.
    """
    s, t = (F.log_softmax(logits / temperature, dim=1) for logits in (student_logits, teacher_logits))
    inter, intra = (correlation_distance(_scaled(s, dim), _scaled(t, dim), dim).mean() for dim in (1, 0))
    return temperature**2 * (beta * inter + gamma * intra)


def _scaled(log_p: Tensor, dim: int) -> Tensor:
    """Probabilities over the largest one along an axis."""
    return (log_p - log_p.detach().amax(dim=dim, keepdim=True)).exp()


@full_precision
def mlkd(
    student_logits: Tensor, teacher_logits: Tensor, temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0)
) -> Tensor:
    """Alignment of rows, of the batch and of the classes, summed over temperatures.

    With the predictions P (N, C) at each T: rows T^2 mean KL(teacher || student); batch ||P_t P_t' - P_s P_s'||^2 / N;
    classes ||P_t' P_t - P_s' P_s||^2 / C.

    Source: Jin et al. 2023, "Multi-Level Logit Distillation", CVPR 2023, equations 3 to 8; the temperatures and the
    factor T^2 are the authors' code's.

    Args:
        student_logits: (N, C), N >= 1.
        teacher_logits: (N, C).
        temperatures: Each > 0.

    Returns:
        0-d, 0 at equal predictions.
    """
    n, c = student_logits.shape
    loss = student_logits.new_zeros(())
    for temperature in temperatures:
        log_t = F.log_softmax(teacher_logits / temperature, dim=-1)
        log_s = F.log_softmax(student_logits / temperature, dim=-1)
        p, q = log_t.exp(), log_s.exp()
        rows = temperature**2 * kl(log_t, log_s).mean()
        loss = loss + rows + (p @ p.T - q @ q.T).square().sum() / n + (p.T @ p - q.T @ q).square().sum() / c
    return loss


@full_precision
def standardize_logits(logits: Tensor) -> Tensor:
    """(z - mean) / standard deviation over the classes: what is left when scale and offset are taken out.

    Source: Sun et al. 2024, "Logit Standardization in Knowledge Distillation", arXiv:2403.01427, algorithm 1. As
    there, the deviation is over all C classes; the authors' code divides by C - 1.

    Args:
        logits: (..., C).

    Returns:
        (..., C); 0 where all logits of an item are equal.
    """
    return standardized(logits)


class DIST(LogitTerm):
    """Correlation with the teacher within rows and within classes; couples the batch. Huang et al. 2022, 2205.10536.

    Args:
        beta: Weight of the relation between classes, within each row.
        gamma: Weight of the relation between rows, within each class.
        temperature: T > 0, or a schedule of training progress.
        shift: Token t's logits are for token t + 1's label, as in causal language models.
        weight: A number or a schedule of training progress.
        name: The name it is logged under.

    Raises:
        TransferError: If an argument is out of its range; in training, if teacher and student do not fit together.
    """

    couples_batch = True

    def __init__(
        self,
        beta: float = 2.0,
        gamma: float = 2.0,
        temperature: float | Schedule = 1.0,
        shift: bool = False,
        weight: float | Schedule = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(shift, weight, name)
        check_positive(temperature, "temperature")
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def compare(self, student: Tensor, teacher: TeacherSignal, labels: Tensor, progress: float) -> Tensor:
        temperature = value_at(self.temperature, progress)
        return dist(student, all_logits(teacher, self.name), self.beta, self.gamma, temperature)


class MLKD(LogitTerm):
    """Multi-level logit distillation; couples the batch. Jin et al. 2023, CVPR.

    The authors apply it to a weakly and a strongly augmented view of each row.

    Args:
        temperatures: Each > 0.
        shift: Token t's logits are for token t + 1's label, as in causal language models.
        weight: A number or a schedule of training progress.
        name: The name it is logged under.

    Raises:
        TransferError: If an argument is out of its range; in training, if teacher and student do not fit together.
    """

    couples_batch = True

    def __init__(
        self,
        temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
        shift: bool = False,
        weight: float | Schedule = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(shift, weight, name)
        if not temperatures:
            raise TransferError("temperatures must not be empty.")
        for temperature in temperatures:
            check_positive(temperature, "temperatures")
        self.temperatures = tuple(temperatures)

    def compare(self, student: Tensor, teacher: TeacherSignal, labels: Tensor, progress: float) -> Tensor:
        return mlkd(student, all_logits(teacher, self.name), self.temperatures)


class LogitStandardization(Objective):
    """Any logit term on standardised logits, whose scale the student then need not match. Sun et al. 2024, 2403.01427.

    The paper's setting is `LogitStandardization(SoftTargets(temperature=2.0, weight=9.0))` beside
    `CrossEntropy(weight=0.1)`. A student trained so has logits of any scale: calibrate it before its probabilities
    are read.

    Args:
        term: The term; its weight is this term's.
        name: The name it is logged under: `standardized_` and the term's by default.

    Raises:
        TransferError: If it is not a logit term; in training, if the teacher gives only its largest logits.
    """

    needs_all_logits = True  # to standardise them

    def __init__(self, term: LogitTerm, name: str | None = None) -> None:
        if not isinstance(term, LogitTerm):
            raise TransferError(f"LogitStandardization wraps a logit term such as SoftTargets, got {term!r}.")
        super().__init__(term.weight, name or f"standardized_{term.name}")
        self.term = term

    def prepare(self, model: nn.Module, anatomy: Anatomy | None) -> None:
        self.term.prepare(model, anatomy)

    def count(self, batch: Mapping[str, Any]) -> Tensor | None:
        return self.term.count(batch)

    def forward(self, step: Step) -> Tensor:
        signal: TeacherSignal = teacher_of(step, self.name)
        teacher = replace(signal, logits=standardize_logits(all_logits(signal, self.name)))
        return self.term(replace(step, logits=standardize_logits(step.logits), teacher=teacher))
