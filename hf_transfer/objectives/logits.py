"""A teacher's predictions as targets: soft targets, divergences, squared error, DKD and NKD.

Each function gives one value a prediction, works in log space and in float32 at least, and takes the student first.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TransferError
from ..objective import Schedule
from ._precision import full_precision, kl
from ._teacher import LogitTerm, all_logits, check_positive, value_at

if TYPE_CHECKING:
    from ..distillation.signal import TeacherSignal


@full_precision
def soft_targets(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 KL(teacher || student), both at temperature T. Its least value is 0, at equal predictions.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531. They minimise the
    cross-entropy with the teacher, which has the same gradient; T^2 keeps that gradient's size as T changes.

    Args:
        student_logits: (..., C).
        teacher_logits: (..., C).
        temperature: T > 0.

    Returns:
        (...).
    """
    log_p = F.log_softmax(teacher_logits / temperature, dim=-1)
    return temperature**2 * kl(log_p, F.log_softmax(student_logits / temperature, dim=-1))


@full_precision
def jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Generalised Jensen-Shannon divergence: beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q.

    P is the teacher, Q the student. Divided by beta it tends to KL(P || Q) as beta tends to 0, and divided by
    1 - beta to KL(Q || P) as beta tends to 1; at beta = 0 and 1 these limits are returned, the latter being the
    reverse KL, which seeks the teacher's modes. There is no factor T^2.

    Source: Agarwal et al. 2023, "On-Policy Distillation of Language Models", arXiv:2306.13649, equation 1.

    Args:
        student_logits: (..., C).
        teacher_logits: (..., C).
        beta: In [0, 1].
        temperature: T > 0, for both.

    Returns:
        (...), 0 at equal predictions.
    """
    log_p = F.log_softmax(teacher_logits / temperature, dim=-1)
    return _jsd(log_p, F.log_softmax(student_logits / temperature, dim=-1), beta)


@full_precision
def logit_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Squared difference of the logits, averaged over classes.

    Source: Kim et al. 2021, "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge
    Distillation", arXiv:2105.08919.

    Args:
        student_logits: (..., C).
        teacher_logits: (..., C).

    Returns:
        (...), 0 at equal logits.
    """
    return (student_logits - teacher_logits).square().mean(dim=-1)


@full_precision
def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Decoupled distillation: T^2 (alpha TCKD + beta NCKD).

    TCKD is the divergence of true class against all others, NCKD that among the others; with beta = 1 - p_t, the
    teacher's mass on the others, and alpha = 1 the sum is soft targets.

    Source: Zhao et al. 2022, "Decoupled Knowledge Distillation", arXiv:2203.08679, equation 7.

    Args:
        student_logits: (..., C), C >= 2.
        teacher_logits: (..., C).
        labels: (...) class indices.
        alpha: Weight of the true class against all others.
        beta: Weight of the others among themselves.
        temperature: T > 0.

    Returns:
        (...), 0 at equal predictions.
    """
    true_t, rest_t, others_t = _decoupled(teacher_logits / temperature, labels)
    true_s, rest_s, others_s = _decoupled(student_logits / temperature, labels)
    tckd = true_t.exp() * (true_t - true_s) + rest_t.exp() * (rest_t - rest_s)
    nckd = kl(others_t, others_s)
    return temperature**2 * (alpha * tckd + beta * nckd)


@full_precision
def nkd(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, gamma: float = 1.5, temperature: float = 1.0
) -> Tensor:
    """Normalised distillation: -T_t log S_t - gamma lambda^2 sum over i != t of N(T_i) log N(S_i).

    T_t and S_t are the probabilities of the true class, N(.) those of the others normalised to sum 1, at temperature
    lambda. It is a cross-entropy: the second part is least where N(S) = N(T), and then their entropy, not 0.

    Source: Yang et al. 2023, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
    Normalized Loss and Customized Soft Labels", arXiv:2303.13005, equation 6.

    Args:
        student_logits: (..., C), C >= 2.
        teacher_logits: (..., C).
        labels: (...) class indices.
        gamma: Weight of the other classes.
        temperature: lambda > 0, of the other classes only.

    Returns:
        (...).
    """
    index = labels[..., None]
    true_t = F.log_softmax(teacher_logits, dim=-1).gather(-1, index).squeeze(-1)
    true_s = F.log_softmax(student_logits, dim=-1).gather(-1, index).squeeze(-1)
    others_t = _decoupled(teacher_logits / temperature, labels)[2]
    others_s = _decoupled(student_logits / temperature, labels)[2]
    others = (others_t.exp() * others_s).sum(dim=-1)
    return -true_t.exp() * true_s - gamma * temperature**2 * others


def _jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return kl(log_p, log_q)
    if beta == 1:
        return kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def _decoupled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p of the true class (...), of all others together (...), and of each among the others (..., C).

    Among the others the true class has the lowest number instead of log 0, the same for every network: exp of it is
    0, and times a difference of two of them still 0.
    """
    index = labels[..., None]
    others = logits.scatter(-1, index, -torch.inf)
    rest = others.logsumexp(dim=-1)
    total = logits.logsumexp(dim=-1)
    among = (logits - rest[..., None]).scatter(-1, index, torch.finfo(logits.dtype).min)
    return logits.gather(-1, index).squeeze(-1) - total, rest - total, among


class SoftTargets(LogitTerm):
    """T^2 KL(teacher || student) at temperature T. Hinton et al. 2015, arXiv:1503.02531.

    It reads no labels, and can do with the teacher's largest logits.

    Args:
        temperature: T > 0, or a schedule of training progress.
        shift: Token t's logits are for token t + 1's label, as in causal language models.
        weight: A number or a schedule of training progress.
        name: The name it is logged under.

    Raises:
        TransferError: If an argument is out of its range; in training, if teacher and student do not fit together.
    """

    needs_all_logits = False

    def __init__(
        self,
        temperature: float | Schedule = 4.0,
        shift: bool = False,
        weight: float | Schedule = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(shift, weight, name)
        check_positive(temperature, "temperature")
        self.temperature = temperature

    def compare(self, student: Tensor, teacher: TeacherSignal, labels: Tensor, progress: float) -> Tensor:
        temperature = value_at(self.temperature, progress)
        return temperature**2 * kl(*teacher.log_probs(student, temperature))


class JSD(LogitTerm):
    """Generalised Jensen-Shannon divergence; beta = 1 is the reverse KL. Agarwal et al. 2023, arXiv:2306.13649.

    It reads no labels, and can do with the teacher's largest logits. On-policy data are TRL's business (GKDTrainer).

    Args:
        beta: In [0, 1]: 0 is KL(teacher || student), 1 is KL(student || teacher).
        temperature: T > 0, or a schedule of training progress.
        shift: Token t's logits are for token t + 1's label, as in causal language models.
        weight: A number or a schedule of training progress.
        name: The name it is logged under.

    Raises:
        TransferError: If an argument is out of its range; in training, if teacher and student do not fit together.
    """

    needs_all_logits = False

    def __init__(
        self,
        beta: float = 0.5,
        temperature: float | Schedule = 1.0,
        shift: bool = False,
        weight: float | Schedule = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(shift, weight, name)
        check_positive(temperature, "temperature")
        if not 0 <= beta <= 1:
            raise TransferError(f"beta must be in [0, 1], got {beta!r}.")
        self.beta, self.temperature = beta, temperature

    def compare(self, student: Tensor, teacher: TeacherSignal, labels: Tensor, progress: float) -> Tensor:
        return _jsd(*teacher.log_probs(student, value_at(self.temperature, progress)), self.beta)


class LogitMSE(LogitTerm):
    """Squared difference of the logits, averaged over classes; for regression too. Kim et al. 2021, 2105.08919."""

    needs_classes = False

    def compare(self, student: Tensor, teacher: TeacherSignal, labels: Tensor, progress: float) -> Tensor:
        return logit_mse(student, all_logits(teacher, self.name))


class DKD(LogitTerm):
    """Decoupled distillation of labelled items. Zhao et al. 2022, arXiv:2203.08679.

    The authors raise its weight over the first 20 of 240 epochs: `weight=LinearSchedule(0, 1, until=20 / 240)`.

    Args:
        alpha: Weight of the true class against all others.
        beta: Weight of the others among themselves: 8 for most pairs on CIFAR-100, 0.5 (with T = 1) on ImageNet.
        temperature: T > 0, or a schedule of training progress.
        shift: Token t's logits are for token t + 1's label, as in causal language models.
        weight: A number or a schedule of training progress.
        name: The name it is logged under.

    Raises:
        TransferError: If an argument is out of its range; in training, if teacher and student do not fit together.
    """

    needs_labels = True

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float | Schedule = 4.0,
        shift: bool = False,
        weight: float | Schedule = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(shift, weight, name)
        check_positive(temperature, "temperature")
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def compare(self, student: Tensor, teacher: TeacherSignal, labels: Tensor, progress: float) -> Tensor:
        temperature = value_at(self.temperature, progress)
        return dkd(student, all_logits(teacher, self.name), labels, self.alpha, self.beta, temperature)


class NKD(LogitTerm):
    """Normalised distillation of labelled items, beside cross-entropy. Yang et al. 2023, arXiv:2303.13005.

    Args:
        gamma: Weight of the other classes.
        temperature: lambda > 0 of the other classes, or a schedule of training progress.
        shift: Token t's logits are for token t + 1's label, as in causal language models.
        weight: A number or a schedule of training progress.
        name: The name it is logged under.

    Raises:
        TransferError: If an argument is out of its range; in training, if teacher and student do not fit together.
    """

    needs_labels = True

    def __init__(
        self,
        gamma: float = 1.5,
        temperature: float | Schedule = 1.0,
        shift: bool = False,
        weight: float | Schedule = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(shift, weight, name)
        check_positive(temperature, "temperature")
        self.gamma, self.temperature = gamma, temperature

    def compare(self, student: Tensor, teacher: TeacherSignal, labels: Tensor, progress: float) -> Tensor:
        temperature = value_at(self.temperature, progress)
        return nkd(student, all_logits(teacher, self.name), labels, self.gamma, temperature)
