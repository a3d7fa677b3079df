"""Distillation of causal language models without ever holding the logits of a whole batch.

Logits are V numbers a token, and V is large: those of student and teacher, with what each term keeps of them for its
gradient, dwarf both networks. Here each network's body runs once, and of its output the hidden states (N, T, D) are
kept. Its last layer and the terms then see a stretch of tokens at a time, and once more in the backward pass instead
of being remembered (activation checkpointing; Chen et al. 2016, arXiv:1604.06174). Sums are those of one pass.

    teacher = ChunkedTeacher(live_teacher)
    learner = ChunkedLearner(student, [CrossEntropy(shift=True), SoftTargets(shift=True)], anatomy, chunk_tokens=1024)
    learner(batch, teacher=teacher(batch)).loss.backward()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import TransferError
from ..objective import CONTRACT_COLUMNS, Learner, Objective, Step, logits_of, model_inputs, over_items, wide
from .base import Teacher
from .language_head import LanguageHead
from .signal import TeacherSignal, TopLogits
from .teacher import AdapterOffTeacher, LiveTeacher

if TYPE_CHECKING:
    from ..anatomy import Anatomy


@dataclass(frozen=True)
class HiddenSignal(TeacherSignal):
    """A teacher's answer as hidden states, and what makes logits of them.

    Attributes:
        head: Hidden states (N, t, D) of some tokens -> their logits (N, t, V), without gradient.
    """

    head: Callable[[Tensor], Tensor] | None = None


class ChunkedTeacher(Teacher):
    """A live teacher of a causal language model that answers with hidden states in the place of logits.

    Args:
        teacher: A LiveTeacher, not compiled, or an AdapterOffTeacher; each batch runs its body once.

    Raises:
        TransferError: If it is no such teacher of a language model; at the first batch, if its logits cannot be made
            from its hidden states.
    """

    def __init__(self, teacher: Teacher) -> None:
        if not isinstance(teacher, (LiveTeacher, AdapterOffTeacher)):
            raise TransferError(
                f"{type(teacher).__name__} has no one network whose logits could be made in chunks: give one live "
                "teacher, a cache, or leave chunk_tokens out."
            )
        if isinstance(teacher, LiveTeacher) and teacher.compiled:
            raise TransferError("Hidden states are read by a hook, which compile=True leaves out: turn it off.")
        self.teacher, self.labels, self.task = teacher, teacher.labels, teacher.task
        self._head = LanguageHead(teacher.backbone.model)

    def __call__(self, batch: Mapping[str, Tensor]) -> HiddenSignal:
        with self._head.held() as held:
            logits = self.teacher(batch).logits
        assert logits is not None  # a network gives all
        hidden = self._head.settle(held, logits)
        return HiddenSignal(features=hidden, head=partial(self._logits, words=logits.shape[-1], device=logits.device))

    def _logits(self, hidden: Tensor, words: int, device: torch.device) -> Tensor:
        with self.teacher.answering():
            return self._head(hidden)[..., :words].to(device)

    def fingerprint(self) -> str:
        return self.teacher.fingerprint()

    def watch(self, layers: Sequence[str] = (), features: bool = False) -> None:
        if layers or features:
            asked = [*layers, *(["features"] if features else [])]
            raise TransferError(f"Chunks of tokens hold logits only, and a term asks for {asked}: drop chunk_tokens.")

    def networks(self) -> list[nn.Module]:
        return self.teacher.networks()

    def to(self, device: torch.device | str) -> ChunkedTeacher:
        self.teacher.to(device)
        return self


class LargestTeacher(Teacher):
    """A ChunkedTeacher's largest logits, of a stretch of tokens at a time: what a cache of them keeps.

    Args:
        teacher: Who is asked.
        k: How many, of each token.
        temperatures: Those at which terms will ask for the mass of the others.
        chunk_tokens: How many tokens of a batch have all their logits at a time, from 1.
    """

    def __init__(self, teacher: ChunkedTeacher, k: int, temperatures: Sequence[float], chunk_tokens: int) -> None:
        self.teacher, self.k, self.temperatures, self.chunk_tokens = teacher, k, tuple(temperatures), chunk_tokens
        self.labels, self.task = teacher.labels, teacher.task

    def __call__(self, batch: Mapping[str, Tensor]) -> TeacherSignal:
        said = self.teacher(batch)
        assert said.features is not None and said.head is not None
        width = max(self.chunk_tokens // len(said.features), 1)
        parts = [TopLogits.of(said.head(part), self.k, self.temperatures) for part in said.features.split(width, 1)]
        tails = {t: torch.cat([part.tails[t] for part in parts], 1) for t in self.temperatures}
        values, indices = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("values", "indices"))
        return TeacherSignal(top=TopLogits(values, indices, tails, parts[0].classes))

    def fingerprint(self) -> str:
        return self.teacher.fingerprint()

    def watch(self, layers: Sequence[str] = (), features: bool = False) -> None:
        self.teacher.watch(layers, features)

    def networks(self) -> list[nn.Module]:
        return self.teacher.networks()

    def to(self, device: torch.device | str) -> LargestTeacher:
        self.teacher.to(device)
        return self


class Observer(Protocol):
    """Who reads the logits of an evaluation, a stretch of tokens at a time."""

    def longest(self, tokens: int) -> int:
        """The most tokens that a row of this batch has on any process: all are shown as many stretches."""
        ...

    def see(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> None:
        """Reads a stretch, which begins with the last token of the one before.

        Args:
            logits: The student's, (N, t, V); t may be 0.
            labels: (N, t); those of token t + 1 belong to the logits of token t.
            teacher: Its logits, (N, t, W), where one was asked.
        """


class ChunkedLearner(Learner):
    """A Learner of a causal language model that makes the logits of some tokens at a time.

    Loss, gradients and counts are the Learner's. The returned outputs hold the last token's logits only. An evaluation
    shows the logits to `observer` as they are made; without one it makes them all, and returns them.

    Attributes:
        observer: Who reads the logits of an evaluation.

    Args:
        model: A transformers causal language model, plain or with adapters.
        objectives: Terms that give one value a token, and read logits and labels of that token only.
        anatomy: The model's map.
        chunk_tokens: How many tokens of a batch, over all its rows, have their logits at a time; from 1. Less is
            smaller and slower; one step over all rows is the least.

    Raises:
        TransferError: If the model gives no logits of each token, or a term needs more than one token at a time.
    """

    def __init__(
        self, model: nn.Module, objectives: Sequence[Objective], anatomy: Anatomy | None, *, chunk_tokens: int = 1024
    ) -> None:
        if chunk_tokens < 1:
            raise TransferError(f"chunk_tokens must be a whole number from 1, got {chunk_tokens!r}.")
        head = LanguageHead(model)
        reach = {term.name: _reach(term, head.classes) for term in objectives}
        super().__init__(model, objectives, anatomy)
        self.chunk_tokens, self._head, self._reach = chunk_tokens, head, reach
        self.observer: Observer | None = None

    def _run(self, batch: dict[str, Any], progress: float, teacher: Any) -> Step:
        if not self.training and (self.observer is None or batch.get("labels") is None):
            return super()._run(batch, progress, teacher)
        inputs = model_inputs(batch)
        with self._head.held() as held:
            outputs = self.model(**inputs)
        logits = logits_of(outputs)
        hidden = self._head.settle(held, logits.detach())
        columns: dict[str, Any] = {name: batch.get(name) for name in CONTRACT_COLUMNS}
        labels = columns["labels"]
        if labels is None or labels.shape[:2] != hidden.shape[:2]:
            got = "none" if labels is None else f"labels of shape {tuple(labels.shape)}"
            raise TransferError(
                f"Chunks of tokens need a label for each of the {tuple(hidden.shape[:2])} tokens, got {got}: -100 "
                "says which do not count (padding, prompts). Terms that read no labels count tokens by them too."
            )
        return Step(
            model=self.model, inputs=inputs, outputs=outputs, logits=logits, features=hidden, progress=progress,
            teacher=teacher, **columns,
        )  # fmt: skip

    def _means(
        self,
        terms: Sequence[Objective],
        step: Step,
        batch: Mapping[str, Any],
        counts: Mapping[str, Tensor] | None,
        micro_batches: int,
    ) -> dict[str, Tensor]:
        if step.features is None or not (terms or self.observer):
            return super()._means(terms, step, batch, counts, micro_batches)
        counts = self.counts(batch) if counts is None else counts
        rows, tokens = step.features.shape[:2]
        width = max(self.chunk_tokens // rows, 1)
        sums = step.features.new_zeros(len(terms), dtype=torch.float32)
        more = 0  # stretches of other processes: asked before the first, as each of them is gathered
        if self.observer is not None and not self.training:
            more = math.ceil(self.observer.longest(tokens) / width) - math.ceil(tokens / width)
        for start in range(0, tokens, width):
            stop = min(start + width, tokens)
            if self.training:
                sums = sums + checkpoint(self._sums, terms, step, start, stop, use_reentrant=False)
            else:
                sums = sums + self._sums(terms, step, start, stop)
        if more:
            self._show_nothing(step, more)
        return {term.name: over_items(sums[i], counts[term.name]) for i, term in enumerate(terms)}

    def _sums(self, terms: Sequence[Objective], step: Step, start: int, stop: int) -> Tensor:
        """(K,) sum of each term's values over the tokens from start to stop."""
        watched = not self.training
        ahead = max([self._reach[term.name] for term in terms] + [int(watched)])
        chunk = _tokens(step, slice(start, stop + ahead))
        assert chunk.features is not None
        logits, teacher = wide(self._head(chunk.features)), _answer(chunk.teacher)
        if watched and self.observer is not None and chunk.labels is not None:
            self.observer.see(logits, chunk.labels, None if teacher is None else teacher.logits)
        part = replace(chunk, logits=logits, features=None, teacher=teacher)
        sums = []
        for term in terms:
            sums.append(wide(term(_tokens(part, slice(0, stop - start + self._reach[term.name])))).sum())
        return torch.stack(sums) if sums else logits.new_zeros(0)

    def _show_nothing(self, step: Step, times: int) -> None:
        """Stretches without a token, where other processes have longer rows to show."""
        nothing = _tokens(step, slice(0, 0))
        assert self.observer is not None and nothing.features is not None and nothing.labels is not None
        logits, teacher = wide(self._head(nothing.features)), _answer(nothing.teacher)
        for _ in range(times):
            self.observer.see(logits, nothing.labels, None if teacher is None else teacher.logits)


def _tokens(step: Step, tokens: slice) -> Step:
    """The same step, cut to some tokens of each row; logits of other shape are left as they are."""
    assert step.labels is not None
    shape = step.labels.shape[:2]  # (N, T)

    def cut(value: Any) -> Any:
        return value[:, tokens] if torch.is_tensor(value) and value.shape[:2] == shape else value

    return replace(
        step,
        inputs={name: cut(value) for name, value in step.inputs.items()},
        logits=cut(step.logits),
        labels=cut(step.labels),
        features=cut(step.features),
        teacher=None if step.teacher is None else step.teacher.each(cut),
    )


def _answer(signal: TeacherSignal | None) -> TeacherSignal | None:
    """A teacher's answer for some tokens as logits, whatever it came as."""
    if isinstance(signal, HiddenSignal) and signal.head is not None and signal.features is not None:
        return TeacherSignal(logits=signal.head(signal.features))
    return signal


def _reach(term: Objective, words: int) -> int:
    """How many tokens beyond its own a term's item reads: 1 for terms that are shifted, else 0.

    It is read off the term's own count: that of a sequence is the sum over its stretches, if these overlap so far.

    Args:
        term: The term.
        words: V; each is the label of some token, as words may weigh nothing.

    Raises:
        TransferError: If its items are no tokens.
    """
    if not term.uses_features and not term.student_layers:
        labels = torch.arange(words)[:, None].expand(words, 4)  # (N, T)
        counts = [_count(term, labels[:, part]) for part in (slice(4), slice(2), slice(2, 4), slice(3))]
        whole, first, second, longer = counts
        if whole and math.isclose(whole, first + second, rel_tol=1e-4):
            return 0
        if whole and math.isclose(whole, longer + second, rel_tol=1e-4):
            return 1
    raise TransferError(
        f"The term '{term.name}' cannot be computed for a chunk of tokens at a time: it does not give one value a "
        "token from that token's logits and label. CrossEntropy, SoftTargets, JSD, LogitMSE, DKD and NKD do, with "
        "shift=True. Leave the term or chunk_tokens out."
    )


def _count(term: Objective, labels: Tensor) -> float:
    count = term.count({"input_ids": labels, "labels": labels})
    return math.nan if count is None else float(count)
