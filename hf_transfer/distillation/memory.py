"""A teacher whose answers are remembered: every evaluation during training asks about the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .signal import TeacherSignal
from .teacher import Teacher

MOST_BYTES = 2**28  # 256 MiB of logits a process


class RememberingTeacher(Teacher):
    """Asks another teacher once for each row, and keeps its logits in memory while there is room.

    For rows with an `example_id` that see no random augmentation, as those of evaluations. Logits of tokens are not
    kept.

    Args:
        teacher: Who is asked.
        most_bytes: Of logits that are kept.
    """

    def __init__(self, teacher: Teacher, most_bytes: int = MOST_BYTES) -> None:
        self.teacher, self.most_bytes = teacher, most_bytes
        self.labels = teacher.labels
        self._logits: dict[int, Tensor] = {}
        self._bytes = 0

    def __call__(self, batch: Mapping[str, Tensor]) -> TeacherSignal:
        ids = [] if batch.get("example_id") is None else batch["example_id"].tolist()
        if ids and all(i in self._logits for i in ids):
            return TeacherSignal(logits=torch.stack([self._logits[i] for i in ids]).to(batch["example_id"].device))
        logits = self.teacher(batch).logits
        if ids and logits is not None and logits.dim() == 2:
            self._keep(ids, logits.float().cpu())
        return TeacherSignal(logits=logits)

    def _keep(self, ids: Sequence[int], logits: Tensor) -> None:
        room = self._bytes + logits.nbytes <= self.most_bytes
        if room:
            self._logits.update(zip(ids, logits.clone(), strict=True))
            self._bytes += logits.nbytes

    def fingerprint(self) -> str:
        return self.teacher.fingerprint()

    def watch(self, layers: Sequence[str] = (), features: bool = False) -> None:
        self.teacher.watch(layers, features)
