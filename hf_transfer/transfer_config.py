"""TransferConfig: transformers' TrainingArguments, and what transfer learning adds to them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from .errors import TransferError
from .schedulers import DECAYS

SAMPLINGS = ("random", "balanced_classes", "balanced_domains")


@dataclass
class TransferConfig(TrainingArguments):
    """TrainingArguments, and what transfer learning adds to them.

    Args:
        layer_decay: Each group of layers below the head learns at this times the rate of the group above, in (0, 1].
        head_learning_rate: Peak learning rate of the head; `learning_rate` by default.
        sampling: "random"; "balanced_classes": every class equally often; "balanced_domains": every domain equally
            often in every micro-batch. (For text of uneven length: train_sampling_strategy="group_by_length".)
        ema_decay: Keep an exponential moving average of the weights with this decay, in (0, 1); it is what is
            evaluated, and what the model holds after training.
        early_stopping_patience: Stop after this many evaluations without a better `metric_for_best_model`.
        channels_last: Lay out the weights of 2-D convolutions with the channels last in memory, which makes networks
            with grouped convolutions (MobileNet, EfficientNet, LCNet, RegNet) faster. Checkpoints do not show it.
        stop_on_nonfinite_loss: Stop at the first NaN or infinite loss, before the optimizer uses it.
        lr_scheduler_type: Also "step" and "multistep", with lr_scheduler_kwargs: {"gamma": 0.1, "step_size": 0.3} or
            {"gamma": 0.1, "milestones": [0.5, 0.75]}, as shares of training or in steps.

    Raises:
        TransferError: If a value is outside its range; names the value and what is valid.
    """

    output_dir: str = field(default="trainer_output", metadata={"help": "Folder of the checkpoints and the model."})
    layer_decay: float | None = field(default=None, metadata={"help": "Layer-wise learning-rate decay, in (0, 1]."})
    head_learning_rate: float | None = field(default=None, metadata={"help": "Peak learning rate of the head."})
    sampling: str = field(default="random", metadata={"help": f"One of {', '.join(SAMPLINGS)}."})
    ema_decay: float | None = field(default=None, metadata={"help": "Decay of the average of the weights, in (0, 1)."})
    early_stopping_patience: int | None = field(default=None, metadata={"help": "Evaluations without a better one."})
    channels_last: bool = field(default=False, metadata={"help": "Channels last in memory, for 2-D convolutions."})
    stop_on_nonfinite_loss: bool = field(default=True, metadata={"help": "Stop at the first NaN or infinite loss."})

    def __post_init__(self) -> None:
        self._check_ranges()
        if self.early_stopping_patience is not None:
            self.load_best_model_at_end = True
        if self.data_seed is None:
            self.data_seed = self.seed  # else accelerate's sampler takes whatever torch was last seeded with
        decay = self._take_own_scheduler()
        super().__post_init__()
        if decay is not None:
            self.lr_scheduler_type = decay
        if self.use_cpu or not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # torch warns of pinning without a device
        if self.dataloader_pin_memory:
            self.accelerator_config.non_blocking = True  # type: ignore[union-attr]  # copies overlap with computing
        if self.stop_on_nonfinite_loss:
            self.logging_nan_inf_filter = False  # it would look at every loss once more, and hide what we stop at

    def _check_ranges(self) -> None:
        def check(name: str, fits: bool, valid: str) -> None:
            if getattr(self, name) is not None and not fits:
                raise TransferError(f"{name}={getattr(self, name)!r} is not valid: it must be {valid}.")

        check("layer_decay", 0 < (self.layer_decay or 0) <= 1, "in (0, 1]")
        check("head_learning_rate", (self.head_learning_rate or 0) > 0, "above 0")
        check("ema_decay", 0 < (self.ema_decay or 0) < 1, "in (0, 1), for example 0.999")
        check("early_stopping_patience", (self.early_stopping_patience or 0) >= 1, "a whole number from 1")
        check("sampling", self.sampling in SAMPLINGS, f"one of {', '.join(SAMPLINGS)}")
        if self.ema_decay is not None and self.save_only_model:
            raise TransferError("ema_decay needs save_only_model=False: a checkpoint's model is not the average.")
        evaluations = str(getattr(self.eval_strategy, "value", self.eval_strategy))
        if self.early_stopping_patience is not None and evaluations == "no":
            raise TransferError("early_stopping_patience needs evaluations: set eval_strategy to 'epoch' or 'steps'.")

    def _take_own_scheduler(self) -> str | None:
        """Hides our own scheduler names from TrainingArguments, which knows only its enumeration."""
        name = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type))
        if name in DECAYS:
            self.lr_scheduler_type = SchedulerType.CONSTANT
            return name
        if name not in {kind.value for kind in SchedulerType}:
            valid = ", ".join([*(kind.value for kind in SchedulerType), *DECAYS])
            raise TransferError(f"lr_scheduler_type={name!r} is unknown. Valid: {valid}.")
        return None
