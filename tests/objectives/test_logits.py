"""Logit terms against plain transcriptions of the papers' formulas in double, and what counts as an item."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from teaching import finite_with_gradient, normal, step_of

from hf_transfer.distillation.signal import TeacherSignal, TopLogits
from hf_transfer.errors import TransferError
from hf_transfer.objective import Learner, LinearSchedule
from hf_transfer.objectives import DKD, JSD, NKD, LogitMSE, SoftTargets
from hf_transfer.objectives.logits import dkd, jsd, logit_mse, nkd, soft_targets

N, C = 5, 4
LABELS = torch.tensor([0, 3, 1, 2, 0])


def softmax(z, temperature=1.0):
    e = [math.exp(v / temperature) for v in z]
    return [v / sum(e) for v in e]


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def plain_soft_targets(s, t, y, temperature):
    return temperature**2 * divergence(softmax(t, temperature), softmax(s, temperature))


def plain_jsd(s, t, y, beta, temperature):
    p, q = softmax(t, temperature), softmax(s, temperature)
    if beta in (0, 1):
        return divergence(p, q) if beta == 0 else divergence(q, p)
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * divergence(p, m) + (1 - beta) * divergence(q, m)


def plain_logit_mse(s, t, y):
    return sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s)


def plain_dkd(s, t, y, alpha, beta, temperature):
    p, q = softmax(t, temperature), softmax(s, temperature)
    tckd = divergence([p[y], 1 - p[y]], [q[y], 1 - q[y]])
    p_hat = [p[i] / (1 - p[y]) for i in range(len(p)) if i != y]
    q_hat = [q[i] / (1 - q[y]) for i in range(len(q)) if i != y]
    return temperature**2 * (alpha * tckd + beta * divergence(p_hat, q_hat))


def plain_nkd(s, t, y, gamma, temperature):
    target = -softmax(t)[y] * math.log(softmax(s)[y])
    p, q = softmax(t, temperature), softmax(s, temperature)
    rest = sum(p[i] / (1 - p[y]) * math.log(q[i] / (1 - q[y])) for i in range(len(p)) if i != y)
    return target - gamma * temperature**2 * rest


CASES = {
    "soft_targets": (lambda s, t, T=4.0: soft_targets(s, t, T), plain_soft_targets, (4.0,)),
    "soft_targets_cold": (lambda s, t: soft_targets(s, t, 1.0), plain_soft_targets, (1.0,)),
    "jsd": (jsd, plain_jsd, (0.5, 1.0)),
    "jsd_skewed": (lambda s, t: jsd(s, t, 0.1, 2.0), plain_jsd, (0.1, 2.0)),
    "forward_kl": (lambda s, t: jsd(s, t, 0.0), plain_jsd, (0, 1.0)),
    "reverse_kl": (lambda s, t: jsd(s, t, 1.0), plain_jsd, (1, 1.0)),
    "logit_mse": (logit_mse, plain_logit_mse, ()),
    "dkd": (lambda s, t: dkd(s, t, LABELS[: len(s)]), plain_dkd, (1.0, 8.0, 4.0)),
    "dkd_imagenet": (lambda s, t: dkd(s, t, LABELS[: len(s)], 1.0, 0.5, 1.0), plain_dkd, (1.0, 0.5, 1.0)),
    "nkd": (lambda s, t: nkd(s, t, LABELS[: len(s)]), plain_nkd, (1.5, 1.0)),
    "nkd_warm": (lambda s, t: nkd(s, t, LABELS[: len(s)], 0.7, 3.0), plain_nkd, (0.7, 3.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_papers_formula(name) -> None:
    function, plain, arguments = CASES[name]
    s, t = normal(N, C, seed=1, scale=2.0), normal(N, C, seed=2, scale=2.0)
    expected = [plain(s[i].tolist(), t[i].tolist(), int(LABELS[i]), *arguments) for i in range(N)]
    torch.testing.assert_close(function(s, t), torch.tensor(expected, dtype=torch.float64))
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, t), s)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 60.0), (torch.float16, 5.0)])
def test_it_is_finite_and_right_for_large_logits(name, dtype, scale) -> None:
    function = CASES[name][0]
    s, t = (normal(N, C, seed=seed, scale=scale).to(dtype) for seed in (3, 4))
    s.requires_grad_()
    value = function(s, t)
    assert value.dtype == torch.float32
    assert finite_with_gradient(value, s)
    torch.testing.assert_close(value.double(), function(s.double(), t.double()), rtol=1e-4, atol=1e-5)
    assert finite_with_gradient(function(s, -s.detach()), s)  # every class the least likely for one of the two


@pytest.mark.parametrize("name", [name for name in CASES if "nkd" not in name])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_it_is_zero_where_the_student_is_the_teacher_and_nowhere_less(name, scale) -> None:
    function = CASES[name][0]
    z = normal(N, C, seed=5, scale=scale).requires_grad_()
    value = function(z, z.detach())
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), z)[0], torch.zeros_like(z), rtol=0, atol=1e-9)
    elsewhere = function(z + normal(N, C, seed=6), z)
    assert (elsewhere > (0 if scale == 1 else -1e-12)).all()  # saturated predictions differ by rounding only


def test_nkd_among_the_other_classes_is_least_at_the_teachers_and_then_their_entropy() -> None:
    t = normal(N, C, seed=7).requires_grad_()
    value = nkd(t, t.detach(), LABELS) - nkd(t, t.detach(), LABELS, gamma=0.0)
    for i in range(N):
        others = softmax([z for c, z in enumerate(t[i].tolist()) if c != LABELS[i]])
        assert value[i].item() == pytest.approx(-1.5 * sum(p * math.log(p) for p in others))
    gradient = torch.autograd.grad(value.sum(), t)[0]
    torch.testing.assert_close(gradient, torch.zeros_like(t), rtol=0, atol=1e-12)


def test_dkd_with_the_teachers_own_weight_of_the_others_is_soft_targets() -> None:
    s, t = normal(N, C, seed=8), normal(N, C, seed=9)
    others = 1 - (t / 4).softmax(dim=1)[torch.arange(N), LABELS]
    torch.testing.assert_close(dkd(s, t, LABELS, 1.0, 0.0) + others * dkd(s, t, LABELS, 0.0, 1.0), soft_targets(s, t))


def test_soft_targets_have_cross_entropys_gradient_and_size_at_every_temperature() -> None:
    s, t = normal(N, C, seed=10).requires_grad_(), normal(N, C, seed=11)
    entropy = -(t.softmax(1) * s.log_softmax(1)).sum()
    expected = torch.autograd.grad(entropy, s)[0]
    torch.testing.assert_close(torch.autograd.grad(soft_targets(s, t, 1.0).sum(), s)[0], expected)
    hot = torch.autograd.grad(soft_targets(s, t, 1e4).sum(), s)[0]  # Hinton et al., equation 4: logits are matched
    centred = (s - s.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))
    torch.testing.assert_close(hot, centred.detach() / C, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("beta", [1e-6, 1 - 1e-6])
def test_jsd_tends_to_the_two_divergences(beta) -> None:
    s, t = normal(N, C, seed=12), normal(N, C, seed=13)
    limit = jsd(s, t, beta) / min(beta, 1 - beta)
    torch.testing.assert_close(limit, jsd(s, t, round(beta)), rtol=1e-4, atol=1e-6)


def test_sums_are_in_float32_under_autocast() -> None:
    s, t = (normal(N, C, seed=seed).float() for seed in (1, 2))
    expected = soft_targets(s, t)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(soft_targets(s, t), expected)


# ---- terms ----------------------------------------------------------------------------------------------------------

TERMS = {
    "soft_targets": (SoftTargets(temperature=3.0), lambda s, t, y: soft_targets(s, t, 3.0)),
    "jsd": (JSD(beta=0.3, temperature=2.0), lambda s, t, y: jsd(s, t, 0.3, 2.0)),
    "logit_mse": (LogitMSE(), lambda s, t, y: logit_mse(s, t)),
    "dkd": (DKD(alpha=0.5, beta=2.0, temperature=3.0), lambda s, t, y: dkd(s, t, y, 0.5, 2.0, 3.0)),
    "nkd": (NKD(gamma=0.4, temperature=2.0), lambda s, t, y: nkd(s, t, y, 0.4, 2.0)),
}
LABEL_FREE = ("soft_targets", "jsd", "logit_mse")


def mean_of(term, step) -> torch.Tensor:
    batch = {**step.inputs, **({} if step.labels is None else {"labels": step.labels}), "x": step.logits}
    return term(step).sum() / term.count(batch).double()


def test_one_output_is_regression_and_has_no_probabilities() -> None:
    s, t = normal(N, 1), normal(N, 1, seed=1)
    torch.testing.assert_close(LogitMSE()(step_of(s, t, torch.zeros(N))), (s - t).square()[:, 0])
    for term in (SoftTargets(), JSD(), DKD(), NKD()):
        with pytest.raises(TransferError, match="compares probabilities of classes, and the networks have one output"):
            term(step_of(s, t, LABELS))


@pytest.mark.parametrize("name", TERMS)
def test_the_papers_settings_are_the_defaults(name) -> None:
    s, t = normal(N, C), normal(N, C, seed=1)
    defaults = {"soft_targets": (SoftTargets(), soft_targets(s, t, 4.0)), "jsd": (JSD(), jsd(s, t, 0.5, 1.0)),
                "logit_mse": (LogitMSE(), logit_mse(s, t)), "dkd": (DKD(), dkd(s, t, LABELS, 1.0, 8.0, 4.0)),
                "nkd": (NKD(), nkd(s, t, LABELS, 1.5, 1.0))}  # fmt: skip
    term, expected = defaults[name]
    assert term.name == name
    torch.testing.assert_close(term(step_of(s, t, LABELS)), expected)


@pytest.mark.parametrize("name", TERMS)
def test_rows_count_whether_or_not_they_have_a_label_where_none_is_read(name) -> None:
    term, function = TERMS[name]
    s, t = normal(N, C), normal(N, C, seed=1)
    labels = torch.tensor([0, -100, 1, -100, 0])
    if name in LABEL_FREE:
        expected = function(s, t, None).mean()
        torch.testing.assert_close(mean_of(term, step_of(s, t, labels)), expected)
        torch.testing.assert_close(mean_of(term, step_of(s, t)), expected)
        torch.testing.assert_close(mean_of(term, step_of(s, t, torch.rand(N, C))), expected)
    else:
        kept = [0, 2, 4]
        expected = function(s[kept], t[kept], labels[kept]).mean()
        torch.testing.assert_close(mean_of(term, step_of(s, t, labels)), expected)
        assert term.count({"x": s}) == 0
    assert mean_of(term, step_of(s[:0], t[:0], labels[:0])).isnan()  # 0 / 0: no value, no item


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("shift", [False, True])
def test_tokens_count_where_they_have_a_label(name, shift) -> None:
    term, function = TERMS[name]
    term = type(term)(**{k: v for k, v in vars(term).items() if k in ("alpha", "beta", "gamma", "temperature")},
                      shift=shift)  # fmt: skip
    s, t = normal(2, 4, C).requires_grad_(), normal(2, 4, C, seed=1)
    labels = torch.tensor([[-100, 1, 2, -100], [3, -100, -100, 0]])
    where = [(0, 0, 1), (0, 1, 2), (1, 2, 0)] if shift else [(0, 1, 1), (0, 2, 2), (1, 0, 3), (1, 3, 0)]
    rows, tokens, y = map(list, zip(*where, strict=True))
    expected = function(s[rows, tokens], t[rows, tokens], torch.tensor(y)).mean()
    value = mean_of(term, step_of(s, t, labels))
    torch.testing.assert_close(value, expected)
    gradient = torch.autograd.grad(value, s)[0].abs().sum(-1)
    assert {tuple(i) for i in gradient.nonzero().tolist()} == set(zip(rows, tokens, strict=True))


def test_tokens_without_labels_count_as_their_rows_mean() -> None:
    s, t = normal(2, 3, C), normal(2, 3, C, seed=1)
    every = soft_targets(s, t)
    term, shifted = SoftTargets(), SoftTargets(shift=True)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    torch.testing.assert_close(mean_of(term, step_of(s, t)), every.mean())
    value = mean_of(term, step_of(s, t, inputs={"attention_mask": mask}))
    torch.testing.assert_close(value, (every[0].mean() + every[1, :2].mean()) / 2)
    value = mean_of(shifted, step_of(s, t, inputs={"attention_mask": mask}))
    torch.testing.assert_close(value, (every[0, :2].mean() + every[1, 0]) / 2)


def test_temperature_and_weight_may_follow_a_schedule() -> None:
    s, t = normal(N, C), normal(N, C, seed=1)
    term = SoftTargets(temperature=LinearSchedule(8.0, 2.0), weight=LinearSchedule(0.0, 1.0))
    torch.testing.assert_close(term(step_of(s, t, progress=0.5)), soft_targets(s, t, 5.0))
    assert term.weight_at(0.5) == 0.5


def test_the_largest_logits_are_enough_for_divergences() -> None:
    s, t = normal(2, 3, C), normal(2, 3, C, seed=1)
    labels = torch.tensor([[1, -100, 0], [-100, 2, 3]])
    signal = TeacherSignal(top=TopLogits.of(t, 2, temperatures=[3.0]))
    value = SoftTargets(temperature=3.0)(step_of(s, signal, labels))
    for got, (i, j) in zip(value, [(0, 0), (0, 2), (1, 1), (1, 2)], strict=True):
        order = np.argsort(-t[i, j].numpy())
        p, q = (np.array(softmax(x[i, j].tolist(), 3.0))[order] for x in (t, s))
        lumped = divergence([*p[:2], p[2:].sum()], [*q[:2], q[2:].sum()])
        assert float(got) == pytest.approx(9 * lumped, rel=1e-6)
    with pytest.raises(TransferError, match="'dkd' needs the teacher's logits of all classes"):
        DKD()(step_of(s, signal, labels))


def test_a_teacher_in_inference_mode_and_in_half_precision_will_do() -> None:
    s = normal(N, C).float().requires_grad_()
    with torch.inference_mode():
        t = normal(N, C, seed=1).half()
    for term, _ in TERMS.values():
        term(step_of(s, t, LABELS)).sum().backward()
    assert s.grad.isfinite().all()


def test_the_learner_averages_over_the_accumulated_batch() -> None:
    class Net(torch.nn.Module):
        def forward(self, x):
            return {"logits": x}

    s, t = normal(4, C).float(), normal(4, C, seed=1).float()
    learner = Learner(Net(), [SoftTargets()], None)
    counts = {"soft_targets": torch.tensor(4.0)}
    losses = [
        learner({"x": s[part]}, counts=counts, teacher=TeacherSignal(logits=t[part])).loss
        for part in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(losses), soft_targets(s, t).mean())
    assert learner.eval()({"x": s, "labels": LABELS[:4]}).loss is None  # no teacher in evaluation


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftTargets(temperature=0.0), "temperature must be > 0 and finite, or a schedule, got 0.0"),
        (lambda: NKD(temperature=math.inf), "temperature must be > 0 and finite"),
        (lambda: JSD(beta=1.5), r"beta must be in \[0, 1\], got 1.5"),
    ],
)
def test_arguments_out_of_range(make, message) -> None:
    with pytest.raises(TransferError, match=message):
        make()


@pytest.mark.parametrize(
    ("term", "teacher", "labels", "message"),
    [
        (SoftTargets(), None, None, "'soft_targets' learns from a teacher, and the step has none"),
        (SoftTargets(), TeacherSignal(features=torch.zeros(N, 2)), None, r"it gave \['features'\]"),
        (
            SoftTargets(),
            TeacherSignal(top=TopLogits.of(torch.zeros(N, 9), 2)),
            None,
            r"teacher logits of shape \(5, 9\)",
        ),
        (SoftTargets(), torch.zeros(N, C + 1), None, r"teacher logits of shape \(5, 5\) for student .* \(5, 4\)"),
        (SoftTargets(), torch.zeros(N, C), torch.zeros(N, 3).long(), r"labels of shape \(5, 3\) for logits"),
        (DKD(), torch.zeros(N, C), None, "as labels, got none"),
        (NKD(), torch.zeros(N, C), torch.rand(N, C), r"class indices .* of shape \(5,\) as labels, got torch.float32"),
    ],
)
def test_what_does_not_fit_together_is_refused(term, teacher, labels, message) -> None:
    with pytest.raises(TransferError, match=message):
        term(step_of(torch.zeros(N, C), teacher, labels))
