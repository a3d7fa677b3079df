"""What a teacher says about a batch: one type, whether it was computed now or read from a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TransferError
from ..objective import wide


@dataclass(frozen=True)
class TopLogits:
    """The k largest logits of each prediction, and what all others amount to.

    The others are one event: its mass is exact at the temperatures for which it was taken, so that divergences over
    these k + 1 events are a lower bound of those over all classes, with the same minimum in the k largest.

    Attributes:
        values: (..., k), the largest logits; half precision will do.
        indices: (..., k), their classes; any integer type.
        tails: temperature -> (...), log sum exp of the other logits divided by that temperature.
        classes: C, how many classes there are in all.
    """

    values: Tensor
    indices: Tensor
    tails: Mapping[float, Tensor]
    classes: int

    @classmethod
    def of(cls, logits: Tensor, k: int, temperatures: Sequence[float] = (1.0,)) -> TopLogits:
        """Takes them from dense logits.

        Args:
            logits: (..., C).
            k: In [1, C - 1].
            temperatures: Those at which terms will ask.

        Raises:
            TransferError: If k leaves nothing out.
        """
        if not 1 <= k < logits.shape[-1]:
            raise TransferError(f"k must be in [1, {logits.shape[-1] - 1}] for {logits.shape[-1]} classes, got {k!r}.")
        values, indices = logits.topk(k, dim=-1)
        tails = {t: _log_rest(wide(logits) / t, indices) for t in temperatures}
        return cls(values, indices, tails, logits.shape[-1])

    def tail_at(self, temperature: float) -> Tensor:
        """(...), log sum exp of the other logits at this temperature.

        Raises:
            TransferError: If it was not taken at this temperature.
        """
        if temperature not in self.tails:
            raise TransferError(
                f"The teacher's largest {self.values.shape[-1]} logits were stored with the mass of all others at "
                f"temperatures {sorted(self.tails)}, and a term asks at {temperature}. Use one of these, store them "
                "anew for this one, or store all logits, which a schedule of the temperature needs too."
            )
        return self.tails[temperature]

    def each(self, change: Callable[[Tensor], Tensor]) -> TopLogits:
        """The same, with every tensor changed."""
        tails = {t: change(tail) for t, tail in self.tails.items()}
        return TopLogits(change(self.values), change(self.indices), tails, self.classes)


@dataclass(frozen=True)
class TeacherSignal:
    """A teacher's answer for one batch of N rows, as a term finds it in `step.teacher`.

    Attributes:
        logits: (N, C), or (N, T, C) for tokens, classes in the student's order.
        top: The largest logits, where a cache does not hold all; None beside `logits`.
        features: (N, D), or (N, T, D) for tokens: the input of the teacher's classifier.
        hidden: Module path in the teacher -> its output: maps (N, C, H, W), tokens (N, T, D) or vectors (N, D).
    """

    logits: Tensor | None = None
    top: TopLogits | None = None
    features: Tensor | None = None
    hidden: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def logits_shape(self) -> tuple[int, ...] | None:
        """Shape of the logits, of which the signal may hold the largest only; None where it has none."""
        if self.logits is not None:
            return tuple(self.logits.shape)
        return None if self.top is None else (*self.top.values.shape[:-1], self.top.classes)

    def log_probs(self, student_logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Both networks' log-probabilities over the same events: all classes, or the largest k and all others.

        Args:
            student_logits: (..., C).
            temperature: > 0, divides the logits of both.

        Returns:
            The teacher's and the student's, each (..., C) or (..., k + 1), in float32 at least.

        Raises:
            TransferError: If the signal has no logits, or none at this temperature.
        """
        student = wide(student_logits) / temperature
        if self.logits is not None:
            return F.log_softmax(wide(self.logits) / temperature, dim=-1), F.log_softmax(student, dim=-1)
        if self.top is None:
            raise TransferError(f"The teacher's signal has no logits; it has {self.contents() or 'nothing'}.")
        tail = wide(self.top.tail_at(temperature))[..., None]  # (..., 1)
        teacher = torch.cat([wide(self.top.values) / temperature, tail], dim=-1)  # (..., k + 1)
        indices = self.top.indices.long()
        rest = _log_rest(student, indices)[..., None]
        events = torch.cat([student.gather(-1, indices), rest], dim=-1)  # (..., k + 1)
        return F.log_softmax(teacher, dim=-1), F.log_softmax(events, dim=-1)

    def over_shared_words(self, student: Tensor) -> tuple[Tensor, TeacherSignal]:
        """Both networks' logits of the words that both know: vocabularies of one tokenizer are padded to other sizes.

        Args:
            student: (N, T, V).

        Returns:
            The student's (N, T, W) and the signal of (N, T, W) logits, W being the smaller vocabulary's size.

        Raises:
            TransferError: If the signal holds the largest logits only, and of more words than the student has.
        """
        shape = self.logits_shape
        words = student.shape[-1] if shape is None else min(student.shape[-1], shape[-1])
        if self.top is not None and self.top.classes > words:
            raise TransferError(
                f"The teacher's largest logits are of {self.top.classes} words and the student has {words}: words "
                "that it lacks cannot be taken out of them. Cut the teacher's logits to the student's words before "
                "storing."
            )
        return student[..., :words], replace(self, logits=None if self.logits is None else self.logits[..., :words])

    def predictions(self, mask: Tensor) -> TeacherSignal:
        """Only the logits, of some items.

        Args:
            mask: (N,) or (N, T) bool.
        """
        return TeacherSignal(
            None if self.logits is None else self.logits[mask],
            None if self.top is None else self.top.each(lambda x: x[mask]),
        )

    def rows(self, mask: Tensor) -> TeacherSignal:
        """The signal of some rows.

        Args:
            mask: (N,) bool.
        """
        return self.each(lambda x: x[mask])

    def to(self, device: torch.device | str) -> TeacherSignal:
        """The signal on another device."""
        return self.each(lambda x: x.to(device, non_blocking=True))

    def each(self, change: Callable[[Tensor], Tensor]) -> TeacherSignal:
        """The same, with every tensor changed."""
        return replace(
            self,
            logits=None if self.logits is None else change(self.logits),
            top=None if self.top is None else self.top.each(change),
            features=None if self.features is None else change(self.features),
            hidden={name: change(value) for name, value in self.hidden.items()},
        )

    def contents(self) -> list[str]:
        """What the signal holds, for messages."""
        held = [name for name in ("logits", "top", "features") if getattr(self, name) is not None]
        return [*held, *self.hidden]


def _log_rest(logits: Tensor, indices: Tensor) -> Tensor:
    """(...), log sum exp of the logits (..., C) that are not at `indices` (..., k)."""
    return logits.scatter(-1, indices, -torch.inf).logsumexp(dim=-1)
