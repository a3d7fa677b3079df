"""DIST, multi-level distillation and logit standardisation against plain transcriptions of their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from teaching import finite_with_gradient, normal, step_of

from hf_transfer.distillation.signal import TeacherSignal, TopLogits
from hf_transfer.errors import TransferError
from hf_transfer.objective import Learner, LinearSchedule
from hf_transfer.objectives import DIST, DKD, JSD, MLKD, CrossEntropy, LogitMSE, LogitStandardization, SoftTargets
from hf_transfer.objectives.logit_relations import dist, mlkd, standardize_logits
from hf_transfer.objectives.logits import dkd, soft_targets

N, C = 5, 4


def probabilities(z, temperature):
    z = z.detach().numpy() / temperature
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def pearson(u, v):
    u, v = u - u.mean(), v - v.mean()
    return (u * v).sum() / np.sqrt((u**2).sum() * (v**2).sum())


def plain_dist(s, t, beta, gamma, temperature):
    p, q = probabilities(t, temperature), probabilities(s, temperature)
    inter = sum(1 - pearson(p[i], q[i]) for i in range(len(p))) / len(p)
    intra = sum(1 - pearson(p[:, c], q[:, c]) for c in range(p.shape[1])) / p.shape[1]
    return temperature**2 * (beta * inter + gamma * intra)


def plain_mlkd(s, t, temperatures):
    total = 0.0
    for temperature in temperatures:
        p, q = probabilities(t, temperature), probabilities(s, temperature)
        n, c = p.shape
        total += temperature**2 * sum(p[i, k] * np.log(p[i, k] / q[i, k]) for i in range(n) for k in range(c)) / n
        for i in range(n):
            for j in range(n):
                total += (p[i] @ p[j] - q[i] @ q[j]) ** 2 / n
        for a in range(c):
            for b in range(c):
                total += (p[:, a] @ p[:, b] - q[:, a] @ q[:, b]) ** 2 / c
    return total


CASES = {
    "dist": (dist, plain_dist, (2.0, 2.0, 1.0)),
    "dist_cifar": (lambda s, t: dist(s, t, 1.0, 3.0, 4.0), plain_dist, (1.0, 3.0, 4.0)),
    "mlkd": (mlkd, plain_mlkd, ((2.0, 3.0, 4.0, 5.0, 6.0),)),
    "mlkd_one": (lambda s, t: mlkd(s, t, [1.5]), plain_mlkd, ((1.5,),)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_papers_formula(name) -> None:
    function, plain, arguments = CASES[name]
    s, t = normal(N, C, seed=1, scale=2.0), normal(N, C, seed=2, scale=2.0)
    assert function(s, t).item() == pytest.approx(plain(s, t, *arguments), rel=1e-9)
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, t), s)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 60.0), (torch.float16, 5.0)])
def test_it_is_finite_and_right_for_large_logits(name, dtype, scale) -> None:
    function = CASES[name][0]
    s, t = (normal(N, C, seed=seed, scale=scale).to(dtype) for seed in (3, 4))
    s.requires_grad_()
    value = function(s, t)
    assert finite_with_gradient(value, s)
    torch.testing.assert_close(value.double(), function(s.double(), t.double()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "z", [normal(N, C), normal(N, C, scale=60.0), torch.zeros(N, C), normal(1, C), 9 * torch.eye(4)]
)
def test_it_is_zero_where_the_student_is_the_teacher(name, z) -> None:
    z = z.clone().requires_grad_()
    value = CASES[name][0](z, z.detach())
    assert finite_with_gradient(value, z)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-9)


def test_dist_ignores_what_a_correlation_ignores() -> None:
    p, q = normal(N, C).softmax(1), normal(N, C, seed=1).softmax(1)
    inter = dist(q.log(), p.log(), 1.0, 0.0)
    flatter = 0.3 * q + 0.7 / C  # each row's probabilities on a straight line of slope 0.3
    torch.testing.assert_close(dist(flatter.log(), p.log(), 1.0, 0.0), inter)


def test_dist_sees_classes_that_are_unlikely_in_every_row() -> None:
    s, t = normal(N, C), normal(N, C, seed=1)
    s[:, 2] -= 60  # probabilities of 1e-26, whose squares float32 does not hold
    t[:, 2] -= 60
    torch.testing.assert_close(dist(s.float(), t.float(), 0.0, 1.0).double(), dist(s, t, 0.0, 1.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_a_classifier_that_starts_at_zero_has_a_moderate_gradient(name) -> None:
    s, t = torch.zeros(N, C, requires_grad=True), normal(N, C).float()
    (gradient,) = torch.autograd.grad(CASES[name][0](s, t), s)
    assert gradient.abs().max() < 100


def test_sums_are_in_float32_under_autocast() -> None:
    s, t = (normal(N, C, seed=seed).float() for seed in (1, 2))
    expected = mlkd(s, t)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mlkd(s, t), expected)


@pytest.mark.parametrize(("term", "function"), [(DIST(), dist), (MLKD(), mlkd)])
def test_terms_see_the_items_that_count_and_give_one_number(term, function) -> None:
    s, t = normal(N, C), normal(N, C, seed=1)
    torch.testing.assert_close(term(step_of(s, t, torch.full((N,), -100))), function(s, t))
    assert term.count({"labels": torch.zeros(N)}) is None
    s, t = normal(2, 3, C).requires_grad_(), normal(2, 3, C, seed=1)
    labels = torch.tensor([[1, -100, 2], [-100, -100, 0]])
    value = term(step_of(s, t, labels))
    torch.testing.assert_close(value, function(s[labels != -100], t[labels != -100]))
    none = term(step_of(s, t, torch.full((2, 3), -100)))
    assert none == 0
    assert torch.autograd.grad(none, s)[0].abs().sum() == 0


def test_dists_temperature_may_follow_a_schedule() -> None:
    s, t = normal(N, C), normal(N, C, seed=1)
    term = DIST(temperature=LinearSchedule(1.0, 5.0))
    torch.testing.assert_close(term(step_of(s, t, progress=0.5)), dist(s, t, temperature=3.0))


# ---- logit standardisation ------------------------------------------------------------------------------------------


def test_standardised_logits_by_their_formula() -> None:
    z = normal(N, C, scale=7.0).requires_grad_()
    value = standardize_logits(z)
    for i in range(N):
        row = z[i].detach().numpy()
        expected = (row - row.mean()) / np.sqrt(((row - row.mean()) ** 2).sum() / C)
        np.testing.assert_allclose(value[i].detach().numpy(), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(standardize_logits, z)
    torch.testing.assert_close(standardize_logits(3 * z - 5), value)


@pytest.mark.parametrize("value", [0.0, 60.1, 0.3])  # means of seven of the latter two are rounded
def test_equal_logits_have_no_standard_score_and_no_gradient(value) -> None:
    z = torch.full((2, 7), value, requires_grad=True)
    scores = standardize_logits(z)
    assert scores.abs().sum() == 0
    assert torch.autograd.grad(scores[0, 0], z)[0].abs().sum() == 0


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 60.0), (torch.float16, 5.0)])
def test_standardised_logits_are_finite(dtype, scale) -> None:
    z = normal(N, C, scale=scale).to(dtype).requires_grad_()
    assert finite_with_gradient(standardize_logits(z).square()[:, 0], z)


def test_any_logit_term_can_be_wrapped() -> None:
    s, t, y = normal(N, C, scale=4.0), normal(N, C, seed=1), torch.tensor([0, -100, 1, 2, 0])
    zs, zt = standardize_logits(s), standardize_logits(t)
    wrapped = LogitStandardization(SoftTargets(temperature=2.0, weight=LinearSchedule(0.0, 9.0)))
    torch.testing.assert_close(wrapped(step_of(s, t, y)), soft_targets(zs, zt, 2.0))
    assert (wrapped.name, wrapped.weight_at(1.0)) == ("standardized_soft_targets", 9.0)
    assert wrapped.count({"labels": y}) == N
    wrapped = LogitStandardization(DKD())
    kept = y != -100
    torch.testing.assert_close(wrapped(step_of(s, t, y)), dkd(zs[kept], zt[kept], y[kept]))
    assert wrapped.count({"labels": y}) == 4
    for term in (DIST(), MLKD(), JSD(), LogitMSE()):
        torch.testing.assert_close(LogitStandardization(term)(step_of(s, t)), term(step_of(zs, zt)))


def test_it_runs_beside_the_term_that_it_wraps_a_copy_of() -> None:
    class Net(torch.nn.Module):
        def forward(self, x):
            return {"logits": x}

    terms = [CrossEntropy(weight=0.1), SoftTargets(), LogitStandardization(SoftTargets(temperature=2.0, weight=9.0))]
    s, t = normal(N, C).float(), normal(N, C, seed=1).float()
    signal = Learner(Net(), terms, None)({"x": s, "labels": torch.zeros(N).long()}, teacher=TeacherSignal(logits=t))
    expected = soft_targets(standardize_logits(s), standardize_logits(t), 2.0).mean()
    torch.testing.assert_close(signal.terms["standardized_soft_targets"], expected)
    total = sum(term.weight * signal.terms[term.name] for term in terms)
    torch.testing.assert_close(signal.loss, total)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DIST(temperature=-1.0), "temperature must be > 0"),
        (lambda: MLKD(temperatures=[]), "temperatures must not be empty"),
        (lambda: MLKD(temperatures=[2.0, 0.0]), "temperatures must be > 0 and finite, or a schedule, got 0.0"),
        (lambda: LogitStandardization(CrossEntropy()), "wraps a logit term such as SoftTargets"),
    ],
)
def test_arguments_out_of_range(make, message) -> None:
    with pytest.raises(TransferError, match=message):
        make()


@pytest.mark.parametrize("term", [DIST(), MLKD(), LogitStandardization(SoftTargets())])
def test_the_largest_logits_are_not_enough(term) -> None:
    signal = TeacherSignal(top=TopLogits.of(torch.zeros(N, C), 2))
    with pytest.raises(TransferError, match="needs the teacher's logits of all classes"):
        term(step_of(torch.zeros(N, C), signal))
