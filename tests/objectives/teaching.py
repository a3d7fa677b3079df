"""Steps with a teacher, for the tests of terms that have one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_transfer.distillation.signal import TeacherSignal
from hf_transfer.objective import Step


@dataclass(frozen=True)
class TappedStep(Step):
    """A step that holds the student's tapped layers too."""

    hidden: dict[str, Tensor] = field(default_factory=dict)


def step_of(
    logits: Tensor | None = None, teacher: Any = None, labels: Tensor | None = None, **more: Any
) -> TappedStep:
    """A step; a tensor for `teacher` is its logits."""
    if torch.is_tensor(teacher):
        teacher = TeacherSignal(logits=teacher)
    logits = torch.zeros(1, 2) if logits is None else logits
    return TappedStep(nn.Identity(), more.pop("inputs", {}), None, logits, labels, teacher=teacher, **more)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """float64 normal numbers."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def finite_with_gradient(value: Tensor, student: Tensor) -> bool:
    """Whether a loss and its gradient are finite."""
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return bool(value.isfinite().all() and gradient.isfinite().all())
