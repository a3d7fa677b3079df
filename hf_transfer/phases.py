"""A training in one phase, or in several on the same network, each with its own Trainer and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .checkpoints import is_complete_checkpoint, last_complete_checkpoint
from .errors import TransferError

if TYPE_CHECKING:
    from .backbones import Backbone
    from .trainer import TransferTrainer
    from .transfer_config import TransferConfig
    from .tuning import Tuning


@dataclass
class Training:
    """What the phases did.

    Attributes:
        trainer: The last phase's Trainer.
        history: The log of all phases.
        steps: Optimizer steps of all phases.
        seconds: Time spent training.
    """

    trainer: TransferTrainer
    history: list[dict[str, Any]]
    steps: int
    seconds: float


def train_in_phases(
    backbone: Backbone,
    tunings: Sequence[Tuning],
    args: TransferConfig,
    make_trainer: Callable[[TransferConfig], TransferTrainer],
) -> Training:
    """Trains with each tuning in turn; the phases share out the epochs or steps.

    Args:
        backbone: What trains; the first tuning is applied to it already.
        tunings: One, or the phases of gradual unfreezing.
        args: The arguments of the whole.
        make_trainer: A Trainer for the backbone as it is then, from a phase's arguments.

    Returns:
        The Training.

    Raises:
        TransferError: If there is no checkpoint to resume from.
    """
    several = len(tunings) > 1
    phases = [_phase(args, number, len(tunings)) for number in range(1, len(tunings) + 1)] if several else [args]
    history: list[dict[str, Any]] = []
    steps, seconds = 0, 0.0
    for tuning, phase, checkpoint in zip(tunings, phases, _checkpoints(args, phases), strict=True):
        if phase is not phases[0]:
            backbone.model = cast(Any, tuning.apply(backbone.model))
        trainer = make_trainer(phase)
        seconds += trainer.train(checkpoint).metrics["train_runtime"]
        history += trainer.state.log_history
        steps += trainer.state.global_step
    return Training(trainer, history, steps, seconds)


def _phase(args: TransferConfig, number: int, phases: int) -> TransferConfig:
    """The arguments of one phase: its share of the training, its own folder of checkpoints."""
    phase = copy(args)
    phase.output_dir = str(Path(args.output_dir) / f"phase-{number}")
    phase.num_train_epochs = args.num_train_epochs / phases
    phase.max_steps = max(1, args.max_steps // phases) if args.max_steps > 0 else args.max_steps
    return phase


def _checkpoints(args: TransferConfig, phases: Sequence[TransferConfig]) -> list[str | None]:
    """Where each phase resumes: at a folder that was named, or with "true" at its last whole checkpoint."""
    asked = str(args.resume_from_checkpoint or "false")
    if asked.lower() == "false":
        return [None] * len(phases)
    if asked.lower() == "true":
        found = [last_complete_checkpoint(phase.output_dir) for phase in phases]
        if not any(found):
            raise TransferError(
                f"resume_from_checkpoint: no whole checkpoint in {args.output_dir!r}. Train anew without it."
            )
        return found
    if len(phases) > 1:
        raise TransferError(
            f"resume_from_checkpoint={asked!r}: gradual unfreezing has a checkpoint a phase. Pass 'true', which finds "
            "the last one of each."
        )
    if not is_complete_checkpoint(asked):
        raise TransferError(
            f"resume_from_checkpoint={asked!r} is no checkpoint folder that was saved whole. Pass one "
            "(OUTPUT_DIR/checkpoint-N), or 'true' for the last one in output_dir."
        )
    return [asked]
