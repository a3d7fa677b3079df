"""MiniLM relations and TinyBERT against plain transcriptions of their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from teaching import finite_with_gradient, normal, step_of

from hf_transfer.distillation.signal import TeacherSignal
from hf_transfer.errors import TransferError
from hf_transfer.objectives import MiniLMRelation, TinyBERT
from hf_transfer.objectives._layers import LayerPair
from hf_transfer.objectives.transformers_distillation import (
    attention_mse,
    attention_scores,
    minilm_relation,
    tinybert,
)

N, T, HEADS = 2, 4, 2
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
REAL = [3, 4]


def plain_relation(s, t, heads, lengths):
    rows = []
    for i in range(N):
        total, n = 0.0, lengths[i]
        for a in range(heads):
            relations = []
            for x in (t, s):
                d = x.shape[2] // heads
                part = x[i, :n, a * d : (a + 1) * d]
                e = np.exp(np.array([[part[u] @ part[v] / math.sqrt(d) for v in range(n)] for u in range(n)]))
                relations.append(e / e.sum(axis=1, keepdims=True))
            p, q = relations
            total += sum(p[u, v] * math.log(p[u, v] / q[u, v]) for u in range(n) for v in range(n))
        rows.append(total / (heads * n))
    return rows


@pytest.mark.parametrize("masked", [False, True])
def test_relations_by_their_formula(masked) -> None:
    s, t = normal(N, T, 4), normal(N, T, 6, seed=1)
    mask = MASK.bool() if masked else None
    expected = plain_relation(s.numpy(), t.numpy(), HEADS, REAL if masked else [T] * N)
    torch.testing.assert_close(minilm_relation(s, t, HEADS, mask), torch.tensor(np.array(expected)))
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: minilm_relation(x, t, HEADS, mask), s)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 60.0), (torch.float16, 20.0)])
def test_relations_are_finite_for_large_values(dtype, scale) -> None:
    s, t = normal(N, T, 4, scale=scale).to(dtype).requires_grad_(), normal(N, T, 6, seed=1, scale=scale).to(dtype)
    for mask in (None, MASK.bool(), torch.zeros(N, T).bool()):
        assert finite_with_gradient(minilm_relation(s, t, HEADS, mask), s)


def test_relations_are_zero_where_the_student_is_the_teacher_or_a_rotation_of_it() -> None:
    t = normal(N, T, 6)
    rotation = torch.linalg.qr(normal(3, 3, seed=1))[0]
    rotated = (t.unflatten(2, (HEADS, 3)) @ rotation).flatten(2)
    for s in (t, rotated):
        assert minilm_relation(s, t, HEADS, MASK.bool()).abs().max() < 1e-12
    assert (minilm_relation(2 * t, t, HEADS) > 0).all()


def test_sums_are_in_float32_under_autocast() -> None:
    s, t = normal(N, T, 4).float(), normal(N, T, 6, seed=1).float()
    expected = minilm_relation(s, t, HEADS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(minilm_relation(s, t, HEADS), expected)


def plain_scores(q, k, heads):
    d = q.shape[2] // heads
    out = np.zeros((N, heads, T, T))
    for i, a, u, v in np.ndindex(out.shape):
        out[i, a, u, v] = q[i, u, a * d : (a + 1) * d] @ k[i, v, a * d : (a + 1) * d] / math.sqrt(d)
    return out


def plain_tinybert(scores, states, lengths):
    rows = []
    for i, n in enumerate(lengths):
        total = 0.0
        for a, b in scores:
            total += sum(((a[i, h, :n, :n] - b[i, h, :n, :n]) ** 2).mean() for h in range(a.shape[1])) / a.shape[1]
        for a, b in states:
            total += ((a[i, :n] - b[i, :n]) ** 2).mean()
        rows.append(total)
    return rows


@pytest.mark.parametrize("masked", [False, True])
def test_tinybert_by_its_formula(masked) -> None:
    q, k = normal(N, T, 4), normal(N, T, 4, seed=1)
    np.testing.assert_allclose(attention_scores(q, k, HEADS).numpy(), plain_scores(q.numpy(), k.numpy(), HEADS))
    scores = [(normal(N, 3, T, T, seed=i), normal(N, 3, T, T, seed=9 + i)) for i in range(2)]
    states = [(normal(N, T, 5, seed=i), normal(N, T, 5, seed=9 + i)) for i in range(3)]
    expected = plain_tinybert(
        [(a.numpy(), b.numpy()) for a, b in scores],
        [(a.numpy(), b.numpy()) for a, b in states],
        REAL if masked else [T] * N,
    )
    value = tinybert(scores, states, MASK.bool() if masked else None)
    torch.testing.assert_close(value, torch.tensor(np.array(expected)))
    x = scores[0][0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention_mse(x, scores[0][1], MASK.bool()), x)


# ---- terms ----------------------------------------------------------------------------------------------------------


def pairs(roles, student=4, teacher=6, names="{}") -> list[LayerPair]:
    return [
        LayerPair(f"s.{names.format(role)}", f"t.{names.format(role)}", (T, student), (T, teacher), role.split("-")[0])
        for role in roles
    ]


def step(term, mask=MASK):
    s = {pair.student: normal(N, *pair.student_shape, seed=i) for i, pair in enumerate(term.pairs)}
    t = {pair.teacher: normal(N, *pair.teacher_shape, seed=50 + i) for i, pair in enumerate(term.pairs)}
    inputs = {} if mask is None else {"attention_mask": mask}
    return step_of(teacher=TeacherSignal(hidden=t), hidden=s, inputs=inputs)


def test_the_minilm_term_sums_queries_keys_and_values() -> None:
    term = MiniLMRelation(relation_heads=HEADS)
    term.connect(pairs(["query", "key", "value"]))
    at = step(term)
    expected = sum(
        minilm_relation(at.hidden[f"s.{r}"], at.teacher.hidden[f"t.{r}"], HEADS, MASK.bool())
        for r in ("query", "key", "value")
    )
    torch.testing.assert_close(term(at), expected)
    assert not list(term.parameters())
    assert MiniLMRelation().relation_heads == 48
    assert (MiniLMRelation().name, TinyBERT(heads=2).name) == ("minilm_relation", "tinybert")
    assert term.count({"input_ids": MASK}) == N


def test_a_fused_projection_holds_queries_keys_and_values_in_this_order() -> None:
    separate = MiniLMRelation(relation_heads=HEADS)
    separate.connect(pairs(["query", "key", "value"]))
    at = step(separate)
    fused = MiniLMRelation(relation_heads=HEADS)
    fused.connect([
        LayerPair("qkv", f"t.{role}", (T, 12), (T, 6), role) for role in ("value", "query", "key")  # in any order
    ])  # fmt: skip
    together = torch.cat([at.hidden[f"s.{role}"] for role in ("query", "key", "value")], dim=2)
    value = fused(step_of(teacher=at.teacher, hidden={"qkv": together}, inputs=at.inputs))
    torch.testing.assert_close(value, separate(at))


def test_the_tinybert_term_has_one_map_for_all_layers_and_one_for_the_embeddings() -> None:
    torch.manual_seed(0)
    term = TinyBERT(heads=HEADS)
    term.connect(pairs(["embedding", "hidden-1", "hidden-2", "query-1", "key-1", "query-2", "key-2"]))
    term.double()
    assert {name: tuple(p.shape) for name, p in term.named_parameters() if "weight" in name} == {
        "projectors.embedding.linear.weight": (6, 4), "projectors.hidden.linear.weight": (6, 4),
    }  # fmt: skip
    at = step(term)
    scores = [
        tuple(attention_scores(hidden[f"{n}.query-{i}"], hidden[f"{n}.key-{i}"], HEADS)
              for n, hidden in (("s", at.hidden), ("t", at.teacher.hidden)))
        for i in (1, 2)
    ]  # fmt: skip
    states = [
        (term.projectors[role.split("-")[0]](at.hidden[f"s.{role}"]), at.teacher.hidden[f"t.{role}"])
        for role in ("embedding", "hidden-1", "hidden-2")
    ]
    torch.testing.assert_close(term(at), tinybert(scores, states, MASK.bool()))
    term(at).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in term.parameters())


def test_a_student_like_its_teacher_has_nothing_to_learn() -> None:
    for term, roles in (
        (TinyBERT(heads=HEADS), ["embedding", "hidden", "query", "key"]),
        (MiniLMRelation(relation_heads=HEADS), ["query", "key", "value"]),
    ):
        term.connect(pairs(roles, 6, 6))
        at = step(term, None)
        hidden = {name.replace("t.", "s."): value for name, value in at.teacher.hidden.items()}
        assert term(step_of(teacher=at.teacher, hidden=hidden)).abs().max() < 1e-12
        assert not list(term.parameters())


@pytest.mark.parametrize("term", [TinyBERT(heads=HEADS), MiniLMRelation(relation_heads=HEADS)])
def test_padding_does_not_count(term) -> None:
    roles = ["query", "key", "value"] if isinstance(term, MiniLMRelation) else ["hidden", "query", "key"]
    term.connect(pairs(roles, 6, 6))
    at = step(term)
    noise = 9 * normal(N, T, 6, seed=99) * (1 - MASK)[..., None]
    other = step_of(teacher=at.teacher, hidden={name: x + noise for name, x in at.hidden.items()}, inputs=at.inputs)
    torch.testing.assert_close(term(other), term(at))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TinyBERT(heads=2).connect([LayerPair("a", "b", (4, 6), (5, 6))]),
            r"same tokens \(T, D\), got \['a \(4, 6\) ~ b \(5, 6\)'\]",
        ),
        (lambda: MiniLMRelation().connect([LayerPair("a", "b", (4, 6), (6, 2, 2), "key")]), "on the same tokens"),
        (lambda: MiniLMRelation().connect(pairs(["query", "key"])), "one pair each of .*'value'.*got .'query', 'key'"),
        (
            lambda: MiniLMRelation(relation_heads=5).connect(pairs(["query", "key", "value"], 12, 18)),
            r"relation_heads=5 must divide \[12, 18\]. Valid: \[1, 2, 3, 6\]",
        ),
        (lambda: TinyBERT(heads=3).connect(pairs(["query", "key"])), "heads=3 must divide both widths of s.query"),
        (lambda: TinyBERT(heads=2).connect(pairs(["query"])), "needs a key beside each query"),
        (
            lambda: TinyBERT(heads=2).connect([*pairs(["hidden"]), *pairs(["hidden-2"], 8)]),
            "has one map for all of",
        ),
    ],
)
def test_layers_that_do_not_fit_are_refused_before_training(make, message) -> None:
    with pytest.raises(TransferError, match=message):
        make()
