"""Terms on the relations between rows against plain transcriptions of their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from teaching import finite_with_gradient, normal, step_of

from hf_transfer.distillation.signal import TeacherSignal
from hf_transfer.objectives import CKA, RKD, SimilarityPreserving
from hf_transfer.objectives._layers import LayerPair
from hf_transfer.objectives.relations import cka, rkd, similarity_preserving

N, D = 5, 4


def plain_similarity(s, t):
    matrices = []
    for x in (s, t):
        g = np.array([[sum(a * b for a, b in zip(x[i], x[j], strict=True)) for j in range(N)] for i in range(N)])
        matrices.append(np.array([row / math.sqrt((row**2).sum()) for row in g]))
    return ((matrices[1] - matrices[0]) ** 2).sum() / N**2


def huber(x, y):
    return 0.5 * (x - y) ** 2 if abs(x - y) <= 1 else abs(x - y) - 0.5


def plain_rkd(s, t, distance_weight=25.0, angle_weight=50.0):
    def length(v):
        return math.sqrt((v**2).sum())

    def cosine(x, j, i, k):  # at row j, between rows i and k
        return 0.0 if j in (i, k) else (x[i] - x[j]) @ (x[k] - x[j]) / (length(x[i] - x[j]) * length(x[k] - x[j]))

    means = [sum(length(x[i] - x[j]) for i in range(N) for j in range(N)) / (N * (N - 1)) for x in (s, t)]
    distances = sum(
        huber(length(s[i] - s[j]) / means[0], length(t[i] - t[j]) / means[1]) for i in range(N) for j in range(N)
    )
    angles = sum(huber(cosine(s, j, i, k), cosine(t, j, i, k)) for i in range(N) for j in range(N) for k in range(N))
    return distance_weight * distances / N**2 + angle_weight * angles / N**3


def plain_cka(s, t):
    x, y = s - s.mean(axis=0), t - t.mean(axis=0)
    return 1 - ((y.T @ x) ** 2).sum() / math.sqrt(((x.T @ x) ** 2).sum() * ((y.T @ y) ** 2).sum())


CASES = {
    "similarity_preserving": (similarity_preserving, plain_similarity),
    "rkd": (rkd, plain_rkd),
    "rkd_weights": (lambda s, t: rkd(s, t, 2.0, 1.0), lambda s, t: plain_rkd(s, t, 2.0, 1.0)),
    "cka": (cka, plain_cka),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_papers_formula(name) -> None:
    function, plain = CASES[name]
    s, t = normal(N, D, seed=1), normal(N, D + 3, seed=2)
    assert function(s, t).item() == pytest.approx(plain(s.numpy(), t.numpy()), rel=1e-9)
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, t), s)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e4), (torch.float32, 1e-6), (torch.float16, 1e3)])
def test_it_is_finite_and_right_for_large_and_small_features(name, dtype, scale) -> None:
    function = CASES[name][0]
    s, t = (normal(N, D, seed=seed, scale=scale).to(dtype) for seed in (1, 2))
    s.requires_grad_()
    value = function(s, t)
    assert finite_with_gradient(value, s)
    torch.testing.assert_close(value.double(), function(s.double(), t.double()), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_equal_rows_and_single_rows_have_a_gradient(name) -> None:
    s, t = normal(N, D), normal(N, D, seed=1)
    s[1], t[2] = s[0], t[0]
    for rows in (slice(N), slice(1)):
        x = s[rows].clone().requires_grad_()
        assert finite_with_gradient(CASES[name][0](x, t[rows]), x)
    for value in (0.0, 1.0):
        same = torch.full((N, D), value, requires_grad=True)
        assert finite_with_gradient(CASES[name][0](same, t), same)
    dead = normal(N, D)
    dead[2] = 0
    dead.requires_grad_()
    assert torch.autograd.grad(CASES[name][0](dead, t), dead)[0].abs().max() < 1e3


@pytest.mark.parametrize("name", CASES)
def test_it_is_zero_where_the_student_is_the_teacher_up_to_what_it_ignores(name) -> None:
    t = normal(N, D)
    rotation = torch.linalg.qr(normal(D, D, seed=1))[0]
    for s in (t, 3 * t @ rotation):
        assert CASES[name][0](s, t).abs().item() < 1e-12
    offset = 0 if name == "similarity_preserving" else 2
    assert CASES[name][0](t + offset, t).abs().item() < 1e-12
    assert CASES[name][0](t + normal(N, D, seed=2), t) > 1e-3


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_cka_ignores_scale(scale) -> None:
    s, t = normal(N, D).float(), normal(N, D, seed=1).float()
    torch.testing.assert_close(cka(scale * s, t), cka(s, t))


def test_sums_are_in_float32_under_autocast() -> None:
    s, t = normal(N, D).float(), normal(N, D, seed=1).float()
    for function, _ in CASES.values():
        expected = function(s, t)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(function(s, t), expected)


# ---- terms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "function"), [(SimilarityPreserving(), similarity_preserving), (CKA(), cka), (RKD(layers="last"), rkd)]
)
def test_terms_compare_whole_layers_of_any_shape_and_give_one_number(term, function) -> None:
    term.connect([LayerPair("body", "trunk", (2, 4, 4), (3, 2, 2))])
    assert not list(term.parameters())
    assert term.count({"x": torch.zeros(N)}) is None
    s, t = normal(N, 2, 4, 4), normal(N, 3, 2, 2, seed=1)
    value = term(step_of(teacher=TeacherSignal(hidden={"trunk": t}), hidden={"body": s}))
    torch.testing.assert_close(value, function(s.flatten(1), t.flatten(1)))


def test_rkd_compares_embeddings_by_default() -> None:
    term = RKD(distance_weight=1.0, angle_weight=2.0)
    assert term.uses_features
    term.connect([LayerPair("features", "features", (D,), (D + 2,))])
    s, t = normal(N, D), normal(N, D + 2, seed=1)
    value = term(step_of(teacher=TeacherSignal(features=t), features=s))
    torch.testing.assert_close(value, rkd(s, t, 1.0, 2.0))


def test_padding_does_not_count() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    s, t = normal(3, 3, D), normal(3, 3, D, seed=1)
    noise = normal(3, 3, D, seed=2) * (1 - mask)[..., None]
    for term in (SimilarityPreserving(), CKA()):
        term.connect([LayerPair("body", "trunk", (3, D), (3, D))])
        values = [
            term(
                step_of(
                    teacher=TeacherSignal(hidden={"trunk": t}), hidden={"body": x}, inputs={"attention_mask": mask}
                )
            )
            for x in (s, s + noise)
        ]
        torch.testing.assert_close(*values)


def test_the_papers_weights_are_the_defaults() -> None:
    assert SimilarityPreserving().weight == 3000
    assert (RKD().distance_weight, RKD().angle_weight) == (25, 50)
