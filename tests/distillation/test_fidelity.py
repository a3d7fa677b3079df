"""Fidelity against closed forms and a plain loop in float64: in one call, in batches, across processes, of tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_transfer.distillation import fidelity as module
from hf_transfer.distillation.fidelity import Fidelity, gain_recovered, miscalibrated
from hf_transfer.errors import TransferError
from hf_transfer.evaluation.calibration import expected_calibration_error, negative_log_likelihood


def batch(n: int = 40, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """float64 logits of student and teacher, labels of which some are -100."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(n, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(classes, (n,), generator=generator)
    labels[::7] = -100
    return student, teacher + student, labels


def measured(*arguments: Tensor | None, regression: bool = False) -> dict[str, float]:
    fidelity = Fidelity(regression=regression)
    fidelity.update(*arguments)  # type: ignore[arg-type]
    return fidelity.result()


def plain_loop(student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, float]:
    """Item by item from probabilities, in NumPy."""
    q, p = (np.exp(x.numpy()) / np.exp(x.numpy()).sum(axis=1, keepdims=True) for x in (student, teacher))
    known = [i for i, label in enumerate(labels.tolist()) if label >= 0]
    expected = {
        "agreement": np.mean([q[i].argmax() == p[i].argmax() for i in range(len(p))]),
        "kl": np.mean([sum(a * math.log(a / b) for a, b in zip(p[i], q[i], strict=True)) for i in range(len(p))]),
    }
    for name, x in (("student", q), ("teacher", p)):
        expected[f"{name}_accuracy"] = np.mean([x[i].argmax() == labels[i] for i in known])
        expected[f"{name}_nll"] = np.mean([-math.log(x[i][labels[i]]) for i in known])
    return {name: float(value) for name, value in expected.items()}


def test_measures_are_those_of_a_plain_loop() -> None:
    student, teacher, labels = batch()
    result = measured(student, teacher, labels)
    for name, value in plain_loop(student, teacher, labels).items():
        assert result.pop(name) == pytest.approx(value, rel=1e-9), name
    assert result.pop("student_ece") == pytest.approx(float(expected_calibration_error(student, labels)), rel=1e-9)
    assert result.pop("teacher_ece") == pytest.approx(float(expected_calibration_error(teacher, labels)), rel=1e-9)
    assert result == {}


def test_by_hand() -> None:
    """Teacher (3/4, 1/4) and (1/2, 1/2), student (1/2, 1/2) and (1/4, 3/4); only the first row has a label."""
    teacher = torch.tensor([[3.0, 1.0], [1.0, 1.0]], dtype=torch.float64).log()
    student = torch.tensor([[1.0, 1.0], [1.0, 3.0]], dtype=torch.float64).log()
    result = measured(student, teacher, torch.tensor([0, -100]))
    kl = (3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2) + 1 / 2 * math.log(2) + 1 / 2 * math.log(2 / 3)) / 2
    assert result == pytest.approx(
        {
            "agreement": 0.5,
            "kl": kl,
            "student_accuracy": 1.0,
            "teacher_accuracy": 1.0,
            "student_nll": math.log(2),
            "teacher_nll": math.log(4 / 3),
            "student_ece": 0.5,
            "teacher_ece": 0.25,
        },
        rel=1e-12,
    )


def test_the_teacher_itself_is_its_perfect_student() -> None:
    _, teacher, labels = batch()
    result = measured(teacher, teacher, labels)
    assert result["agreement"] == 1.0
    assert result["kl"] == 0.0
    assert result["student_ece"] == result["teacher_ece"]


def test_batches_and_processes_add_up() -> None:
    student, teacher, labels = batch(50)
    whole = measured(student, teacher, labels)
    halves = [Fidelity(), Fidelity(), Fidelity()]  # the third process got no batch
    for start in range(0, 50, 8):
        part = slice(start, start + 8)
        halves[start // 8 % 2].update(student[part], teacher[part], labels[part])
    states = [half.state() for half in halves]
    assert all(state.dtype == torch.float64 and state.dim() == 1 for state in states)
    assert Fidelity().result(sum(states[1:], states[0])) == pytest.approx(whole, rel=1e-12)
    assert halves[0].result() != pytest.approx(whole, rel=1e-3)


def test_large_vocabularies_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, labels = batch(50)
    whole = measured(student, teacher, labels)
    seen: list[int] = []
    widen = module._log_probabilities
    monkeypatch.setattr(module, "CHUNK", 35)
    monkeypatch.setattr(module, "_log_probabilities", lambda x, name: (seen.append(x.numel()), widen(x, name))[1])
    assert measured(student, teacher, labels) == pytest.approx(whole, rel=1e-12)
    assert max(seen) <= 35


def test_tokens_count_where_they_have_a_label() -> None:
    student, teacher, labels = batch(40)
    labels = labels.clamp(min=0)
    rows = measured(student, teacher, labels)
    tokens = [torch.full((8, 7, 5), torch.nan, dtype=torch.float64) for _ in range(2)]  # padding may hold anything
    padded = torch.full((8, 7), -100)
    for into, values in ((tokens[0], student), (tokens[1], teacher), (padded, labels)):
        into[:, 1:6] = values.view(8, 5, *values.shape[1:])
    assert measured(*tokens, padded) == pytest.approx(rows, rel=1e-12)
    assert measured(tokens[0], tokens[1], torch.full((8, 7), -100)) == {}


def test_without_labels_agreement_and_divergence_remain() -> None:
    student, teacher, labels = batch()
    expected = plain_loop(student, teacher, labels)
    assert measured(student, teacher) == pytest.approx({k: expected[k] for k in ("agreement", "kl")}, rel=1e-9)
    assert measured(student, teacher, torch.full((40,), -100)).keys() == {"agreement", "kl"}
    assert Fidelity().result() == {}


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 5), (torch.bfloat16, 5), (torch.float32, 60)])
def test_saturated_logits_lose_nothing(dtype: torch.dtype, scale: float) -> None:
    student, teacher, labels = batch()
    rounded = [(logits * scale).to(dtype) for logits in (student, teacher)]
    expected = measured(*(logits.double() for logits in rounded), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = measured(*rounded, labels)
    assert all(map(math.isfinite, result.values()))
    assert result == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_classes_that_the_teacher_excludes_add_nothing() -> None:
    student, teacher, labels = batch()
    labels[labels == 4] = 0
    teacher[:, 4] = -torch.inf
    q, p = student.softmax(dim=1), teacher.softmax(dim=1)
    expected = float((p[:, :4] * (p[:, :4].log() - q[:, :4].log())).sum(dim=1).mean())
    assert measured(student, teacher, labels)["kl"] == pytest.approx(expected, rel=1e-9)


def test_sums_lose_nothing_over_many_batches() -> None:
    """In float32 ten thousand batches after 2^24 items would count for nothing."""
    student, teacher, labels = batch(8, seed=1)
    labels = labels.clamp(min=0)
    fidelity = Fidelity()
    fidelity.update(student, teacher, labels)
    state = fidelity.state() * 2**24
    one = fidelity.state()
    assert float((state + one - state).sum()) == pytest.approx(float(one.sum()), rel=1e-6)
    fidelity.update(student.float(), teacher.float(), labels)
    assert fidelity.result()["student_nll"] == pytest.approx(float(negative_log_likelihood(student, labels)), rel=1e-6)


def test_regression_by_hand() -> None:
    student, teacher = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[2.0], [2.0], [1.0]])
    labels = torch.tensor([2.0, 4.0, -100.0])
    expected = {"student_teacher_mse": (1 + 0 + 9) / 3, "student_mse": (1 + 4) / 2, "teacher_mse": (0 + 4) / 2}
    assert measured(student, teacher, labels) == pytest.approx(expected)
    assert measured(student, teacher, labels[:, None]) == pytest.approx(expected)
    assert measured(student, teacher) == pytest.approx({"student_teacher_mse": 10 / 3})


def test_regression_of_several_outputs() -> None:
    student, teacher = torch.tensor([[1.0, 0.0], [2.0, 2.0]]), torch.tensor([[1.0, 2.0], [2.0, 2.0]])
    labels = torch.tensor([[0.0, 0.0], [-100.0, -100.0]])
    expected = {"student_teacher_mse": 1.0, "student_mse": 0.5, "teacher_mse": 2.5}
    assert measured(student, teacher, labels, regression=True) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("student", "teacher", "labels", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), None, r"\(2, 3\) and teacher logits \(2, 4\) must both be"),
        (torch.zeros(3), torch.zeros(3), None, r"must both be \(N, C\) or \(N, T, C\)"),
        (torch.zeros(2, 4, 3), torch.zeros(2, 4, 3), None, r"tokens came without labels.*logits\[attention_mask"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 3]), "Label 3 is not a class: ids are 0 to 2"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), "must be one class id"),
        (torch.full((2, 3), torch.nan), torch.zeros(2, 3), None, "The student's predictions hold NaN"),
        (torch.zeros(2, 3), torch.full((2, 3), torch.inf), None, "The teacher's predictions hold NaN or infinity"),
        (torch.zeros(2, 1), torch.full((2, 1), torch.nan), None, "The teacher's predictions hold NaN"),
        (torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(3), r"\(2, 1\) do not fit labels \(3,\)"),
    ],
)
def test_bad_input_is_refused(student: Tensor, teacher: Tensor, labels: Tensor | None, message: str) -> None:
    with pytest.raises(TransferError, match=message):
        Fidelity().update(student, teacher, labels)


def test_gain_recovered() -> None:
    assert gain_recovered(0.85, teacher=0.9, baseline=0.8) == pytest.approx(0.5)
    assert gain_recovered(0.75, teacher=0.9, baseline=0.8) == pytest.approx(-0.5)
    assert gain_recovered(0.3, teacher=0.2, baseline=0.6, higher_is_better=False) == pytest.approx(0.75)
    for score in (0.8, 0.7, math.nan):
        assert math.isnan(gain_recovered(0.9, teacher=score, baseline=0.8))
    assert math.isnan(gain_recovered(0.3, teacher=0.7, baseline=0.6, higher_is_better=False))


def test_miscalibration_is_a_sentence() -> None:
    sentence = miscalibrated(0.2, 0.03)
    assert sentence is not None
    assert "0.200, the teacher's 0.030 (flagged above 0.05 and 0.02 beyond the teacher's)" in sentence
    assert miscalibrated(0.049, 0.0) is None  # small
    assert miscalibrated(0.2, 0.19) is None  # learned from the teacher
    assert miscalibrated(0.06, 0.03) is not None
