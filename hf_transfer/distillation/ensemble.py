"""Several teachers as one: the mean of what they believe, or each for its own rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TransferError
from ..objective import wide
from .base import Teacher
from .signal import TeacherSignal


class EnsembleTeacher(Teacher):
    """Combines teachers of the same student.

    Without a route, the logits are the log of the weighted mean of the teachers' probabilities, computed in log space
    (Hinton et al. 2015, arXiv:1503.02531, section 4, average predictions so); a loud teacher, whose logits are merely
    larger, does not outvote the others as it would in a mean of logits. Outputs of regression are averaged themselves.

    With a route, each row is answered by one teacher: a multi-source student, say, by that of the row's domain.

    Args:
        teachers: At least one.
        weights: One a teacher, > 0, of any sum; equal by default.
        route_by: Column of the batch, (N,) integers, with the index of each row's teacher, e.g. "domain".

    Raises:
        TransferError: If the teachers disagree about task or classes, or the options about each other.
    """

    def __init__(
        self, teachers: Sequence[Teacher], weights: Sequence[float] | None = None, route_by: str | None = None
    ) -> None:
        if not teachers:
            raise TransferError("An ensemble needs at least one teacher.")
        for teacher in teachers[1:]:
            if (teacher.labels, teacher.task) != (teachers[0].labels, teachers[0].task):
                raise TransferError(
                    f"The teachers of an ensemble answer in different classes: {teachers[0].labels} for "
                    f"{teachers[0].task} and {teacher.labels} for {teacher.task}. Make each for the same student."
                )
        if weights is not None and route_by is not None:
            raise TransferError(f"weights do not apply with route_by={route_by!r}: one teacher answers for a row.")
        if weights is not None and (len(weights) != len(teachers) or not all(0 < w < math.inf for w in weights)):
            raise TransferError(f"weights={list(weights)!r}: there must be {len(teachers)}, each > 0 and finite.")
        self.teachers, self.route_by = list(teachers), route_by
        self.labels, self.task = teachers[0].labels, teachers[0].task
        given = list(weights) if weights is not None else [1.0] * len(teachers)
        self.weights = [weight / sum(given) for weight in given]

    def __call__(self, batch: Mapping[str, Tensor]) -> TeacherSignal:
        if self.route_by is not None:
            return TeacherSignal(logits=self._routed(batch, self.route_by))
        return TeacherSignal(logits=self._mean([_logits(teacher(batch)) for teacher in self.teachers]))

    def fingerprint(self) -> str:
        parts = [*(teacher.fingerprint() for teacher in self.teachers), str(self.weights), str(self.route_by)]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()

    def watch(self, layers: Sequence[str] = (), features: bool = False) -> None:
        if layers or features:
            asked = [*layers, *(["features"] if features else [])]
            raise TransferError(
                f"An ensemble of {len(self.teachers)} teachers has no one layer to compare with ({', '.join(asked)}): "
                "use terms on logits, or one teacher."
            )

    def networks(self) -> list[nn.Module]:
        networks = [teacher.networks() for teacher in self.teachers]
        if self.route_by is not None:  # a few rows may be for one of them only
            return []
        return [network for each in networks for network in each] if all(networks) else []

    def to(self, device: torch.device | str) -> EnsembleTeacher:
        for teacher in self.teachers:
            teacher.to(device)
        return self

    @torch.inference_mode()
    def _mean(self, logits: Sequence[Tensor]) -> Tensor:
        """(..., C) of each -> (..., C), float32 at least."""
        if self.task == "regression" or logits[0].shape[-1] == 1:
            return torch.stack([w * wide(x) for w, x in zip(self.weights, logits, strict=True)]).sum(dim=0)
        log_p = [math.log(w) + F.log_softmax(wide(x), dim=-1) for w, x in zip(self.weights, logits, strict=True)]
        return torch.stack(log_p).logsumexp(dim=0)

    @torch.inference_mode()
    def _routed(self, batch: Mapping[str, Tensor], column: str) -> Tensor:
        """(N, ..., C), each row from its own teacher, float32 at least."""
        route = batch.get(column)
        if route is None:
            raise TransferError(
                f"route_by={column!r}: the batch has no such column; it has {', '.join(batch)}. `domain` is the one "
                "that data keeps beside labels and example_id."
            )
        chosen = route.unique().tolist()
        outside = [i for i in chosen if i not in range(len(self.teachers))]
        if outside:
            raise TransferError(
                f"route_by={column!r}: {outside[0]} is none of the {len(self.teachers)} teachers, from 0."
            )
        answered: Tensor | None = None
        for i in chosen:
            mask = route == i  # (N,)
            rows = {name: value[mask] if len(value) == len(mask) else value for name, value in batch.items()}
            logits = wide(_logits(self.teachers[int(i)](rows)))
            if answered is None:
                answered = logits.new_empty(len(mask), *logits.shape[1:])
            answered[mask] = logits
        assert answered is not None
        return answered


def _logits(signal: TeacherSignal) -> Tensor:
    if signal.logits is None:
        raise TransferError(
            f"An ensemble needs each teacher's logits of all classes, and one gave {signal.contents() or 'nothing'}: "
            "store all of them in its cache (top_k=None), or cache the ensemble's own answers."
        )
    return signal.logits
