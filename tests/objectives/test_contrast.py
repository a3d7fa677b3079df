"""CRD against a plain transcription, and what its memory remembers."""

from __future__ import annotations

import io
import math

import pytest
import torch
import torch.nn.functional as F
from teaching import finite_with_gradient, normal, step_of

from hf_transfer.distillation.signal import TeacherSignal
from hf_transfer.errors import TransferError
from hf_transfer.objectives import CRD
from hf_transfer.objectives._layers import LayerPair
from hf_transfer.objectives.contrast import crd

N, K, M, D = 3, 6, 10, 4
IDS = torch.tensor([7, 0, 4])


def plain_crd(anchor, bank, ids, drawn, temperature, z):
    rows = []
    for i in range(len(anchor)):

        def h(j, i=i):
            e = math.exp(sum(a * b for a, b in zip(anchor[i], bank[j], strict=True)) / temperature) / z
            return e / (e + len(drawn[i]) / len(bank))

        rows.append(-math.log(h(ids[i])) - sum(math.log(1 - h(j)) for j in drawn[i]))
    return rows


@pytest.mark.parametrize(("temperature", "z"), [(0.07, 1.0), (0.5, 3.0)])
def test_it_is_the_papers_formula(temperature, z) -> None:
    anchor, bank = F.normalize(normal(N, D), dim=1), F.normalize(normal(M, D, seed=1), dim=1)
    drawn = torch.randint(M, (N, K), generator=torch.Generator().manual_seed(2))
    log_z = torch.tensor(math.log(z), dtype=torch.float64)
    value = crd(anchor, bank, IDS, drawn, temperature, log_z)
    expected = plain_crd(anchor.tolist(), bank.tolist(), IDS.tolist(), drawn.tolist(), temperature, z)
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)
    anchor.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: crd(x, bank, IDS, drawn, temperature, log_z), anchor)


def test_it_is_finite_for_confident_scores() -> None:
    anchor = F.normalize(normal(N, D).float(), dim=1).requires_grad_()
    bank = -F.normalize(normal(M, D, seed=1).float(), dim=1)
    bank[IDS] = -anchor.detach()
    drawn = torch.arange(M).expand(N, M)
    assert finite_with_gradient(crd(anchor, bank, IDS, drawn, 1e-3, torch.zeros(())), anchor)


def term_of(**arguments) -> CRD:
    torch.manual_seed(0)
    term = CRD(**{"size": M, "width": 5, "negatives": K, **arguments})
    term.connect([LayerPair("features", "features", (D,), (D + 2,))])
    return term


def step(seed: int = 0, ids=IDS):
    return step_of(
        teacher=TeacherSignal(features=normal(len(IDS), D + 2, seed=seed + 9).float()),
        features=normal(len(IDS), D, seed=seed).float(),
        example_id=ids,
    )


def test_both_directions_are_summed_over_the_same_draw() -> None:
    term = term_of()
    memory = term.memory.clone()
    at = step()
    s, t = F.normalize(term.embed[0](at.features), dim=1), F.normalize(term.embed[1](at.teacher.features), dim=1)
    torch.manual_seed(3)
    value = term(at)
    torch.manual_seed(3)
    drawn = torch.randint(M, (N, K))
    everything = torch.cat([IDS[:, None], drawn], dim=1)
    expected = torch.zeros(N)
    for anchor, bank, log_z in ((s, memory[1], term.log_z[0]), (t, memory[0], term.log_z[1])):
        z = (anchor[:, None] * bank[everything]).sum(2).div(0.07).exp().mean() * M  # the first batch's normaliser
        assert log_z.item() == pytest.approx(math.log(z.item()), rel=1e-5)
        expected = expected + crd(anchor, bank, IDS, drawn, 0.07, log_z)
    torch.testing.assert_close(value, expected)
    assert (term.weight, CRD(size=1).negatives, CRD(size=1).width, CRD(size=1).temperature) == (0.8, 16384, 128, 0.07)


def test_the_memory_moves_towards_the_rows_seen_and_z_stays() -> None:
    term = term_of(momentum=0.5)
    before = term.memory.clone()
    term(step())
    log_z = term.log_z.clone()
    for i, x in enumerate((step().features, step().teacher.features)):
        seen = F.normalize(term.embed[i](x), dim=1).detach()
        torch.testing.assert_close(term.memory[i, IDS], F.normalize(0.5 * before[i, IDS] + 0.5 * seen, dim=1))
    rest = [i for i in range(M) if i not in IDS.tolist()]
    assert torch.equal(term.memory[:, rest], before[:, rest])
    term(step(seed=1))
    assert torch.equal(term.log_z, log_z)


def test_both_embeddings_and_the_student_learn() -> None:
    term = term_of()
    at = step()
    at.features.requires_grad_()
    term(at).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in term.parameters())
    assert at.features.grad.abs().sum() > 0
    assert [tuple(layer.weight.shape) for layer in term.embed] == [(5, D), (5, D + 2)]


def test_a_student_that_knows_its_rows_has_a_lower_loss() -> None:
    term = term_of(negatives=64)
    optimizer = torch.optim.Adam(term.parameters(), 0.02)
    first = None
    for _ in range(60):
        loss = term(step()).mean()
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7 * first


def test_a_resumed_run_goes_on_as_it_would_have() -> None:
    term = term_of()
    term(step())
    file = io.BytesIO()
    torch.save(term.state_dict(), file)
    file.seek(0)
    other = term_of()
    other.load_state_dict(torch.load(file, weights_only=True))
    values = []
    for x in (term, other):
        torch.manual_seed(5)
        values.append(x(step(seed=1)))
    assert torch.equal(*values)
    assert torch.equal(term.memory, other.memory)


def test_maps_are_averaged_and_features_of_a_teacher_in_inference_mode_will_do() -> None:
    term = CRD(size=M, width=5, negatives=K, layers="last")
    term.connect([LayerPair("body", "trunk", (D, 2, 2), (D,))])
    with torch.inference_mode():
        teacher = TeacherSignal(hidden={"trunk": normal(N, D, seed=1).float()})
    value = term(step_of(teacher=teacher, hidden={"body": normal(N, D, 2, 2).float()}, example_id=IDS))
    value.sum().backward()
    assert value.shape == (N,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"negatives": 0}, "negatives must be at least 1"),
        ({"temperature": 0.0}, "temperature must be > 0 and momentum"),
        ({"momentum": 1.0}, r"momentum in \[0, 1\), got 0.07 and 1.0"),
    ],
)
def test_arguments_out_of_range(arguments, message) -> None:
    with pytest.raises(TransferError, match=message):
        CRD(**{"size": M, **arguments})


def test_rows_that_the_memory_cannot_place_are_refused() -> None:
    term = term_of()
    assert term.count({"example_id": IDS}) == N
    with pytest.raises(TransferError, match=r"keeps 10 rows, and a row has example_id 10.*size=largest"):
        term.count({"example_id": torch.tensor([1, 10])})
    with pytest.raises(TransferError, match="needs the rows' `example_id`"):
        term(step(ids=None))
    with pytest.raises(TransferError, match="compares one layer"):
        term.connect([LayerPair("a", "b", (1,), (1,)), LayerPair("c", "d", (1,), (1,))])
