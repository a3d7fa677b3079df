"""Supervised terms against float64 transcriptions of their formulas, PyTorch's own losses, and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_transfer.errors import TransferError
from hf_transfer.objective import Learner, Step
from hf_transfer.objectives import MSE, CrossEntropy, Focal, KLDivergence
from hf_transfer.objectives.supervised import adjust_logits, cross_entropy, focal, kl_divergence, squared_error

WEIGHTS = torch.tensor([0.2, 1.0, 3.0])


def step_of(logits: Tensor, labels: Tensor | None) -> Step:
    return Step(model=nn.Identity(), inputs={}, outputs=None, logits=logits, labels=labels)


def mean_of(term, logits: Tensor, labels: Tensor) -> Tensor:
    """As the Learner reduces it, in double."""
    return term(step_of(logits, labels)).sum() / term.count({"labels": labels}).double()


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def hard() -> Tensor:
    return torch.tensor([0, 2, -100, 1, 1, -100])


@pytest.fixture
def soft() -> Tensor:
    rows = torch.rand(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = rows / rows.sum(dim=1, keepdim=True)
    rows[2] = -100.0
    return rows


# ---- cross-entropy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_cross_entropy_of_hard_labels_and_tokens_is_pytorchs_mean(logits, hard, smoothing, weights) -> None:
    term = CrossEntropy(label_smoothing=smoothing, class_weights=weights)
    expected = F.cross_entropy(
        logits, hard, weight=None if weights is None else weights.double(), label_smoothing=smoothing
    )
    torch.testing.assert_close(mean_of(term, logits, hard), expected, rtol=1e-6, atol=0)
    tokens = mean_of(term, logits.view(2, 3, 3), hard.view(2, 3))
    torch.testing.assert_close(tokens, expected, rtol=1e-6, atol=0)
    for each in (step_of(logits, hard), step_of(logits.view(2, 3, 3), hard.view(2, 3))):
        own = term.own_mean(each)  # of a batch alone
        assert own is not None
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=0)


def test_without_labels_or_with_soft_ones_there_is_no_short_way_to_the_mean(logits, hard, soft) -> None:
    term = CrossEntropy()
    assert term.own_mean(step_of(logits, soft)) is None
    assert term.own_mean(step_of(logits, torch.full_like(hard, -100))) is None
    learner = Learner(nn.Linear(2, 3), [term], None)
    batch = {"input": torch.randn(4, 2), "labels": torch.full((4,), -100)}
    loss = learner(batch).loss
    assert loss == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in learner.parameters())


def test_cross_entropy_by_its_formula(logits, soft) -> None:
    smoothing = 0.3
    value = cross_entropy(logits, soft, WEIGHTS, smoothing)
    for i in range(6):
        p = logits[i].exp() / logits[i].exp().sum()
        target = soft[i] * (1 - smoothing) + smoothing / 3
        expected = 0.0 if i == 2 else -sum(WEIGHTS[c].double() * target[c] * p[c].log() for c in range(3))
        assert float(value[i]) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_a_one_hot_row_counts_as_its_hard_label(logits, hard, smoothing, weights) -> None:
    one_hot = F.one_hot(hard.clamp(min=0), 3).double()
    one_hot[hard == -100] = -100.0
    term = CrossEntropy(label_smoothing=smoothing, class_weights=weights)
    torch.testing.assert_close(mean_of(term, logits, one_hot), mean_of(term, logits, hard), rtol=1e-6, atol=0)


def test_values_are_zero_at_unlabelled_items(logits, hard, soft) -> None:
    for term in (CrossEntropy(label_smoothing=0.1), Focal()):
        assert (term(step_of(logits, hard)) == 0).tolist() == (hard == -100).tolist()
    for term in (CrossEntropy(label_smoothing=0.1), Focal(), KLDivergence()):
        assert (term(step_of(logits, soft)) == 0).tolist() == [False, False, True, False, False, False]


def test_counts_are_labelled_items_or_their_weights(hard, soft) -> None:
    assert CrossEntropy().count({"labels": hard}) == 4
    assert CrossEntropy().count({"labels": hard.view(2, 3)}) == 4
    assert CrossEntropy().count({"labels": soft}) == 5
    assert CrossEntropy(class_weights=WEIGHTS).count({"labels": hard}) == pytest.approx(0.2 + 3.0 + 1.0 + 1.0)
    expected = float((soft[[0, 1, 3, 4, 5]] * WEIGHTS).sum())
    assert CrossEntropy(class_weights=WEIGHTS).count({"labels": soft}) == pytest.approx(expected)
    for term in (CrossEntropy(), CrossEntropy(class_weights=WEIGHTS), Focal(), KLDivergence(), MSE()):
        assert term.count({"x": hard}) == 0
        assert term.count({"labels": hard}).dim() == 0


def test_shift_predicts_the_next_token(logits) -> None:
    logits, labels = logits.view(2, 3, 3), torch.tensor([[0, 2, 1], [2, 2, -100]])
    term = CrossEntropy(shift=True)
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 3), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(mean_of(term, logits, labels), expected)
    assert term.count({"labels": labels}) == 3


def test_logit_adjustment_is_cross_entropy_against_the_prior_odds(logits, hard) -> None:
    counts, tau = torch.tensor([10.0, 30.0, 60.0], dtype=torch.float64), 0.7
    term = CrossEntropy(logit_adjustment=counts, tau=tau)
    values = term(step_of(logits, hard))
    for i in (
        0,
        1,
        3,
        4,
    ):  # equation 10 of arXiv:2007.07314: log(1 + sum over others of (pi_o / pi_y)^tau e^(f_o - f_y))
        y = int(hard[i])
        others = sum((counts[o] / counts[y]) ** tau * (logits[i, o] - logits[i, y]).exp() for o in range(3) if o != y)
        assert float(values[i]) == pytest.approx(math.log1p(float(others)), rel=1e-6)
    balanced = CrossEntropy(logit_adjustment=[5, 5, 5])
    torch.testing.assert_close(mean_of(balanced, logits, hard), mean_of(CrossEntropy(), logits, hard))
    assert torch.equal(adjust_logits(logits, torch.zeros(3)), logits)


def test_configuration_stays_out_of_the_state_and_moves_with_the_term() -> None:
    term = CrossEntropy(class_weights=[1, 2], logit_adjustment=[1, 2])
    assert not term.state_dict()
    moved = term.to("meta")
    assert moved.class_weights.device.type == moved.log_priors.device.type == "meta"


# ---- focal loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [None, WEIGHTS])
def test_focal_by_its_formula(logits, hard, gamma, alpha) -> None:
    values = focal(logits, hard, gamma, alpha)
    for i in (0, 1, 3, 4):
        p = float((logits[i].exp() / logits[i].exp().sum())[hard[i]])
        factor = 1.0 if alpha is None else float(alpha[hard[i]])
        assert float(values[i]) == pytest.approx(-factor * (1 - p) ** gamma * math.log(p), rel=1e-6)
    one_hot = F.one_hot(hard.clamp(min=0), 3).double()
    one_hot[hard == -100] = -100.0
    torch.testing.assert_close(focal(logits, one_hot, gamma, alpha), values)


def test_focal_without_focus_is_cross_entropy(logits, hard) -> None:
    torch.testing.assert_close(mean_of(Focal(gamma=0.0), logits, hard), mean_of(CrossEntropy(), logits, hard))


# ---- squared error and divergence -----------------------------------------------------------------------------------


def test_squared_error_is_the_mean_over_labelled_rows_and_outputs(logits) -> None:
    one = torch.tensor([0.5, -100.0, 1.0, -3.0, 2.0, -100.0])
    expected = F.mse_loss(logits[[0, 2, 3, 4], 0], one[[0, 2, 3, 4]].double())
    torch.testing.assert_close(mean_of(MSE(), logits[:, :1], one), expected)
    many = torch.ones(6, 3)
    many[4] = -100.0
    many[5, 0] = -100.0  # only a whole row of -100 is unlabelled
    rows = [0, 1, 2, 3, 5]
    torch.testing.assert_close(mean_of(MSE(), logits, many), F.mse_loss(logits[rows], many[rows].double()))
    integers = torch.tensor([1, 2, 3, 4, 5, -100])
    torch.testing.assert_close(
        mean_of(MSE(), logits[:, :1], integers), F.mse_loss(logits[:5, 0], integers[:5].double())
    )


def test_kl_divergence_is_pytorchs_and_zero_at_the_labels(logits, soft) -> None:
    rows = [0, 1, 3, 4, 5]
    expected = F.kl_div(logits[rows].log_softmax(dim=1), soft[rows], reduction="batchmean")
    torch.testing.assert_close(mean_of(KLDivergence(), logits, soft), expected)
    torch.testing.assert_close(kl_divergence(logits, logits.softmax(dim=1)), torch.zeros(6, dtype=torch.float64))
    one_hot = F.one_hot(torch.arange(6) % 3, 3).double()  # 0 log 0 = 0
    torch.testing.assert_close(kl_divergence(logits, one_hot), cross_entropy(logits, one_hot))


# ---- all of them ----------------------------------------------------------------------------------------------------

FUNCTIONS = {
    "cross_entropy": lambda x, y: cross_entropy(x, y, WEIGHTS, 0.1),
    "focal": lambda x, y: focal(x, y, 2.0, WEIGHTS),
    "focal_half": lambda x, y: focal(x, y, 0.5),
    "kl_divergence": lambda x, y: kl_divergence(x, y),
    "squared_error": lambda x, y: squared_error(x, y),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_agree_with_finite_differences(name, logits, soft, hard) -> None:
    function = FUNCTIONS[name]
    assert torch.autograd.gradcheck(lambda x: function(x, soft), logits.requires_grad_())
    if name in ("cross_entropy", "focal", "focal_half"):
        assert torch.autograd.gradcheck(lambda x: function(x, hard), logits)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 60.0), (torch.float16, 5.0), (torch.bfloat16, 60.0)])
def test_values_and_gradients_stay_finite_for_large_logits(name, dtype, scale, soft) -> None:
    signs = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, 1.0], [-1.0, 1.0, 0.5]]).repeat(2, 1)
    logits = (scale * signs).to(dtype).requires_grad_()
    one_hot = F.one_hot(torch.tensor([0, 1, 0, 1, 2, 2]), 3).to(dtype)
    for labels in (one_hot, soft.to(dtype)):
        value = FUNCTIONS[name](logits, labels)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert value.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_half_precision_logits_are_computed_on_in_float32(name, logits, soft) -> None:
    half = logits.half()
    value = FUNCTIONS[name](half, soft)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), FUNCTIONS[name](half.double(), soft), rtol=1e-5, atol=1e-6)


def test_they_are_the_evaluation_loss(logits, hard, soft) -> None:
    class Net(nn.Module):
        def forward(self, x):
            return {"logits": x}

    for term, x, labels in (
        (CrossEntropy(), logits, hard), (Focal(), logits, hard), (KLDivergence(), logits, soft),
        (MSE(), logits[:, :1], torch.arange(6.0)),
    ):  # fmt: skip
        learner = Learner(Net(), [term], None).eval()
        loss = learner({"x": x, "labels": labels}).loss
        torch.testing.assert_close(loss, mean_of(term, x, labels))


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CrossEntropy(label_smoothing=1.0), r"label_smoothing must be in \[0, 1\), got 1.0"),
        (lambda: CrossEntropy(class_weights=[1, -1]), "class_weights must be one finite number >= 0 a class"),
        (lambda: CrossEntropy(class_weights=[math.nan, 1]), "class_weights must be one finite number"),
        (lambda: CrossEntropy(class_weights=[0, 0]), "not all 0"),
        (lambda: CrossEntropy(class_weights=[[1, 2]]), "class_weights must be one finite number"),
        (lambda: CrossEntropy(logit_adjustment=[3, 0, 0]), r"classes \[1, 2\] have 0"),
        (lambda: Focal(gamma=-1.0), "gamma must be >= 0 and finite, got -1.0"),
    ],
)
def test_arguments_out_of_range(make, message) -> None:
    with pytest.raises(TransferError, match=message):
        make()


@pytest.mark.parametrize(
    ("term", "labels", "message"),
    [
        (CrossEntropy(), None, "needs the rows' `labels` column"),
        (
            CrossEntropy(),
            torch.zeros(6),
            r"got labels torch.float32 of shape \(6,\) for logits of shape \(6, 3\).*MSE",
        ),
        (CrossEntropy(), torch.zeros(6, 4), r"of shape \(6, 4\) for logits of shape \(6, 3\)"),
        (CrossEntropy(), torch.zeros(6, 3).long(), r"Valid: class indices \(integers\) of shape \(6,\)"),
        (CrossEntropy(class_weights=[1, 2]), torch.zeros(6).long(), "class_weights of 2 classes, and the model has 3"),
        (CrossEntropy(logit_adjustment=[1] * 4), torch.zeros(6).long(), "logit_adjustment of 4 classes"),
        (Focal(alpha=[1, 2]), torch.zeros(6).long(), "alpha of 2 classes, and the model has 3"),
        (KLDivergence(), torch.zeros(6).long(), "needs soft labels.*use CrossEntropy"),
        (MSE(), torch.zeros(6), r"labels of shape \(6,\) for predictions of shape \(6, 3\).*task='regression'"),
    ],
)
def test_labels_that_do_not_fit_the_logits(term, labels, message) -> None:
    with pytest.raises(TransferError, match=message):
        term(step_of(torch.zeros(6, 3), labels))
