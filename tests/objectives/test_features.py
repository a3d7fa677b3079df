"""Terms on hidden layers against plain transcriptions, and how layers of unlike shape come together."""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from teaching import finite_with_gradient, normal, step_of
from torch import nn

from hf_transfer.distillation.signal import TeacherSignal
from hf_transfer.errors import TransferError
from hf_transfer.objective import Learner
from hf_transfer.objectives import PKD, AttentionTransfer, Hint
from hf_transfer.objectives._layers import LayerPair, same_layout
from hf_transfer.objectives.features import attention_transfer, cosine_hint, hint, pkd

N, C, H, W = 3, 4, 2, 3


def plain_hint(s, t):
    return [sum((a - b) ** 2 for a, b in zip(s[i].ravel(), t[i].ravel(), strict=True)) / s[i].size for i in range(N)]


def plain_cosine(s, t):
    rows = []
    for i in range(N):
        cosines = []
        for y in range(H):
            for x in range(W):
                u, v = s[i, :, y, x], t[i, :, y, x]
                cosines.append(u @ v / math.sqrt((u @ u) * (v @ v)))
        rows.append(1 - sum(cosines) / len(cosines))
    return rows


def plain_attention(s, t, p=2):
    rows = []
    for i in range(N):
        maps = []
        for x in (s, t):
            q = np.array([sum(abs(x[i, c, a, b]) ** p for c in range(x.shape[1])) for a in range(H) for b in range(W)])
            maps.append(q / math.sqrt((q**2).sum()))
        rows.append(((maps[0] - maps[1]) ** 2).sum() / (H * W))
    return rows


def plain_pkd(s, t):
    total = 0.0
    for c in range(C):
        u, v = s[:, c].ravel(), t[:, c].ravel()
        u, v = (u - u.mean()) / u.std(), (v - v.mean()) / v.std()
        total += ((u - v) ** 2).sum() / (2 * u.size)
    return total / C


CASES = {
    "hint": (hint, plain_hint, C),
    "cosine_hint": (cosine_hint, plain_cosine, C),
    "attention_transfer": (attention_transfer, plain_attention, C + 2),
    "attention_transfer_1": (lambda s, t: attention_transfer(s, t, p=1.0), lambda s, t: plain_attention(s, t, 1), C),
    "pkd": (pkd, plain_pkd, C),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_papers_formula(name) -> None:
    function, plain, width = CASES[name]
    s, t = normal(N, C, H, W, seed=1), normal(N, width, H, W, seed=2)
    expected = torch.tensor(np.array(plain(s.numpy(), t.numpy())))
    torch.testing.assert_close(function(s, t), expected)
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, t), s)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e4), (torch.float16, 1e3)])
def test_it_is_finite_for_large_activations_and_for_dead_ones(name, dtype, scale) -> None:
    function = CASES[name][0]
    s, t = (normal(N, C, H, W, seed=seed, scale=scale).to(dtype).requires_grad_() for seed in (1, 2))
    value = function(s, t.detach())
    assert value.dtype == torch.float32
    assert finite_with_gradient(value, s)
    for dead in (0.0, 3.0):
        s = torch.full((N, C, H, W), dead, dtype=dtype, requires_grad=True)
        assert finite_with_gradient(function(s, t.detach()), s)


@pytest.mark.parametrize("name", CASES)
def test_it_is_zero_where_the_student_is_the_teacher(name) -> None:
    x = normal(N, C, H, W)
    x[:, 0] = 0  # a dead channel
    value = CASES[name][0](x, x)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)
    assert (CASES[name][0](x + normal(N, C, H, W, seed=1), x) > 0).all()


def test_pkd_ignores_scale_and_offset_of_channels_and_attention_transfer_the_scale_of_rows() -> None:
    s, t = normal(N, C, H, W), normal(N, C, H, W, seed=1)
    scale, offset = torch.rand(C, 1, 1) + 0.5, torch.randn(C, 1, 1)
    torch.testing.assert_close(pkd(s * scale + offset, t), pkd(s, t))
    torch.testing.assert_close(attention_transfer(s * torch.tensor([2.0, 3, 4])[:, None, None, None], t),
                               attention_transfer(s, t))  # fmt: skip


@pytest.mark.parametrize("function", [hint, cosine_hint, attention_transfer])
def test_padding_does_not_count(function) -> None:
    s, t = normal(2, 4, 5), normal(2, 4, 5, seed=1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    expected = torch.cat([function(s[:1, :3], t[:1, :3]), function(s[1:, :2], t[1:, :2])])
    torch.testing.assert_close(function(s, t, mask), expected)
    assert function(s, t, torch.zeros_like(mask)).tolist() == [0, 0]


# ---- layers of unlike shape -----------------------------------------------------------------------------------------


def pair(student: tuple[int, ...], teacher: tuple[int, ...], role: str = "hidden") -> LayerPair:
    return LayerPair("body", "trunk", student, teacher, role)


def test_a_larger_map_is_averaged_to_the_smaller() -> None:
    s, t = normal(N, 2, 4, 6), normal(N, 5, 2, 6, seed=1)
    a, b, mask = same_layout(s, t, pair((2, 4, 6), (5, 2, 6)), None)
    torch.testing.assert_close(a, s.view(N, 2, 2, 2, 6).mean(3))
    assert torch.equal(b, t)
    assert mask is None


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_patches_are_put_on_their_grid(prefix) -> None:
    grid = normal(N, 6, 4, 4)
    tokens = torch.cat([normal(N, prefix, 6, seed=1), grid.flatten(2).transpose(1, 2)], dim=1)
    convolutional = normal(N, 3, 4, 4, seed=2)
    shapes = ((16 + prefix, 6), (3, 4, 4))
    a, b, _ = same_layout(tokens, convolutional, pair(*shapes), None)
    assert torch.equal(a, grid)
    assert torch.equal(b, convolutional)
    a, b, _ = same_layout(convolutional, tokens, pair(*shapes[::-1]), None)
    assert torch.equal(b, grid)


def test_a_vector_meets_the_mean_over_positions_that_count() -> None:
    v, m, tokens = normal(N, 6), normal(N, 3, 4, 4, seed=1), normal(N, 3, 5, seed=2)
    assert torch.equal(same_layout(v, m, pair((6,), (3, 4, 4)), None)[1], m.mean((2, 3)))
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    mean = same_layout(v, tokens, pair((6,), (3, 5)), mask)[1]
    for i in range(N):
        torch.testing.assert_close(mean[i], tokens[i, : i + 1].mean(0))
    assert torch.equal(same_layout(v, tokens, pair((6,), (3, 5)), None)[1], tokens.mean(1))


def test_what_has_no_common_grid_is_refused() -> None:
    with pytest.raises(TransferError, match="34 tokens are no square grid of patches after at most 8 other"):
        same_layout(torch.zeros(1, 34, 2), torch.zeros(1, 2, 4, 4), pair((34, 2), (2, 4, 4)), None)
    mask = torch.ones(1, 17).bool()
    with pytest.raises(TransferError, match="tokens of a sequence, which have no grid"):
        same_layout(torch.zeros(1, 17, 2), torch.zeros(1, 26, 2), pair((17, 2), (26, 2)), mask)
    with pytest.raises(TransferError, match=r"tokens of shape \(1, 4\) and \(1, 5\)"):
        same_layout(torch.zeros(1, 4, 2), torch.zeros(1, 5, 2), pair((7, 2), (7, 2)), None)


# ---- terms ----------------------------------------------------------------------------------------------------------


def connected(term, *shapes):
    torch.manual_seed(0)
    term.connect([pair(*shapes)])
    return term.double()


def step(student, teacher, mask=None):
    inputs = {} if mask is None else {"attention_mask": mask}
    return step_of(teacher=TeacherSignal(hidden={"trunk": teacher}), hidden={"body": student}, inputs=inputs)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((2, 4, 4), (5, 4, 4)),
        ((2, 4, 4), (5, 2, 2)),
        ((3, 2), (3, 5)),
        ((17, 2), (5, 2, 2)),
        ((2,), (5,)),
        ((2,), (5, 2, 2)),
    ],
)
@pytest.mark.parametrize("make", [Hint, lambda: Hint(distance="cosine"), PKD])
def test_projectors_are_sized_by_the_layers_and_train(student, teacher, make) -> None:
    term = connected(make(), student, teacher)
    s, t = normal(N, *student).requires_grad_(), normal(N, *teacher, seed=1)
    value = term(step(s, t))
    assert value.shape == (() if isinstance(term, PKD) else (N,))
    value.sum().backward()
    widths = (student[0] if len(student) == 3 else student[-1], teacher[0] if len(teacher) == 3 else teacher[-1])
    assert [tuple(p.shape) for p in term.parameters()] == [widths[::-1], widths[-1:]]
    weight = term.projectors[0].linear.weight
    assert weight.grad.abs().sum() > 0
    assert s.grad.abs().sum() > 0


def test_a_projected_map_is_a_1x1_convolution() -> None:
    term = connected(Hint(), (2, 3, 3), (5, 3, 3))
    linear = term.projectors[0].linear
    s, t = normal(N, 2, 3, 3), normal(N, 5, 3, 3, seed=1)
    projected = nn.functional.conv2d(s, linear.weight[:, :, None, None], linear.bias)
    torch.testing.assert_close(term(step(s, t)), hint(projected, t))


def test_equal_widths_need_no_projector() -> None:
    for term in (Hint(), PKD()):
        connected(term, (C, H, W), (C, H, W))
        assert not list(term.parameters())
        x = normal(N, C, H, W)
        assert term(step(x, x)).abs().sum() < 1e-12
    at = connected(AttentionTransfer(), (C, H, W), (9, H, W))
    s, t = normal(N, C, H, W), normal(N, 9, H, W, seed=1)
    torch.testing.assert_close(at(step(s, t)), attention_transfer(s, t))
    assert at.weight == 1000
    assert not list(at.parameters())


@pytest.mark.parametrize("make", [Hint, AttentionTransfer, PKD])
def test_terms_leave_padding_out(make) -> None:
    term = connected(make(), (4, 5), (4, 5))
    s, t = normal(2, 4, 5), normal(2, 4, 5, seed=1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    noise = normal(2, 4, 5, seed=2) * (1 - mask)[..., None]
    torch.testing.assert_close(term(step(s + noise, t, mask)), term(step(s, t, mask)))
    assert not torch.allclose(term(step(s, t)), term(step(s, t, mask)))


def test_losses_of_layers_are_summed() -> None:
    pairs = [LayerPair(f"s{i}", f"t{i}", (C, H, W), (C, H, W)) for i in range(2)]
    s, t = ({f"{k}{i}": normal(N, C, H, W, seed=seed + i) for i in range(2)} for k, seed in (("s", 0), ("t", 5)))
    for make, function in ((Hint, hint), (AttentionTransfer, attention_transfer), (PKD, pkd)):
        term = make(layers={"s0": "t0", "s1": "t1"})
        term.connect(pairs)
        assert (term.student_layers, term.teacher_layers) == (("s0", "s1"), ("t0", "t1"))
        value = term(step_of(teacher=TeacherSignal(hidden=t), hidden=s))
        torch.testing.assert_close(value, function(s["s0"], t["t0"]) + function(s["s1"], t["t1"]))


def test_embeddings_are_the_inputs_of_the_classifiers() -> None:
    term = Hint(layers="features", distance="cosine")
    assert term.uses_features
    assert not Hint().uses_features
    term.connect([LayerPair("features", "features", (4,), (4,))])
    assert term.student_layers == term.teacher_layers == ()
    s, t = normal(N, 4), normal(N, 4, seed=1)
    value = term(step_of(teacher=TeacherSignal(features=t), features=s))
    torch.testing.assert_close(value, cosine_hint(s, t))


def test_a_teacher_in_inference_mode_will_do() -> None:
    with torch.inference_mode():
        t = normal(N, 5, H, W).half()
    s = normal(N, C, H, W).float().requires_grad_()
    for term in (Hint(), AttentionTransfer(), PKD()):
        term.connect([pair((C, H, W), (5, H, W))])
        term(step(s, t)).sum().backward()
    assert s.grad.isfinite().all()


def test_projectors_are_part_of_the_learner() -> None:
    term = Hint()
    with pytest.raises(
        TransferError, match=r"'hint' compares layers with a teacher's and was not told which.*connect\(\)"
    ):
        Learner(nn.Identity(), [term], None)
    term.connect([pair((2,), (5,))])
    learner = Learner(nn.Sequential(OrderedDict(body=nn.Linear(2, 2))), [term], None)
    assert "objectives.0.projectors.0.linear.weight" in learner.state_dict()
    assert learner.counts({"pixel_values": torch.zeros(7, 3)}) == {"hint": 7}
    assert learner.counts({"x": torch.tensor(1.0), "example_id": torch.zeros(6)}) == {"hint": 6}
    pkd_term = PKD()
    pkd_term.connect([pair((2,), (5,))])
    assert pkd_term.count({"x": torch.zeros(3)}) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hint(distance="l1"), "distance must be 'mse' or 'cosine', got 'l1'"),
        (lambda: AttentionTransfer(p=0.5), "p must be at least 1, got 0.5"),
        (lambda: AttentionTransfer().connect([pair((4,), (4,))]), "maps of where layers are active, got body"),
        (lambda: Hint(layers="uniform").connect([]), "no layers to compare for layers='uniform'"),
    ],
)
def test_bad_arguments(make, message) -> None:
    with pytest.raises(TransferError, match=message):
        make()


def test_missing_layers_are_named() -> None:
    term = Hint()
    term.connect([pair((2,), (2,))])
    x = torch.zeros(1, 2)
    with pytest.raises(TransferError, match=r"needs the student's 'body', and has \['else'\]"):
        term(step_of(teacher=TeacherSignal(hidden={"trunk": x}), hidden={"else": x}))
    with pytest.raises(TransferError, match=r"needs the teacher's 'trunk', and its signal has \['logits'\]"):
        term(step_of(teacher=TeacherSignal(logits=x), hidden={"body": x}))
    with pytest.raises(TransferError, match="'hint' learns from a teacher"):
        term(step_of(hidden={"body": x}))
