"""ReviewKD: the loss over scales against a plain transcription, and the review itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from teaching import finite_with_gradient, normal, step_of

from hf_transfer.distillation.signal import TeacherSignal
from hf_transfer.errors import TransferError
from hf_transfer.objectives import ReviewKD
from hf_transfer.objectives._layers import LayerPair
from hf_transfer.objectives.review import hierarchical_context

N = 2
SHAPES = [((2, 8, 8), (3, 8, 8)), ((4, 4, 4), (6, 2, 2)), ((5,), (7,))]  # student, teacher


def plain_context(s, t):
    rows = []
    for i in range(len(s)):
        height = s.shape[2]
        loss, total, weight = ((s[i] - t[i]) ** 2).mean(), 1.0, 1.0
        for size in (4, 2, 1):
            if size < height:
                weight, step = weight / 2, height // size
                blocks = [
                    (
                        (s[i] - t[i])[:, a * step : (a + 1) * step, b * step : (b + 1) * step].mean(axis=(1, 2)) ** 2
                    ).mean()
                    for a in range(size)
                    for b in range(size)
                ]
                loss, total = loss + weight * np.mean(blocks), total + weight
        rows.append(loss / total)
    return rows


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_loss_over_scales_by_its_formula(size) -> None:
    s, t = normal(N, 3, size, size), normal(N, 3, size, size, seed=1)
    expected = torch.tensor(np.array(plain_context(s.numpy(), t.numpy())))
    torch.testing.assert_close(hierarchical_context(s, t), expected)
    assert hierarchical_context(s, s).abs().sum() == 0
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: hierarchical_context(x, t), s)


def test_the_loss_over_scales_is_finite_in_half_precision() -> None:
    s = (1e3 * normal(N, 3, 8, 8)).half().requires_grad_()
    assert finite_with_gradient(hierarchical_context(s, -s.detach()), s)


def term_of(shapes=SHAPES) -> ReviewKD:
    torch.manual_seed(0)
    term = ReviewKD()
    term.connect([LayerPair(f"s{i}", f"t{i}", *pair) for i, pair in enumerate(shapes)])
    return term.double()


def step(shapes=SHAPES):
    s = {f"s{i}": normal(N, *pair[0], seed=i).requires_grad_() for i, pair in enumerate(shapes)}
    t = {f"t{i}": normal(N, *pair[1], seed=10 + i) for i, pair in enumerate(shapes)}
    return step_of(teacher=TeacherSignal(hidden=t), hidden=s)


def test_each_layer_is_reviewed_with_those_after_it_and_none_before() -> None:
    term, at = term_of(), step()
    fusions = list(term.fusions)
    reviewed, later = fusions[2](at.hidden["s2"][..., None, None], None)
    expected = hierarchical_context(reviewed, at.teacher.hidden["t2"][..., None, None])
    for i in (1, 0):
        reviewed, later = fusions[i](at.hidden[f"s{i}"], later)
        expected = expected + hierarchical_context(reviewed, at.teacher.hidden[f"t{i}"])
    value = term(at)
    torch.testing.assert_close(value, expected)
    assert value.shape == (N,)
    deepest = hierarchical_context(
        fusions[2](at.hidden["s2"][..., None, None], None)[0], at.teacher.hidden["t2"][..., None, None]
    )
    gradients = torch.autograd.grad(deepest.sum(), list(at.hidden.values()), allow_unused=True)
    assert [g is None for g in gradients] == [True, True, False]
    shallow = hierarchical_context(reviewed, at.teacher.hidden["t0"])
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(shallow.sum(), list(at.hidden.values())))


def test_fusion_by_its_formula() -> None:
    term = term_of().eval()
    fusion = term.fusions[1]
    x, later = normal(N, 4, 4, 4), normal(N, 5, 1, 1, seed=1)
    out, handed_on = fusion(x, later)
    entered = fusion.enter(x)
    spread = later.expand(N, 5, 4, 4)
    logits = torch.einsum("oc,nchw->nohw", fusion.attend.weight[:, :, 0, 0], torch.cat([entered, spread], 1))
    share = 1 / (1 + (-(logits + fusion.attend.bias[:, None, None])).exp())
    mixed = entered * share[:, 0:1] + spread * share[:, 1:2]
    torch.testing.assert_close(handed_on, mixed[:, :, ::2, ::2])  # nearest, to the teacher's 2 x 2
    torch.testing.assert_close(out, fusion.leave(mixed[:, :, ::2, ::2]))


def test_modules_are_sized_by_the_layers_and_all_train() -> None:
    term = term_of()
    assert [fusion.enter[0].weight.shape[:2] for fusion in term.fusions] == [(5, 2), (5, 4), (5, 5)]
    assert [fusion.leave[0].weight.shape[:2] for fusion in term.fusions] == [(3, 5), (6, 5), (7, 5)]
    assert term.fusions[2].attend is None
    term(step()).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in term.fusions[0].parameters())
    assert ReviewKD(mid=3).mid == 3


def test_patches_are_a_map_and_tokens_of_a_sequence_are_refused() -> None:
    as_maps = [((4, 2, 2), (3, 8, 8)), ((6, 1, 1), (5, 2, 2))]
    as_tokens = [((5, 4), (3, 8, 8)), ((6, 1, 1), (4, 5))]  # a class token before 2 x 2 patches; patches alone
    term, other, at = term_of(as_maps), term_of(as_tokens), step(as_maps)
    maps, taught = at.hidden, at.teacher.hidden
    hidden = {**maps, "s0": torch.cat([normal(N, 1, 4), maps["s0"].flatten(2).transpose(1, 2)], dim=1)}
    signal = TeacherSignal(hidden={**taught, "t1": taught["t1"].flatten(2).transpose(1, 2)})
    torch.testing.assert_close(other(step_of(teacher=signal, hidden=hidden)), term(at))
    with pytest.raises(TransferError, match="34 tokens are no square grid"):
        term_of([((34, 4), (3, 8, 8))])
    text = step_of(teacher=signal, hidden=hidden, inputs={"attention_mask": torch.ones(N, 5)})
    with pytest.raises(TransferError, match="hold the tokens of a sequence"):
        other(text)
