"""accelerate's optimizer and transformers' callbacks, without what they do in vain at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler


class PreparedOptimizer(AcceleratedOptimizer):
    """accelerate's wrapper, whose step does not search the file system for LOMO, twice, each time.

    Args:
        optimizer: The optimizer, which is not one of LOMO's.
        device_placement: As for AcceleratedOptimizer.
        scaler: As for AcceleratedOptimizer.

    Delete this when accelerate remembers `is_lomo_available` (accelerate 1.15, optimizer.py, `step`).
    """

    _is_accelerate_prepared = True  # by this mark accelerate.prepare() takes it as it is

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """As AcceleratedOptimizer's."""
        if self.scaler is not None:
            super().step(closure)
        elif self.gradient_state.sync_gradients:
            self.optimizer.step(closure)


class SparingCallbackHandler(CallbackHandler):
    """transformers' list of callbacks, of which those are called that have something to do at an event."""

    def call_event(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """As CallbackHandler's: every callback with a method of its own for the event, in order."""
        nothing = getattr(TrainerCallback, event)
        for callback in self.callbacks:
            method = getattr(callback, event)
            if getattr(method, "__func__", None) is nothing:
                continue
            result = method(
                args, state, control, model=self.model, processing_class=self.processing_class,
                optimizer=self.optimizer, lr_scheduler=self.lr_scheduler, train_dataloader=self.train_dataloader,
                eval_dataloader=self.eval_dataloader, **kwargs,
            )  # fmt: skip
            control = control if result is None else result
        return control
