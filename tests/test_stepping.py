"""The optimizer and the callbacks of a step: as accelerate's and transformers', without what they do in vain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import optimizer as accelerated
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_transfer.stepping import PreparedOptimizer, SparingCallbackHandler


def test_a_step_searches_for_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    layer = nn.Linear(2, 1)
    accelerator = Accelerator(cpu=True)
    optimizer = PreparedOptimizer(torch.optim.SGD(layer.parameters(), lr=0.5), True, None)
    assert accelerator.prepare(optimizer) is optimizer
    monkeypatch.setattr(accelerated, "is_lomo_available", None)  # a call would fail
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.gradient_state._set_sync_gradients(False)  # amid an accumulation
    optimizer.step()
    assert torch.equal(layer.weight, before)
    optimizer.gradient_state._set_sync_gradients(True)
    optimizer.step()
    assert torch.equal(layer.weight, before - 0.5)
    assert not accelerator.optimizer_step_was_skipped


class OnlySteps(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.seen.append(sorted(kwargs))
        control = TrainerControl(should_log=True)
        return control


class Later(OnlySteps):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.seen.append(control.should_log)


def test_callbacks_are_called_in_order_with_all_there_is_and_idle_ones_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    one, other = OnlySteps(), Later()
    by_instance: list[str] = []
    idle = TrainerCallback()
    monkeypatch.setattr(idle, "on_substep_end", lambda *args, **kwargs: by_instance.append("called"))
    handler = SparingCallbackHandler([one, other, idle], nn.Linear(1, 1), None, None, None)
    given = TrainingArguments(output_dir=str(tmp_path)), TrainerState(), TrainerControl()
    control = handler.on_step_end(*given)
    assert control.should_log and other.seen == [True]
    assert one.seen == [
        ["eval_dataloader", "lr_scheduler", "model", "optimizer", "processing_class", "train_dataloader"]
    ]
    handler.on_substep_end(*given)
    assert by_instance == ["called"] and len(one.seen) == 1


def test_an_unknown_event_is_an_error() -> None:
    with pytest.raises(AttributeError):
        SparingCallbackHandler([], None, None, None, None).call_event("on_nothing", None, None, None)
