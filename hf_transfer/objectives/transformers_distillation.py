"""The inside of a transformer as target: MiniLM's self-attention relations, and TinyBERT's scores and states.

Queries, keys and values are the outputs of their projections, so that no model must return its attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TransferError
from ..objective import Schedule, Step
from ._layers import FeatureTerm, LayerPair, Layers, Projector, masked_mean
from ._precision import full_precision, kl

QUERY_KEY_VALUE = ("query", "key", "value")


@full_precision
def minilm_relation(student: Tensor, teacher: Tensor, relation_heads: int = 48, mask: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of the relations softmax(X X' / sqrt(d)) of queries, keys or values X.

    X is split into relation heads of width d, whatever the attention heads are; the mean is over heads and tokens.

    Source: Wang et al. 2021, "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained
    Transformers", arXiv:2012.15828, equations 5 to 7.

    Args:
        student: (N, T, D), D a multiple of relation_heads.
        teacher: (N, T, D'), D' a multiple of relation_heads.
        relation_heads: The same number for both.
        mask: (N, T) bool: tokens that count; others are neither related nor related to.

    Returns:
        (N,), 0 at equal relations.
    """
    log_p, log_q = (_relations(x, relation_heads, mask) for x in (teacher, student))  # (N, heads, T, T)
    return masked_mean(kl(log_p, log_q).mean(dim=1), mask)


@full_precision
def attention_scores(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Q K' / sqrt(d) of each head, before the softmax: (N, T, D) each -> (N, heads, T, T)."""
    q, k = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key))  # (N, heads, T, d)
    return q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])


@full_precision
def attention_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared difference of attention scores, averaged over heads and over pairs of tokens that count.

    Args:
        student: (N, heads, T, T).
        teacher: (N, heads, T, T).
        mask: (N, T) bool: tokens that count.

    Returns:
        (N,).
    """
    error = (student - teacher).square().mean(dim=1)  # (N, T, T)
    return masked_mean(error.flatten(1), None if mask is None else (mask[:, :, None] & mask[:, None]).flatten(1))


def tinybert(
    scores: Sequence[tuple[Tensor, Tensor]],
    states: Sequence[tuple[Tensor, Tensor]],
    mask: Tensor | None = None,
) -> Tensor:
    """Sum over layers of the squared differences of attention scores and of hidden states (embeddings included).

    Source: Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", arXiv:1909.10351,
    equations 7 to 9 and 11.

    Args:
        scores: Student's and teacher's, (N, heads, T, T) each, before the softmax.
        states: Student's, already projected to the teacher's width, and teacher's, (N, T, D) each.
        mask: (N, T) bool: tokens that count.

    Returns:
        (N,), 0 where all are equal.
    """
    losses = [attention_mse(*pair, mask) for pair in scores]
    losses += [_state_mse(*pair, mask) for pair in states]
    return torch.stack(losses).sum(dim=0)


@full_precision
def _state_mse(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    return masked_mean((student - teacher).square(), mask)


def _relations(x: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """(N, T, D) -> log softmax of (N, heads, T, T)."""
    scores = attention_scores(x, x, heads)
    if mask is not None:  # not -inf, whose product with a probability of 0 is NaN
        scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min / 2)
    return F.log_softmax(scores, dim=-1)


class MiniLMRelation(FeatureTerm):
    """Tokens related to one another as in the teacher: by queries, keys and values. Wang et al. 2021, 2012.15828.

    It needs no projector, and no equal number of attention heads. It is connected with one pair each of the roles
    query, key and value; a fused projection is named three times, and holds the three in this order.

    Args:
        layers: Which layer, one: the last of the student beside the last of a base-sized teacher, or an upper middle
            one (21 of 24) of a large teacher. See FeatureTerm.
        relation_heads: Divides both networks' widths; 48 for base-sized teachers, 64 for large ones.
        weight: A number or a schedule of training progress.
        name: The name it is logged under.

    Raises:
        TransferError: Before training, if the widths are no multiples of relation_heads.
    """

    def __init__(
        self,
        layers: Layers = "last",
        relation_heads: int = 48,
        weight: float | Schedule = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(layers, weight, name or "minilm_relation")
        self.relation_heads = relation_heads

    def build(self) -> None:
        check_tokens(self.pairs, self.name)
        roles = [pair.role for pair in self.pairs]
        if sorted(roles) != sorted(QUERY_KEY_VALUE):
            raise TransferError(f"The term '{self.name}' compares one pair each of {QUERY_KEY_VALUE}, got {roles}.")
        student_fused = len({pair.student for pair in self.pairs}) == 1
        teacher_fused = len({pair.teacher for pair in self.pairs}) == 1
        self._parts = (3 if student_fused else 1, 3 if teacher_fused else 1)
        widths = {pair.student_width // self._parts[0] for pair in self.pairs}
        widths |= {pair.teacher_width // self._parts[1] for pair in self.pairs}
        if any(width % self.relation_heads for width in widths):
            divisor = math.gcd(*widths)
            valid = [heads for heads in range(1, divisor + 1) if divisor % heads == 0]
            raise TransferError(f"relation_heads={self.relation_heads} must divide {sorted(widths)}. Valid: {valid}.")

    def forward(self, step: Step) -> Tensor:
        losses = []
        for pair in self.pairs:
            *outputs, mask = self.values(step, pair)
            which = QUERY_KEY_VALUE.index(pair.role)
            student, teacher = (
                x.chunk(3, dim=-1)[which] if parts == 3 else x for x, parts in zip(outputs, self._parts, strict=True)
            )
            losses.append(minilm_relation(student, teacher, self.relation_heads, mask))
        return torch.stack(losses).sum(dim=0)  # (N,)


class TinyBERT(FeatureTerm):
    """Attention scores, hidden states and embeddings like the teacher's. Jiao et al. 2020, arXiv:1909.10351.

    One linear map takes all hidden states to the teacher's width, another the embeddings; none where the widths
    agree. It is connected with pairs of the roles embedding, hidden, query and key, any of which may be missing.

    Args:
        heads: Attention heads, the same number in both networks.
        layers: Which layers; see FeatureTerm.
        weight: A number or a schedule of training progress.
        name: The name it is logged under.

    Raises:
        TransferError: Before training, if the pairs do not fit together.
    """

    def __init__(
        self,
        heads: int,
        layers: Layers = "uniform",
        weight: float | Schedule = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(layers, weight, name or "tinybert")
        self.heads = heads
        self.projectors = nn.ModuleDict()

    def build(self) -> None:
        check_tokens(self.pairs, self.name)
        if len(self._of("query")) != len(self._of("key")):
            raise TransferError(
                f"The term '{self.name}' needs a key beside each query, got {[*map(str, self.pairs)]}."
            )
        for pair in (*self._of("query"), *self._of("key")):
            if pair.student_width % self.heads or pair.teacher_width % self.heads:
                raise TransferError(f"heads={self.heads} must divide both widths of {pair}.")
        for role in ("embedding", "hidden"):
            pairs = self._of(role)
            if len({(pair.student_width, pair.teacher_width) for pair in pairs}) > 1:
                raise TransferError(f"The term '{self.name}' has one map for all of {[*map(str, pairs)]}.")
            if pairs:
                self.projectors[role] = Projector(pairs[0])

    def forward(self, step: Step) -> Tensor:
        scores: list[tuple[Tensor, Tensor]] = []
        for queries, keys in zip(self._of("query"), self._of("key"), strict=True):
            q_s, q_t, mask = self.values(step, queries)
            k_s, k_t, _ = self.values(step, keys)
            scores.append((attention_scores(q_s, k_s, self.heads), attention_scores(q_t, k_t, self.heads)))
        states: list[tuple[Tensor, Tensor]] = []
        for role, projector in self.projectors.items():
            for pair in self._of(role):
                student, teacher, mask = self.values(step, pair)
                states.append((projector(student), teacher))
        return tinybert(scores, states, mask)  # (N,)

    def _of(self, role: str) -> list[LayerPair]:
        return [pair for pair in self.pairs if pair.role == role]


def check_tokens(pairs: Sequence[LayerPair], term: str) -> None:
    """Raises TransferError where a pair's layers do not hold the same tokens, (N, T, D) each."""
    strange = [str(pair) for pair in pairs if pair.layout != "tokens"]
    if strange:
        raise TransferError(f"The term '{term}' compares transformers on the same tokens (T, D), got {strange}.")
