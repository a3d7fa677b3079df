"""Whether the student became its teacher: agreement, divergence, calibration, and the gain that was recovered.

    fidelity = Fidelity()
    for batch in batches:
        fidelity.update(student_logits, teacher_logits, batch["labels"])
    fidelity.result()               # {"agreement": 0.97, "kl": 0.03, "student_ece": 0.02, ...}

Across processes the states add up: `fidelity.result(accelerator.reduce(fidelity.state(), "sum"))`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TransferError
from ..evaluation.calibration import BINS, check_labels, confidence_gaps
from ..objective import UNLABELLED, wide

MEASURES = (
    *("agreement", "kl", "student_teacher_mse", "gain_recovered"),
    *(f"{network}_{of}" for network in ("student", "teacher") for of in ("accuracy", "nll", "ece", "mse")),
)
"""What an evaluation with a teacher can tell, beside the task's own metrics."""
TOO_FAR, BEYOND_TEACHER = 0.05, 0.02  # calibration errors; the second because few rows make both networks' larger
CHUNK = 2**24  # logits that are widened to float32 at once: 64 MiB a network

_PAIR = ("items", "agreed", "kl", "labelled", "numbers", "numbers_labelled", "difference")
_NETWORK = ("right", "nll", "error")  # and one calibration gap a bin


class Fidelity:
    """How alike student and teacher are, and how good each is, from sums over batches: memory does not grow.

    Rows count for agreement and divergence whether they have a label or not; tokens only where their label is not
    -100, because the others are padding, prompts or later pieces of words. Accuracy, likelihood and calibration are
    those of the labelled items, the same ones for both networks.

    Args:
        regression: Whether the outputs are numbers. Networks with one output always are.
    """

    def __init__(self, *, regression: bool = False) -> None:
        self.regression = regression
        self._pair = torch.zeros(len(_PAIR), dtype=torch.float64)
        self._networks = torch.zeros(2, len(_NETWORK) + BINS, dtype=torch.float64)  # student, teacher

    @torch.no_grad()
    def update(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> None:
        """Takes one batch.

        For causal language models, cut the logits to `[:, :-1]` and the labels to `[:, 1:]` first. Tokens without
        labels: pass those that are attended, `logits[attention_mask.bool()]`, as rows.

        Args:
            student_logits: (N, C) or (N, T, C), any floating type; for regression (N, outputs).
            teacher_logits: Of the same shape, in the student's class order.
            labels: (N,) or (N, T) class ids, for regression (N,) or (N, outputs) numbers; -100 = unlabelled.

        Raises:
            TransferError: Shapes do not fit, tokens have no labels, a label is no class, or items hold NaN.
        """
        if student_logits.shape != teacher_logits.shape or student_logits.dim() not in (2, 3):
            raise TransferError(
                f"Student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} must "
                "both be (N, C) or (N, T, C): the same rows, tokens and classes, in the same order."
            )
        teacher_logits = teacher_logits.to(student_logits.device)
        labels = None if labels is None else labels.to(student_logits.device)
        if self.regression or student_logits.shape[-1] == 1:
            self._update_numbers(student_logits, teacher_logits, labels)
        else:
            self._update_classes(student_logits, teacher_logits, labels)

    def state(self) -> Tensor:
        """The sums, (7 + 2 (3 + 15),) float64 on the CPU; those of several processes add up."""
        return torch.cat([self._pair, self._networks.flatten()])

    def result(self, state: Tensor | None = None) -> dict[str, float]:
        """The measures of all batches.

        Args:
            state: A state to read instead of this one's, such as the sum over processes.

        Returns:
            For classes `agreement` (share of items with the same top class) and `kl` (KL(teacher || student) at
            temperature 1, nats); where items have labels `student_` and `teacher_` `accuracy`, `nll` (nats) and
            `ece`. For regression `student_teacher_mse`, and of labelled rows `student_mse` and `teacher_mse`. Empty
            where there was no item.
        """
        state = self.state() if state is None else state.detach().cpu().double()
        pair = dict(zip(_PAIR, state[: len(_PAIR)].tolist(), strict=True))
        networks = state[len(_PAIR) :].view(2, -1)  # (2, 3 + 15)
        measures: dict[str, float] = {}
        if pair["items"]:
            measures |= {"agreement": pair["agreed"] / pair["items"], "kl": pair["kl"] / pair["items"]}
        if pair["numbers"]:
            measures["student_teacher_mse"] = pair["difference"] / pair["numbers"]
        for name, (right, nll, error, *gaps) in zip(("student", "teacher"), networks.tolist(), strict=True):
            if pair["labelled"]:
                measures[f"{name}_accuracy"] = right / pair["labelled"]
                measures[f"{name}_nll"] = nll / pair["labelled"]
                measures[f"{name}_ece"] = sum(map(abs, gaps)) / pair["labelled"]
            if pair["numbers_labelled"]:
                measures[f"{name}_mse"] = error / pair["numbers_labelled"]
        return measures

    def _update_classes(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> None:
        tokens = student.dim() == 3
        if labels is not None:
            check_labels(labels, student.shape)
        elif tokens:
            raise TransferError(
                f"Logits {tuple(student.shape)} of tokens came without labels, which tell tokens from padding. Pass "
                "labels (N, T) with -100 at padding, or the attended tokens as rows: logits[attention_mask.bool()]."
            )
        ids = torch.full(student.shape[:-1], UNLABELLED, device=student.device) if labels is None else labels
        if tokens:
            kept = ids != UNLABELLED
            student, teacher, ids = student[kept], teacher[kept], ids[kept]  # (M, C), (M, C), (M,)
        rows = max(1, CHUNK // student.shape[-1])
        for parts in zip(student.split(rows), teacher.split(rows), ids.split(rows), strict=True):
            self._add_classes(*parts)

    def _add_classes(self, student: Tensor, teacher: Tensor, ids: Tensor) -> None:
        """Adds the sums of M items: logits (M, C) twice, ids (M,) with -100."""
        log_s, log_t = _log_probabilities(student, "student"), _log_probabilities(teacher, "teacher")
        p = log_t.exp()
        kl = torch.where(p > 0, p * (log_t - log_s), 0).sum(dim=-1)  # (M,): 0 log 0 is 0
        agreed = log_s.argmax(dim=-1) == log_t.argmax(dim=-1)
        known = ids != UNLABELLED
        self._add(items=len(ids), agreed=_total(agreed), kl=_total(kl), labelled=_total(known))
        for sums, log_p in zip(self._networks, (log_s[known], log_t[known]), strict=True):
            confidence, guess = log_p.max(dim=-1)
            right = guess == ids[known]
            nll = -log_p.gather(-1, ids[known].long()[:, None])
            totals = torch.tensor([_total(right), _total(nll), 0.0], dtype=torch.float64)
            sums += torch.cat([totals, confidence_gaps(confidence.exp(), right)])

    def _update_numbers(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> None:
        if student.dim() != 2 or (labels is not None and labels.numel() != student.numel()):
            raise TransferError(
                f"Predictions {tuple(student.shape)} do not fit labels "
                f"{None if labels is None else tuple(labels.shape)}: regression takes (N, outputs) of both."
            )
        _refuse_nan(student, "student")
        _refuse_nan(teacher, "teacher")
        self._add(numbers=len(student), difference=_total(_row_error(student, teacher)))
        if labels is None:
            return
        targets = labels.reshape(student.shape)
        known = (targets != UNLABELLED).any(dim=-1)  # (N,)
        self._add(numbers_labelled=_total(known))
        for sums, predictions in zip(self._networks, (student, teacher), strict=True):
            sums[_NETWORK.index("error")] += _total(_row_error(predictions[known], targets[known]))

    def _add(self, **sums: float) -> None:
        for name, value in sums.items():
            self._pair[_PAIR.index(name)] += value


def gain_recovered(student: float, teacher: float, baseline: float, *, higher_is_better: bool = True) -> float:
    """The share of the teacher's gain over an undistilled student that the distilled student recovered.

    Args:
        student: Score of the distilled student.
        teacher: Score of the teacher, on the same rows.
        baseline: Score of the same student trained without a teacher, on the same rows.
        higher_is_better: False for errors, such as mse.

    Returns:
        (student - baseline) / (teacher - baseline): 0 at the baseline, 1 at the teacher; it may be below 0 or above 1.
        NaN where the teacher is no better than the baseline, so that there is no gain to recover.
    """
    gain = teacher - baseline if higher_is_better else baseline - teacher
    if not gain > 0:
        return math.nan
    return (student - baseline) / (teacher - baseline)


def miscalibrated(student_ece: float, teacher_ece: float) -> str | None:
    """Whether the student's probabilities are off by more than it learned from its teacher.

    The rule: an expected calibration error above 0.05 that exceeds the teacher's by more than 0.02. Standardised
    logits cause it, as their scale is free (Sun et al. 2024, arXiv:2403.01427), and high temperatures do.

    Args:
        student_ece: The student's expected calibration error, in [0, 1].
        teacher_ece: The teacher's.

    Returns:
        What is wrong and what mends it, a sentence for log and card; None where nothing is.
    """
    if not (student_ece > TOO_FAR and student_ece > teacher_ece + BEYOND_TEACHER):
        return None
    return (
        f"The student is miscalibrated: its expected calibration error is {student_ece:.3f}, the teacher's "
        f"{teacher_ece:.3f} (flagged above {TOO_FAR} and {BEYOND_TEACHER} beyond the teacher's). Divide its logits by "
        "a temperature fitted on validation data before its probabilities are read."
    )


def _log_probabilities(logits: Tensor, name: str) -> Tensor:
    """(M, C), in float32 at least, under autocast too."""
    with torch.autocast(logits.device.type, enabled=False):
        log_p = F.log_softmax(wide(logits), dim=-1)
    _refuse_nan(log_p, name)
    return log_p


def _refuse_nan(values: Tensor, name: str) -> None:
    if values.isnan().any():
        raise TransferError(
            f"The {name}'s predictions hold NaN or infinity: it diverged, or overflowed in fp16, or its inputs hold "
            "NaN. Use bf16 or float32, and check the inputs."
        )


def _row_error(predictions: Tensor, targets: Tensor) -> Tensor:
    """(N,), squared differences averaged over outputs. Both (N, outputs)."""
    return (predictions.cpu().double() - targets.cpu().double()).square().mean(dim=-1)


def _total(values: Tensor) -> float:
    """The sum, in float64."""
    return float(values.cpu().double().sum())
