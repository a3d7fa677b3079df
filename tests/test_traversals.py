"""What is found once a training does at every step what the walks through the network did."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hf_transfer.freezing import held_in_eval, keep_in_eval, keep_in_eval_except_batch_norm
from hf_transfer.traversals import Traversals


def network() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()), nn.Sequential(nn.Linear(4, 4), nn.Dropout()),
        nn.Linear(4, 2),
    )  # fmt: skip
    model[0].requires_grad_(False)
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_every_module_is_back_in_train_mode_whoever_switched_it() -> None:
    model = network()
    walks = Traversals(model)
    for switched in model.modules():
        switched.eval()
        walks.train()
        assert all(modes(model))


def test_nothing_is_touched_where_all_train() -> None:
    model = network()
    walks = Traversals(model)
    model.train = None  # type: ignore[assignment, method-assign]  # a call would fail
    walks.train()


@pytest.mark.parametrize("hook", [keep_in_eval, keep_in_eval_except_batch_norm])
def test_held_parts_are_left_to_their_hooks(hook: Any) -> None:
    model = network()
    model[0].register_forward_pre_hook(hook)
    held = held_in_eval(model)
    assert model[0] in held and model[0][2] in held and model[1] not in held
    assert (model[0][1] in held) is (hook is keep_in_eval)
    slow = copy.deepcopy(model)
    walks = Traversals(model)
    for step in range(4):
        if step == 2:  # an evaluation in between
            model.eval()
            slow.eval()
        walks.train()
        slow.train()
        torch.manual_seed(step)
        given = torch.randn(8, 4)
        seed = torch.get_rng_state()
        one = model(given)
        torch.set_rng_state(seed)
        assert torch.equal(one, slow(given))
    assert modes(model) == modes(slow)


@pytest.mark.parametrize("max_norm", [0.01, 1e3, float("inf")])
@pytest.mark.parametrize("scale", [1.0, 0.0, float("nan"), float("inf")])
def test_gradients_are_clipped_as_torch_clips_them(max_norm: float, scale: float) -> None:
    model = network()
    (model(torch.randn(8, 4)).square().sum() * scale).backward()
    twin = network()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.grad = None if mine.grad is None else mine.grad.clone()
    norm = Traversals(model).clip_grad_norm(max_norm)
    expected = nn.utils.clip_grad_norm_(list(twin.parameters()), max_norm)
    torch.testing.assert_close(norm, expected, rtol=0, atol=0, equal_nan=True)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is not None and other.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=0, equal_nan=True)


def test_no_gradient_at_all_has_norm_0() -> None:
    assert Traversals(network()).clip_grad_norm(1.0) == 0
