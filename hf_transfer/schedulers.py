"""Learning-rate decays that the Trainer does not name: "step" and "multistep"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import TransferError

DECAYS = ("step", "multistep")


@dataclass(frozen=True)
class StepDecay:
    """The learning rate's factor at a step: a linear warm-up, then times `gamma` at each milestone passed.

    Args:
        milestones: Steps at which the rate drops, ascending.
        gamma: Factor of one drop, in (0, 1).
        warmup_steps: Steps of the warm-up.
    """

    milestones: tuple[int, ...]
    gamma: float
    warmup_steps: int = 0

    def __call__(self, step: int) -> float:
        warmup = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        return warmup * self.gamma ** sum(step >= milestone for milestone in self.milestones)


def decay_schedule(name: str, training_steps: int, warmup_steps: int, options: Mapping[str, Any]) -> StepDecay:
    """Builds a decay from the Trainer's `lr_scheduler_kwargs`.

    Args:
        name: "step" or "multistep".
        training_steps: Steps of the whole training.
        warmup_steps: Steps of the linear warm-up.
        options: `gamma` (0.1) and `step_size` (for "step", 1/3) or `milestones` (for "multistep", [0.5, 0.75]); below
            1 a share of training, from 1 on a number of steps.

    Raises:
        TransferError: If an option is unknown or outside its range.
    """
    own = {"step": "step_size", "multistep": "milestones"}[name]
    if unknown := sorted(set(options) - {"gamma", own}):
        raise TransferError(f"lr_scheduler_kwargs {unknown} are not options of {name!r}. Valid: gamma, {own}.")
    gamma = float(options.get("gamma", 0.1))
    if not 0 < gamma < 1:
        raise TransferError(f"lr_scheduler_kwargs gamma={gamma} is not valid: it must be in (0, 1).")

    def steps(value: float) -> int:
        if value <= 0:
            raise TransferError(f"lr_scheduler_kwargs {own} holds {value}: it must be above 0.")
        return max(1, round(value * training_steps) if value < 1 else int(value))

    if name == "step":
        size = steps(options.get("step_size", 1 / 3))
        return StepDecay(tuple(range(size, training_steps + 1, size)), gamma, warmup_steps)
    return StepDecay(tuple(sorted(steps(m) for m in options.get("milestones", (0.5, 0.75)))), gamma, warmup_steps)
