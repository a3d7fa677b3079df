"""The teacher's signal: dense logits, the largest with the mass of all others, and what is cut where."""

from __future__ import annotations

import pytest
import torch

from hf_transfer.distillation.signal import TeacherSignal, TopLogits
from hf_transfer.errors import TransferError

N, C, K = 4, 7, 3


@pytest.fixture
def teacher() -> torch.Tensor:
    return 3 * torch.randn(N, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def student() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, C, generator=generator, dtype=torch.float64).requires_grad_()


def test_dense_logits_give_both_distributions(teacher, student) -> None:
    p, q = TeacherSignal(logits=teacher).log_probs(student, 2.0)
    torch.testing.assert_close(p, (teacher / 2).log_softmax(1))
    torch.testing.assert_close(q, (student / 2).log_softmax(1))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("shape", [(N,), (2, 2)])
def test_the_largest_and_all_others_are_exact_events_at_each_stored_temperature(
    teacher, student, temperature, shape
) -> None:
    top = TopLogits.of(teacher.view(*shape, C), K, temperatures=[1.0, 4.0])
    for got, logits in zip(
        TeacherSignal(top=top).log_probs(student.view(*shape, C), temperature), (teacher, student), strict=True
    ):
        for i in range(N):
            chosen = teacher[i].argsort(descending=True)[:K]
            p = (logits[i] / temperature).exp() / (logits[i] / temperature).exp().sum()
            expected = torch.cat([p[chosen], 1 - p[chosen].sum(dim=0, keepdim=True)]).log()
            torch.testing.assert_close(got.view(N, K + 1)[i], expected)


def test_the_gradient_through_the_events_is_right(teacher, student) -> None:
    signal = TeacherSignal(top=TopLogits.of(teacher, K))
    assert torch.autograd.gradcheck(lambda x: signal.log_probs(x)[1], student)


def test_all_but_one_and_only_one_can_be_stored(teacher, student) -> None:
    for k in (1, C - 1):
        p, q = TeacherSignal(top=TopLogits.of(teacher, k)).log_probs(student)
        torch.testing.assert_close(p.exp().sum(1), torch.ones(N, dtype=torch.float64))
        torch.testing.assert_close(q.exp().sum(1), torch.ones(N, dtype=torch.float64))
    dense, events = (
        s.log_probs(student) for s in (TeacherSignal(teacher), TeacherSignal(top=TopLogits.of(teacher, C - 1)))
    )
    torch.testing.assert_close(events[1].sort(1)[0], dense[1].sort(1)[0])  # C - 1 and the one left are all classes


def test_storage_in_half_precision_and_int16_stays_finite(teacher, student) -> None:
    top = TopLogits.of(60 * teacher, K).each(lambda x: x.half() if x.is_floating_point() else x.short())
    p, q = TeacherSignal(top=top).log_probs(60 * student)
    assert p.dtype == torch.float32
    assert p.isfinite().all()
    assert q.isfinite().all()
    assert torch.autograd.grad(q.sum(), student)[0].isfinite().all()


def test_the_events_are_a_lower_bound_of_all_classes_with_their_minimum(teacher, student) -> None:
    def divergence(signal):
        p, q = signal.log_probs(student)
        return (p.exp() * (p - q)).sum(1)

    lumped, full = divergence(TeacherSignal(top=TopLogits.of(teacher, K))), divergence(TeacherSignal(teacher))
    assert (lumped < full).all()
    p, q = TeacherSignal(top=TopLogits.of(teacher, K)).log_probs(teacher)
    torch.testing.assert_close(p, q)


def test_rows_cut_everything_and_predictions_the_logits_only(teacher) -> None:
    signal = TeacherSignal(
        logits=None,
        top=TopLogits.of(teacher, K, [2.0]),
        features=torch.rand(N, 2),
        hidden={"block": torch.rand(N, 3, 2)},
    )
    mask = torch.tensor([True, False, True, False])
    rows = signal.rows(mask)
    assert torch.equal(rows.top.values, signal.top.values[mask])
    assert torch.equal(rows.top.tails[2.0], signal.top.tails[2.0][mask])
    assert torch.equal(rows.features, signal.features[mask])
    assert torch.equal(rows.hidden["block"], signal.hidden["block"][mask])
    predictions = signal.predictions(mask)
    assert torch.equal(predictions.top.indices, signal.top.indices[mask])
    assert predictions.contents() == ["top"]
    assert predictions.logits_shape == (2, C)
    assert TeacherSignal(teacher).logits_shape == (N, C)
    assert TeacherSignal().logits_shape is None
    assert signal.contents() == ["top", "features", "block"]
    assert signal.to("meta").hidden["block"].device.type == "meta"
    assert TeacherSignal(teacher).rows(mask).logits.shape == (2, C)


def test_bad_input_is_named(teacher, student) -> None:
    with pytest.raises(TransferError, match=r"k must be in \[1, 6\] for 7 classes, got 7"):
        TopLogits.of(teacher, C)
    signal = TeacherSignal(top=TopLogits.of(teacher, K, [1.0, 4.0]))
    with pytest.raises(TransferError, match=r"temperatures \[1.0, 4.0\], and a term asks at 2.0"):
        signal.log_probs(student, 2.0)
    with pytest.raises(TransferError, match=r"no logits; it has \['features'\]"):
        TeacherSignal(features=torch.zeros(1, 1)).log_probs(student)
