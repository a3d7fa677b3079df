"""Penalties against closed forms."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_transfer.errors import TransferError
from hf_transfer.objective import Learner, Step
from hf_transfer.objectives import L1, L2, ConfidencePenalty, ElasticNet
from hf_transfer.objectives.penalties import elastic_net, l1, l2, negative_entropy


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(3, 4).requires_grad_(False)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return SimpleNamespace(logits=self.head(self.norm(self.frozen(x))))


def test_penalties_by_their_closed_form() -> None:
    weights = [torch.tensor([[3.0, -4.0]], requires_grad=True), torch.tensor([1.0], requires_grad=True)]
    assert l1(weights) == 8
    assert l2(weights) == 13
    assert elastic_net(weights, 0.25) == 0.25 * 8 + 0.75 * 13
    assert [g.tolist() for g in torch.autograd.grad(l2(weights), weights)] == [[[3.0, -4.0]], [1.0]]
    assert [g.tolist() for g in torch.autograd.grad(l1(weights), weights)] == [[[1.0, -1.0]], [1.0]]
    assert l1([torch.zeros(2, requires_grad=True)]).requires_grad


def test_sums_are_in_float32_at_least() -> None:
    halves = [torch.full((300, 300), 2.0, dtype=torch.float16)]
    assert float(l2(halves)) == 180_000  # float16 ends at 65504
    assert float(l1(halves)) == 180_000
    assert l2([torch.ones(2, dtype=torch.float64)]).dtype == torch.float64


@pytest.mark.parametrize(
    ("term", "gradient"),
    [
        (L1(weight=0.1), lambda w: 0.1 * w.sign()),
        (L2(weight=0.1), lambda w: 0.1 * w),
        (ElasticNet(weight=0.1, l1_ratio=0.3), lambda w: 0.1 * (0.3 * w.sign() + 0.7 * w)),
    ],
)
@pytest.mark.parametrize("all_of_them", [False, True])
def test_only_trainable_weights_are_penalised_and_biases_and_norms_on_request(term, gradient, all_of_them) -> None:
    net = Net()
    term.biases_and_norms = all_of_them
    signal = Learner(net, [term], None)({"x": torch.zeros(2, 3)})
    signal.loss.backward()
    for name, p in net.named_parameters():
        penalised = p.requires_grad and (all_of_them or name == "head.weight")
        torch.testing.assert_close(p.grad, gradient(p.detach()) if penalised else None)


def test_a_penalty_on_nothing_is_refused_before_training() -> None:
    net = Net()
    net.head.weight.requires_grad_(False)
    with pytest.raises(TransferError, match=r"'l2' has nothing to penalise.*biases_and_norms=True"):
        Learner(net, [L2()], None)
    Learner(net, [L2(biases_and_norms=True)], None)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan])
def test_l1_ratio_is_a_share(ratio) -> None:
    with pytest.raises(TransferError, match=r"l1_ratio must be in \[0, 1\]"):
        ElasticNet(l1_ratio=ratio)


def test_penalties_stay_out_of_the_evaluation_loss() -> None:
    learner = Learner(Net(), [L2(), ConfidencePenalty()], None).eval()
    assert learner({"x": torch.zeros(2, 3), "labels": torch.zeros(2).long()}).loss is None


# ---- confidence penalty ---------------------------------------------------------------------------------------------


def test_negative_entropy_by_its_formula() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    p = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    torch.testing.assert_close(negative_entropy(logits), (p * p.log()).sum(dim=1))
    assert torch.autograd.gradcheck(negative_entropy, logits)
    assert float(negative_entropy(torch.zeros(4))) == pytest.approx(-math.log(4))


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 60.0), (torch.float16, 5.0)])
def test_negative_entropy_is_finite_for_large_logits(dtype, scale) -> None:
    logits = (scale * torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, 1.0]])).to(dtype).requires_grad_()
    value = negative_entropy(logits)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert float(value[1].detach()) == pytest.approx(-math.log(3))


def test_the_confidence_penalty_is_the_mean_over_labelled_items() -> None:
    torch.manual_seed(0)
    for shape, labels in [((4,), [1, -100, 0, 2]), ((2, 2), [[1, -100], [0, 2]])]:
        step = Step(nn.Identity(), {}, None, logits=torch.randn(*shape, 3), labels=torch.tensor(labels))
        term = ConfidencePenalty()
        value = term(step).sum() / term.count({"labels": step.labels})
        torch.testing.assert_close(value, negative_entropy(step.logits)[step.labels != -100].mean())
    soft = torch.tensor([[0.5, 0.2, 0.3], [-100.0, -100.0, -100.0]])
    step = Step(nn.Identity(), {}, None, logits=torch.randn(2, 3), labels=soft)
    assert term.count({"labels": soft}) == 1
    assert term(step).tolist() == [pytest.approx(float(negative_entropy(step.logits)[0])), 0.0]


def test_the_confidence_penalty_needs_labels() -> None:
    with pytest.raises(TransferError, match="'confidence_penalty' is for labelled items"):
        ConfidencePenalty()(Step(nn.Identity(), {}, None, logits=torch.zeros(2, 3)))
