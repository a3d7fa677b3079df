"""Step, Objective, schedules and Learner: one sum of terms, whose gradient does not depend on how a batch is cut."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_transfer.errors import TransferError
from hf_transfer.objective import (
    CosineSchedule,
    Learner,
    LinearSchedule,
    Objective,
    SigmoidSchedule,
    Step,
    logits_of,
    match_rows,
)
from hf_transfer.objectives import DANN, L2, CrossEntropy

HEAD = SimpleNamespace(classifiers=("head",))


class Net(nn.Module):
    """(N, 6) -> (N, 3), or (N, T, 6) -> (N, T, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return SimpleNamespace(logits=self.head(torch.tanh(self.body(x))))


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def rows(batch: dict, index) -> dict:
    return {name: value[index] for name, value in batch.items()}


def accumulate(learner: Learner, batch: dict, cut: list[int], processes: int = 1) -> dict[str, torch.Tensor]:
    """Gradients as an engine makes them: sums over micro-batches, means over processes."""
    learner.zero_grad()
    micro_batches = [rows(batch, index) for index in torch.arange(sum(cut)).split(cut)]
    per_process = len(micro_batches) // processes
    counted = [learner.counts(b) for b in micro_batches]
    counts = {name: sum(c[name] for c in counted) / processes for name in counted[0]}
    for micro_batch in micro_batches:
        signal = learner(micro_batch, progress=0.3, counts=counts, micro_batches=per_process)
        (signal.loss / processes).backward()
    return gradients(learner)


@pytest.fixture
def rows_batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.tensor([0, 2, 1, -100, -100, -100, -100, -100, 1, 1, 0, -100])  # source and target, unevenly
    return {"x": torch.randn(12, 6), "labels": labels, "domain": (labels == -100).long()}


@pytest.fixture
def token_batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(3, (12, 4))
    labels[torch.arange(12)[:, None] % 5 < torch.arange(4)] = -100  # 1 to 4 tokens a row
    return {"x": torch.randn(12, 4, 6), "labels": labels}


CUTS = [
    ([1, 11], 1),
    ([4, 4, 4], 1),
    ([3, 5, 4], 1),
    ([1] * 12, 1),
    ([6, 6], 2),
    ([3, 5, 3, 1], 2),
]  # (rows, processes)


@pytest.mark.parametrize(("cut", "processes"), CUTS)
@pytest.mark.parametrize("terms", ["cross_entropy", "class_weights", "dann"])
def test_gradients_do_not_depend_on_the_cut_of_a_batch_of_rows(rows_batch, terms, cut, processes) -> None:
    torch.manual_seed(1)
    made = {
        "cross_entropy": lambda: [CrossEntropy(label_smoothing=0.1)],
        "class_weights": lambda: [CrossEntropy(class_weights=[0.2, 1.0, 3.0])],
        "dann": lambda: [CrossEntropy(), DANN(hidden=(4,)), L2(weight=0.1)],
    }[terms]()
    learner = Learner(Net(), made, HEAD)
    whole = accumulate(learner, rows_batch, [12])
    torch.testing.assert_close(accumulate(learner, rows_batch, cut, processes), whole, rtol=1e-5, atol=1e-7)
    assert all(grad.abs().sum() > 0 for grad in whole.values())


@pytest.mark.parametrize(("cut", "processes"), CUTS)
def test_gradients_do_not_depend_on_the_cut_of_a_batch_of_tokens(token_batch, cut, processes) -> None:
    torch.manual_seed(1)
    learner = Learner(Net(), [CrossEntropy()], None)
    whole = accumulate(learner, token_batch, [12])
    torch.testing.assert_close(accumulate(learner, token_batch, cut, processes), whole, rtol=1e-5, atol=1e-7)


def test_the_whole_batch_is_the_mean_over_its_labelled_items(rows_batch, token_batch) -> None:
    torch.manual_seed(1)
    net = Net()
    for batch in (rows_batch, token_batch):
        logits, labels = net(batch["x"]).logits.double(), batch["labels"]
        expected = F.cross_entropy(logits.reshape(-1, 3), labels.reshape(-1), ignore_index=-100)
        batch = {"x": batch["x"], "labels": labels}
        torch.testing.assert_close(Learner(net, [CrossEntropy()], None)(batch).loss.double(), expected)


def test_each_terms_micro_batch_values_add_up_to_its_mean(rows_batch) -> None:
    torch.manual_seed(1)
    learner = Learner(Net(), [CrossEntropy(), L2(weight=0.1)], None)
    batch = {"x": rows_batch["x"], "labels": rows_batch["labels"]}
    whole = learner(batch)
    parts = [rows(batch, slice(0, 5)), rows(batch, slice(5, 12))]
    counts = {"cross_entropy": learner.counts(batch)["cross_entropy"]}
    cut = [learner(part, counts=counts, micro_batches=2) for part in parts]
    for name, value in whole.terms.items():
        torch.testing.assert_close(cut[0].terms[name] + cut[1].terms[name], value)
        assert not value.requires_grad
    torch.testing.assert_close(whole.loss, whole.terms["cross_entropy"] + 0.1 * whole.terms["l2"])


def test_a_batch_without_labelled_rows_has_a_loss_and_gradient_of_zero(rows_batch) -> None:
    learner = Learner(Net(), [CrossEntropy()], None)
    signal = learner({"x": rows_batch["x"], "labels": torch.full((12,), -100)})
    signal.loss.backward()
    assert signal.loss == 0
    assert all((grad == 0).all() for grad in gradients(learner).values())


def test_evaluation_sums_supervised_terms_only_and_none_without_labels(rows_batch) -> None:
    learner = Learner(Net(), [CrossEntropy(weight=2.0), L2(), DANN(hidden=())], HEAD).eval()
    without_domain = {"x": rows_batch["x"], "labels": rows_batch["labels"]}
    signal = learner(without_domain)
    assert list(signal.terms) == ["cross_entropy"]
    torch.testing.assert_close(signal.loss, 2 * signal.terms["cross_entropy"])
    unlabelled = learner({"x": rows_batch["x"]})
    assert unlabelled.loss is None
    assert unlabelled.terms == {}
    assert unlabelled.outputs.logits.shape == (12, 3)


def test_a_terms_parameters_train_and_travel_apart_from_the_model(rows_batch) -> None:
    torch.manual_seed(1)
    net, dann = Net(), DANN(hidden=(4,))
    learner = Learner(net, [CrossEntropy(), dann], HEAD)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    learner(rows_batch, progress=0.5).loss.backward()
    optimizer.step()
    own = [name for name in before if name.startswith("objectives.1.discriminator.")]
    assert len(own) == 4
    assert all(not torch.equal(learner.state_dict()[name], before[name]) for name in own)
    assert set(net.state_dict()) == set(Net().state_dict())


def test_weights_follow_progress(rows_batch) -> None:
    learner = Learner(Net(), [CrossEntropy(weight=LinearSchedule(1.0, 3.0)), L2(weight=0.0)], None)
    batch = {"x": rows_batch["x"], "labels": rows_batch["labels"]}
    for progress, weight in [(0.0, 1.0), (0.5, 2.0), (1.0, 3.0)]:
        signal = learner(batch, progress=progress)
        torch.testing.assert_close(signal.loss, weight * signal.terms["cross_entropy"])


class Probe(Objective):
    """Keeps the step it was given."""

    uses_features = True

    def forward(self, step: Step) -> torch.Tensor:
        self.step = step
        return step.logits.sum() * 0


def test_features_are_the_classifiers_input_and_contract_columns_stay_out_of_the_model(rows_batch) -> None:
    net, probe = Net(), Probe()
    batch = {**rows_batch, "example_id": torch.arange(12)}
    Learner(net, [probe], HEAD)(batch, progress=0.25)
    step = probe.step
    torch.testing.assert_close(step.features, torch.tanh(net.body(batch["x"])))
    assert set(step.inputs) == {"x"}
    assert step.progress == 0.25
    assert step.model is net
    assert torch.equal(step.example_id, batch["example_id"])


def test_features_need_a_classifier(rows_batch) -> None:
    for anatomy in (None, SimpleNamespace(classifiers=())):
        with pytest.raises(TransferError, match="no classifier was found in Net"):
            Learner(Net(), [Probe()], anatomy)(rows_batch)


def test_two_terms_of_one_name_are_refused_unless_told_apart() -> None:
    with pytest.raises(TransferError, match=r"share a name: \['cross_entropy', 'cross_entropy'\]"):
        Learner(Net(), [CrossEntropy(), CrossEntropy()], None)
    learner = Learner(Net(), [CrossEntropy(), CrossEntropy(name="smooth")], None)
    assert [term.name for term in learner.terms()] == ["cross_entropy", "smooth"]


def test_a_term_of_many_values_must_count_them(rows_batch) -> None:
    class Uncounted(Objective):
        def forward(self, step: Step) -> torch.Tensor:
            return step.logits.sum(dim=1)

    with pytest.raises(TransferError, match=r"'uncounted' returned values of shape \(12,\) but counts no items"):
        Learner(Net(), [Uncounted()], None)({"x": rows_batch["x"]})


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_must_be_finite(weight) -> None:
    with pytest.raises(TransferError, match="weight must be finite"):
        CrossEntropy(weight=weight)


def test_names_in_the_log_are_snake_case() -> None:
    class Log2Loss(Objective): ...

    assert [term.name for term in (CrossEntropy(), DANN(), Log2Loss())] == ["cross_entropy", "dann", "log2_loss"]


# ---- schedules ------------------------------------------------------------------------------------------------------


def test_schedules_have_their_closed_form() -> None:
    line = LinearSchedule(2.0, 4.0, begin=0.2, until=0.6)
    assert [line(p) for p in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx([2.0, 2.0, 3.0, 4.0, 4.0])
    cosine = CosineSchedule(1.0, 0.0)
    assert [cosine(p) for p in (0.0, 0.5, 1.0, 1.5)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    sigmoid = SigmoidSchedule(peak=2.0)
    assert [sigmoid(p) for p in (0.0, 0.1, 1.0)] == pytest.approx([0.0, 2 * math.tanh(0.5), 2 * math.tanh(5.0)])


@pytest.mark.parametrize(("begin", "until"), [(0.5, 0.5), (0.8, 0.2), (-0.1, 1.0), (0.0, 1.1)])
def test_a_linear_schedule_needs_an_interval(begin, until) -> None:
    with pytest.raises(TransferError, match=f"begin={begin}, until={until}"):
        LinearSchedule(0.0, 1.0, begin, until)


# ---- Step -----------------------------------------------------------------------------------------------------------


def step_of(batch: dict, **more) -> Step:
    return Step(
        model=nn.Identity(), inputs={"x": batch["x"], "scale": torch.tensor([2.0])}, outputs=None,
        logits=torch.arange(36.0).view(12, 3), labels=batch["labels"], domain=batch.get("domain"), **more,
    )  # fmt: skip


def test_source_and_target_cut_every_column_alike(rows_batch) -> None:
    step = step_of(rows_batch, features=torch.arange(12.0)[:, None], example_id=torch.arange(12), progress=0.5)
    for part, domain in ((step.source, 0), (step.target, 1)):
        index = (rows_batch["domain"] == domain).nonzero().flatten()
        assert torch.equal(part.example_id, index)
        assert torch.equal(part.logits, step.logits[index])
        assert torch.equal(part.labels, rows_batch["labels"][index])
        assert torch.equal(part.features[:, 0], index.float())
        assert torch.equal(part.inputs["x"], rows_batch["x"][index])
        assert torch.equal(part.inputs["scale"], torch.tensor([2.0]))
        assert part.progress == 0.5
    assert len(step.source.logits) + len(step.target.logits) == 12


def test_source_without_a_domain_column_names_the_fix(rows_batch) -> None:
    del rows_batch["domain"]
    with pytest.raises(TransferError, match=r"splits.combine"):
        _ = step_of(rows_batch).source


def test_labelled_rows_of_every_kind_of_label(rows_batch) -> None:
    step = step_of(rows_batch)
    assert torch.equal(step.labelled, rows_batch["labels"] != -100)
    tokens = torch.full((12, 4), -100)
    tokens[3, 2] = 1
    soft = torch.full((12, 3), -100.0)
    soft[3] = torch.tensor([0.0, 0.4, 0.6])
    for labels in (tokens, soft):
        assert step_of({**rows_batch, "labels": labels}).labelled.nonzero().flatten().tolist() == [3]
    assert not step_of({**rows_batch, "labels": None}).labelled.any()


# ---- logits and features of any model -------------------------------------------------------------------------------


def test_logits_of_whatever_a_model_returns() -> None:
    logits = torch.ones(2, 3)
    for outputs in (logits, {"logits": logits}, (logits, "more"), SimpleNamespace(logits=logits)):
        assert logits_of(outputs) is logits


def test_features_match_the_rows_of_the_logits() -> None:
    torch.manual_seed(0)
    rows_logits, token_logits = torch.zeros(2, 3), torch.zeros(2, 4, 3)
    features = torch.randn(2, 4, 5)
    assert torch.equal(match_rows(features[:, 0], rows_logits, None), features[:, 0])
    assert torch.equal(match_rows(features, token_logits, None), features)
    right_padded = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    left_padded = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert torch.equal(match_rows(features, rows_logits, right_padded), features[[0, 1], [1, 3]])
    assert torch.equal(match_rows(features, rows_logits, left_padded), features[[0, 1], [3, 3]])
    assert torch.equal(match_rows(features, rows_logits, None), features[:, -1])
    assert torch.equal(match_rows(features[:, 0, :, None, None], rows_logits, None), features[:, 0])
