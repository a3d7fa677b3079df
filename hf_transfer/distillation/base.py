"""The one interface of what answers for a batch: live, cached and combined teachers share it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .signal import TeacherSignal


class Teacher(ABC):
    """Answers for a batch of the student's. Not an nn.Module, so that nothing saves, trains or wraps it.

    Attributes:
        labels: Names of the classes in the order of the signal's logits, which is the student's; None where the
            student's have no names.
        task: One of `hf_transfer.backbones.TASKS`; None where it is not known.
    """

    labels: list[str] | None = None
    task: str | None = None

    @abstractmethod
    def __call__(self, batch: Mapping[str, Tensor]) -> TeacherSignal:
        """Answers for one batch.

        Args:
            batch: A collated batch of the student's, on any device.

        Returns:
            The signal on the batch's device, without gradient, with logits in the student's class order.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal digits that change with what it answers: weights, buffers, dtype, inputs, class order."""

    @abstractmethod
    def watch(self, layers: Sequence[str] = (), features: bool = False) -> None:
        """Sets what the signal holds beside logits, from the next batch on.

        Args:
            layers: Modules of the teacher whose outputs go into `signal.hidden`.
            features: Whether `signal.features` holds the input of its classifier.

        Raises:
            TransferError: If the teacher cannot give one of them.
        """

    def networks(self) -> list[nn.Module]:
        """The networks that run for a batch, if their modules can be watched; by default none are known."""
        return []

    def to(self, device: torch.device | str) -> Teacher:
        """Places the teacher, once a process; nothing to do for one that holds no network."""
        return self
