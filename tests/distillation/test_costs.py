"""Multiply-accumulates by hand for every kind of layer that PyTorch fuses; latency against a clock of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_transfer.distillation import costs
from hf_transfer.distillation.costs import LatencyRatio, latency_ratio, macs, parameters
from hf_transfer.errors import TransferError

N, T, D, H = 2, 5, 8, 6  # rows, tokens, width, hidden width


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class PackedLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(D, H, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([T, T - 2])
        return self.lstm(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[0].data


ATTENTION = N * T * D * 4 * D + 2 * N * T * T * D  # q, k, v and output projections; scores and their sum
LSTM = 4 * H * (D + H)  # of one token


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (lambda: nn.Linear(D, H), N * T * D * H),
        (lambda: nn.Conv1d(T, H, kernel_size=3), N * (D - 2) * H * T * 3),
        (lambda: nn.Conv1d(T, T, kernel_size=3, groups=T), N * (D - 2) * T * 3),
        (lambda: nn.Sequential(nn.LayerNorm(D), nn.GELU(), nn.Dropout()), 0),
        (SelfAttention, ATTENTION),
        (lambda: nn.TransformerEncoderLayer(D, 2, 16, batch_first=True), ATTENTION + 2 * N * T * D * 16),
        (lambda: nn.LSTM(D, H, batch_first=True, bidirectional=True), N * T * 2 * LSTM),
        (lambda: nn.GRU(D, H, batch_first=True), N * T * 3 * H * (D + H)),
        (PackedLSTM, (2 * T - 2) * LSTM),
    ],
    ids=["linear", "conv", "depthwise", "none", "attention", "encoder", "lstm", "gru", "packed"],
)
def test_macs_by_hand(layer: Callable[[], nn.Module], expected: int) -> None:
    assert macs(layer(), torch.zeros(N, T, D)) == expected


def test_macs_of_transformers_attention_do_not_depend_on_its_kernel() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    counts = set()
    for kernel in ("eager", "sdpa"):
        config = BertConfig(
            vocab_size=10,
            hidden_size=D,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            attn_implementation=kernel,
        )
        ids = torch.ones(N, T, dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": ids, "labels": torch.zeros(N), "example_id": torch.arange(N)}
        counts.add(macs(BertForSequenceClassification(config), batch))
    head = N * D * D + N * D * 2  # pooler and classifier
    assert counts == {2 * (ATTENTION + 2 * N * T * D * 16) + head}


def test_counting_leaves_everything_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm1d(T), nn.Linear(D, H), nn.Dropout()).train()
    model[0].eval()  # a frozen part
    statistics = model[0].running_mean.clone()
    switches = (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.backends.mha.get_fastpath_enabled())
    assert all(switches), "an earlier count left them off"
    macs(model, torch.randn(N, T, D))
    latency_ratio(model, torch.randn(N, T, D), model, torch.randn(N, T, D), rounds=6)
    assert [module.training for module in model] == [False, True, True]
    assert model.training
    assert torch.equal(model[0].running_mean, statistics)
    with pytest.raises(RuntimeError):
        macs(model, torch.randn(N, T, D + 1))
    assert model.training
    assert switches == (
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled,
        torch.backends.mha.get_fastpath_enabled(),
    )


def test_shared_parameters_count_once() -> None:
    first, second = nn.Linear(D, D, bias=False), nn.Linear(D, D)
    second.weight = first.weight
    second.bias.requires_grad_(False)
    assert parameters(nn.Sequential(first, second)) == D * D + D


class Clock:
    """Stands for perf_counter; timed models move it."""

    def __init__(self) -> None:
        self.now, self.speed, self.calls = 0.0, 1.0, []

    def __call__(self) -> float:
        return self.now


class Timed(nn.Module):
    """A model whose forward takes the seconds given, in turn."""

    def __init__(self, name: str, clock: Clock, seconds: Callable[[int], float]) -> None:
        super().__init__()
        self.name, self.clock, self.seconds = name, clock, seconds
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.clock.calls.append(self.name)
        self.clock.now += self.seconds(self.runs)
        self.runs += 1
        return x


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(costs, "perf_counter", made)
    return made


def ratio(clock: Clock, student: Callable[[int], float], teacher: Callable[[int], float], **options: Any) -> Any:
    x = torch.zeros(1)
    return latency_ratio(Timed("s", clock, student), x, Timed("t", clock, teacher), x, **options)


def test_a_machine_that_slows_down_slows_both(clock: Clock) -> None:
    result = ratio(clock, lambda run: 1.0 + run, lambda run: 4.0 + 4 * run)
    assert result == pytest.approx(LatencyRatio(0.25, 0.25, 0.25))
    assert len(clock.calls) == 2 * (costs.WARM_UP + 20)
    pairs = ["".join(clock.calls[i : i + 2]) for i in range(0, len(clock.calls), 2)]
    assert pairs == ["ts", "st"] * (len(pairs) // 2) + ["ts"] * (len(pairs) % 2)


def test_first_runs_do_not_count_and_the_median_forgives(clock: Clock) -> None:
    slow = {0: 1e6, 1: 1e6, 2: 1e6, 7: 1e3}  # compilation and caches; then somebody else's work
    result = ratio(clock, lambda run: slow.get(run, 2.0), lambda run: 4.0, rounds=9)
    assert result == pytest.approx(LatencyRatio(0.5, 0.5, 0.5))


def test_the_interval_is_that_of_the_median(clock: Clock) -> None:
    """Of 20 sorted values the 6th and the 15th enclose the median with 95.9 %; of 6 the smallest and the largest."""
    values = [x + 1.0 for x in (4, 9, 0, 15, 3, 19, 12, 7, 1, 18, 10, 6, 14, 2, 16, 8, 11, 5, 17, 13)]
    result = ratio(clock, lambda run: ([1.0] * 3 + values)[run], lambda run: 1.0)
    assert result == pytest.approx(LatencyRatio(10.5, 6.0, 15.0))
    result = ratio(clock, lambda run: ([1.0] * 3 + values)[run], lambda run: 1.0, rounds=6)
    assert result == pytest.approx(LatencyRatio((5 + 10) / 2, 1.0, 20.0))


def test_too_few_rounds_are_refused(clock: Clock) -> None:
    with pytest.raises(TransferError, match="rounds=5 is not valid: an interval needs at least 6"):
        ratio(clock, lambda run: 1.0, lambda run: 1.0, rounds=5)


def test_real_time() -> None:
    """The larger of two networks takes longer, by a real clock."""
    small, large = nn.Linear(16, 16), nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)])
    result = latency_ratio(small, torch.zeros(4, 16), large, torch.zeros(256, 512))
    assert 0 < result.low <= result.ratio <= result.high < 0.5
