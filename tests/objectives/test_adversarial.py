"""DANN: what reverses, what trains, and what it does not read."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_transfer.anatomy import Anatomy
from hf_transfer.errors import TransferError
from hf_transfer.objective import Learner, LinearSchedule, Step
from hf_transfer.objectives import DANN, CrossEntropy
from hf_transfer.objectives.adversarial import gradient_reversal

HEAD = SimpleNamespace(classifiers=("head",))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return SimpleNamespace(logits=self.head(torch.tanh(self.body(x))))


def dann(**arguments) -> DANN:
    """Prepared on Net."""
    term = DANN(**{"hidden": (8,), **arguments})
    net = Net()
    torch.manual_seed(1)
    term.prepare(net, HEAD)
    return term


def step_of(features: torch.Tensor, domain, progress: float = 1.0, labels: torch.Tensor | None = None) -> Step:
    domain = None if domain is None else torch.tensor(domain)
    return Step(nn.Identity(), {}, None, logits=torch.zeros(len(features), 3), labels=labels, features=features,
                domain=domain, progress=progress)  # fmt: skip


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(2)).requires_grad_()


def test_reversal_is_the_identity_whose_gradient_is_times_minus_lambda() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = gradient_reversal(x, 0.7)
    assert torch.equal(y, x)
    weights = torch.randn(3, 4, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((y.sin() * weights).sum(), x)
    torch.testing.assert_close(gradient, -0.7 * weights * x.cos().detach(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("hidden", [(), (8,), (8, 6)])
def test_the_discriminator_learns_while_the_features_get_minus_lambda_times_its_gradient(features, hidden) -> None:
    term = dann(hidden=hidden, schedule=0.3)
    domain = [0, 1, 1, 0]
    value = term(step_of(features, domain)).sum()
    parameters = list(term.discriminator.parameters())
    reversed_, *own = torch.autograd.grad(value, [features, *parameters])
    plain = F.cross_entropy(term.discriminator(features), torch.tensor(domain), reduction="sum")
    straight, *own_straight = torch.autograd.grad(plain, [features, *parameters])
    assert torch.equal(reversed_, -0.3 * straight)
    assert straight.abs().sum() > 0
    for gradient, expected in zip(own, own_straight, strict=True):
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradient, expected)


def test_a_discriminator_that_cannot_tell_costs_log_2_a_row(features) -> None:
    term = dann()
    for p in term.discriminator.parameters():
        nn.init.zeros_(p)
    torch.testing.assert_close(term(step_of(features, [0, 1, 1, 0])), torch.full((4,), math.log(2)))


def test_two_domains_are_logistic_regression_on_the_difference(features) -> None:
    term = dann()
    logits = term.discriminator(features)
    expected = F.binary_cross_entropy_with_logits(
        logits[:, 1] - logits[:, 0], torch.tensor([0.0, 1.0, 1.0, 0.0]), reduction="none"
    )
    torch.testing.assert_close(term(step_of(features, [0, 1, 1, 0])), expected)


def test_lambda_depends_on_progress_alone(features) -> None:
    term = dann()  # the paper's schedule
    straight = torch.autograd.grad(
        F.cross_entropy(term.discriminator(features), torch.tensor([0, 1, 1, 0]), reduction="sum"), features
    )[0]
    for progress in (0.0, 0.5, 0.1, 0.5):  # no order, no memory
        (gradient,) = torch.autograd.grad(term(step_of(features, [0, 1, 1, 0], progress)).sum(), features)
        torch.testing.assert_close(gradient, -math.tanh(5 * progress) * straight)
    assert all(name.startswith("discriminator.") for name in term.state_dict())
    assert dann(schedule=LinearSchedule(0.0, 2.0)).lambda_at(0.25) == 0.5


def test_rows_without_a_domain_are_left_out(features) -> None:
    term = dann()
    domain = torch.tensor([0, -100, 1, -100])
    value = term(step_of(features, domain.tolist()))
    assert (value == 0).tolist() == [False, True, False, True]
    assert term.count({"domain": domain}) == 2
    gradient = torch.autograd.grad(value.sum(), features)[0]
    assert gradient.abs().sum(dim=1).gt(0).tolist() == [True, False, True, False]


def test_labels_do_not_matter() -> None:
    torch.manual_seed(3)
    x, domain = torch.randn(6, 6), torch.tensor([0, 0, 0, 1, 1, 1])
    values = []
    for labels in ([0, 1, 2, -100, -100, -100], [2, 1, 0, 1, 1, 1]):
        torch.manual_seed(4)
        learner = Learner(Net(), [CrossEntropy(), DANN(hidden=(8,))], HEAD)
        signal = learner({"x": x, "labels": torch.tensor(labels), "domain": domain}, progress=0.5)
        values.append(signal.terms["dann"])
    assert torch.equal(*values)


def test_more_domains(features) -> None:
    term = dann(num_domains=4)
    value = term(step_of(features, [3, 1, 2, 0]))
    torch.testing.assert_close(
        value, F.cross_entropy(term.discriminator(features), torch.tensor([3, 1, 2, 0]), reduction="none")
    )
    assert term.count({"domain": torch.tensor([3, 1, 2, 0])}) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_of_a_half_precision_model(features, dtype) -> None:
    term = dann()
    value = term(step_of(features.detach().to(dtype), [0, 1, 1, 0]))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, term(step_of(features, [0, 1, 1, 0])), rtol=0.05, atol=0.05)


# ---- its size comes from the anatomy --------------------------------------------------------------------------------


CONVOLUTIONAL = nn.Sequential(nn.Conv2d(3, 7, 1), nn.Conv2d(7, 2, 1))
NESTED = nn.ModuleDict({"head": nn.ModuleDict({"fc": nn.Linear(5, 3)})})


@pytest.mark.parametrize(
    ("model", "classifier", "width"),
    [(Net(), "head", 5), (CONVOLUTIONAL, "1", 7), (NESTED, "head.fc", 5)],
)
def test_the_discriminator_reads_the_classifiers_input(model, classifier, width) -> None:
    term = DANN(hidden=(8,))
    term.prepare(model, SimpleNamespace(classifiers=(classifier,)))
    assert [tuple(p.shape) for p in term.discriminator.parameters()] == [(8, width), (8,), (2, 8), (2,)]


@pytest.mark.parametrize("wrap", ["modules_to_save", "target"])
def test_the_discriminator_fits_a_model_with_an_adapter(wrap) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]) if wrap == "modules_to_save" else (
        LoraConfig(r=2, target_modules=["body", "head"])
    )  # fmt: skip
    plain = Net()
    anatomy = Anatomy.of(plain)
    model = get_peft_model(plain, config)
    torch.manual_seed(5)
    learner = Learner(model, [DANN(hidden=(8,))], anatomy)
    batch = {"x": torch.randn(4, 6), "domain": torch.tensor([0, 1, 0, 1])}
    learner(batch, progress=0.5).loss.backward()
    assert next(learner.objectives[0].discriminator.parameters()).shape == (8, 5)
    assert next(learner.objectives[0].discriminator.parameters()).grad.abs().sum() > 0
    adapter = model.get_parameter("base_model.model.body.lora_B.default.weight")
    assert adapter.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("model", "anatomy", "found"),
    [
        (Net(), None, "found no classifier in Net"),
        (Net(), SimpleNamespace(classifiers=()), "found no classifier in Net"),
        (nn.ModuleDict({"head": nn.ReLU()}), HEAD, "found 'head', a ReLU without in_features"),
    ],
)
def test_a_model_without_a_classifier_is_refused(model, anatomy, found) -> None:
    with pytest.raises(TransferError, match=found):
        DANN().prepare(model, anatomy)


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_a_domain_out_of_range_is_named() -> None:
    with pytest.raises(TransferError, match=r"rows of domain \[-1, 2, 7\]. Valid: 0 to 1, and -100 for none"):
        dann().count({"domain": torch.tensor([7, 0, -100, 2, 7, -1])})


def test_a_batch_without_domains_is_refused_in_training(features) -> None:
    assert dann().count({"labels": torch.zeros(4)}) == 0  # an evaluation batch has none
    with pytest.raises(TransferError, match=r"splits.combine"):
        dann()(step_of(features, None))


def test_token_features_are_refused() -> None:
    with pytest.raises(TransferError, match=r"one feature vector a row, \(N, D\), got \(4, 7, 5\)"):
        dann()(step_of(torch.zeros(4, 7, 5), [0, 1, 1, 0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_domains": 1}, "num_domains must be at least 2, got 1"), ({"hidden": (8, 0)}, r"got \[8, 0\]")],
)
def test_arguments_out_of_range(arguments, message) -> None:
    with pytest.raises(TransferError, match=message):
        DANN(**arguments)
