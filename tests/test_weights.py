"""Averages of weights, against NumPy's and closed forms."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_transfer.errors import TransferError
from hf_transfer.weights import ExponentialAverage, average


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model(torch.randn(5, 3))
    return model


# ---- average --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, (0.3, 0.5, 0.2), (100, 1, 7), (1.5, -0.7, 0.2)])
def test_average_is_the_weighted_mean(weights) -> None:
    states = [net(seed).state_dict() for seed in range(3)]
    mean = average(states, weights)
    for name in states[0]:
        expected = np.average([state[name].double().numpy() for state in states], axis=0, weights=weights)
        torch.testing.assert_close(mean[name].double(), torch.as_tensor(expected), rtol=1e-5, atol=1e-6)
    net().load_state_dict(mean)


def test_the_ends_of_an_interpolation_are_exact_and_the_inputs_untouched() -> None:
    a, b = net(0).state_dict(), net(1).state_dict()
    before = {name: value.clone() for name, value in a.items()}
    for weights, end in [((1, 0), a), ((0, 1), b)]:
        mean = average([a, b], weights)
        assert all(torch.equal(mean[name], end[name]) for name in mean)
        for value in mean.values():
            value.zero_()
    assert all(torch.equal(a[name], before[name]) for name in a)
    assert all(torch.equal(value, a[name]) for name, value in average([a]).items())


def test_half_precision_is_summed_in_float32_and_returned_as_it_came() -> None:
    values = torch.full((4,), 60_000.0, dtype=torch.float16)  # the sum of two is beyond float16
    mean = average([{"w": values}, {"w": values}, {"w": values.float()}])
    assert mean["w"].dtype == torch.float16
    assert torch.equal(mean["w"], values)


def test_counters_take_the_latest_and_other_integers_must_agree() -> None:
    a = {"n": torch.tensor(3), "ids": torch.arange(4)}
    b = {"n": torch.tensor(9), "ids": torch.arange(4)}
    assert average([b, a])["n"] == average([a, b])["n"] == 9
    assert torch.equal(average([a, b])["ids"], torch.arange(4))
    with pytest.raises(TransferError, match=r"'ids' \(torch.int64\) differs"):
        average([a, {**b, "ids": torch.ones(4).long()}])
    with pytest.raises(TransferError, match=r"'on' .*differs"):
        average([{"on": torch.tensor(True)}, {"on": torch.tensor(False)}])


def test_state_dicts_of_different_models_are_refused() -> None:
    a, b = net().state_dict(), nn.Linear(3, 4).state_dict()
    with pytest.raises(TransferError, match=r"State dict 3 and the first differ in 11 keys: \['0.bias', '0.weight'"):
        average([a, a, b])
    with pytest.raises(TransferError, match=r"0.weight \(4, 3\) and \(4, 5\)"):
        average([a, {**a, "0.weight": torch.zeros(4, 5)}])


@pytest.mark.parametrize("weights", [(1,), (1, 2, 3), (1, -1), (0, 0), (float("nan"), 1), (float("inf"), 1)])
def test_weights_that_do_not_fit_are_refused(weights) -> None:
    states = [net().state_dict()] * 2
    with pytest.raises(TransferError, match="for 2 state dicts"):
        average(states, weights)


def test_nothing_has_no_average() -> None:
    with pytest.raises(TransferError, match="at least one state dict"):
        average([])


# ---- ExponentialAverage ---------------------------------------------------------------------------------------------


def walk(model: nn.Module, steps: int) -> list[dict[str, Tensor]]:
    states = []
    for step in range(steps):
        torch.manual_seed(100 + step)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model(torch.randn(5, 3))  # moves BatchNorm's statistics
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states


def test_the_average_by_its_closed_form() -> None:
    model, decay = net(), 0.8
    model[0].requires_grad_(False)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    ema = ExponentialAverage(model, decay)
    states = []
    for _ in range(5):
        states += walk(model, 1)
        ema.update(model)
    names = ["1.weight", "1.bias", "2.weight", "2.bias", "1.running_mean", "1.running_var"]
    assert sorted(ema.state_dict()) == sorted(names)  # neither what is frozen nor counters
    for name in names:
        expected = decay**5 * start[name].double()
        for k, state in enumerate(states):
            expected += (1 - decay) * decay ** (4 - k) * state[name].double()
        torch.testing.assert_close(ema.state_dict()[name].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapping_twice_gives_both_back_exactly(dtype) -> None:
    model = net().to(dtype)
    ema = ExponentialAverage(model, 0.5)
    walk(model.float(), 1)
    ema.update(model.to(dtype))
    own = {name: value.clone() for name, value in model.state_dict().items()}
    averaged = {name: value.clone() for name, value in ema.state_dict().items()}
    pointers = [p.data_ptr() for p in model.parameters()]
    ema.swap(model)
    for name, value in averaged.items():
        assert torch.equal(model.state_dict()[name], value.to(dtype))
        assert torch.equal(ema.state_dict()[name], value)  # a checkpoint saved now holds the average
    ema.swap(model)
    assert all(torch.equal(model.state_dict()[name], own[name]) for name in own)
    assert all(torch.equal(ema.state_dict()[name], averaged[name]) for name in averaged)
    assert [p.data_ptr() for p in model.parameters()] == pointers  # the optimizer holds these


def test_small_steps_of_a_bfloat16_model_are_not_lost() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    ema = ExponentialAverage(model, 0.999)
    nn.init.constant_(model.weight, 2.0)
    for _ in range(1000):
        ema.update(model)
    assert float(ema.state_dict()["weight"]) == pytest.approx(2 - 0.999**1000, rel=1e-4)


def test_updating_a_model_that_holds_the_average_is_refused() -> None:
    model = net()
    ema = ExponentialAverage(model)
    ema.swap(model)
    with pytest.raises(TransferError, match="swap"):
        ema.update(model)
    ema.swap(model)
    ema.update(model)


def test_it_resumes() -> None:
    model = net()
    ema = ExponentialAverage(model, 0.9)
    walk(model, 1)
    ema.update(model)
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    again = ExponentialAverage(model, 0.9)
    again.load_state_dict(torch.load(file, weights_only=True))
    walk(model, 1)
    for one in (ema, again):
        one.update(model)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in ema.state_dict().items())


def test_another_models_average_is_refused() -> None:
    ema = ExponentialAverage(net())
    with pytest.raises(TransferError, match="This average and the one to load differ in 9 keys"):
        ema.load_state_dict({"weight": torch.zeros(1)})
    with pytest.raises(TransferError, match=r"The model lacks \['0.weight'"):
        ema.update(nn.Linear(3, 4))


def test_it_follows_the_models_device() -> None:
    model = net()
    ema = ExponentialAverage(model)
    ema.update(model.to("meta"))
    assert {value.device.type for value in ema.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, float("nan")])
def test_decay_is_between_zero_and_one(decay) -> None:
    with pytest.raises(TransferError, match=r"decay must be in \(0, 1\)"):
        ExponentialAverage(net(), decay)
