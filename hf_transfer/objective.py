"""The sum of terms that every kind of transfer learning minimises: Step, Objective, schedules, Learner.

A term is a function of one mixed forward pass (a `Step`). It returns either one number, the mean over the batch that
it couples (CORAL, a penalty on the weights), or one value an item (an example, a token), and then says beforehand how
many items of a batch it counts. With the counts known before the first backward, one reducer divides each term by its
items in the whole accumulated batch over all processes: gradients are those of one large batch, however it is cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .errors import TransferError
from .shards import is_sharded
from .weight_schedules import CosineSchedule as CosineSchedule
from .weight_schedules import LinearSchedule as LinearSchedule
from .weight_schedules import Schedule as Schedule
from .weight_schedules import SigmoidSchedule as SigmoidSchedule

if TYPE_CHECKING:
    from .anatomy import Anatomy, Taps

UNLABELLED = -100  # the ecosystem's own ignore index
SOURCE, TARGET = 0, 1
CONTRACT_COLUMNS = ("labels", "domain", "example_id")
TEACHER_PREFIX = "teacher_"
"""Columns that begin so are a teacher's own inputs, where it reads the rows in another way than the model."""


@dataclass(frozen=True)
class Step:
    """One forward pass over one mixed batch of N rows, as the terms see it.

    Attributes:
        model: The model that made the outputs.
        inputs: What the model was given.
        outputs: What the model returned.
        logits: (N, C), or (N, T, C) for tokens; float32 at least.
        labels: (N,), (N, T), or soft (N, C); -100 = unlabelled. None where the batch has none.
        features: The input of the classifier, (N, D), or (N, T, D) for tokens; None if no term `uses_features`.
        domain: (N,) int64; 0 = source, 1 = target. None where the batch has none.
        example_id: (N,) int64. None where the batch has none.
        progress: Share of training that is done, in [0, 1]; survives a resume.
        teacher: The teacher's signal, for distillation.
        hidden: Outputs of the layers that terms name in `student_layers`, by name.
    """

    model: nn.Module
    inputs: dict[str, Tensor]
    outputs: Any
    logits: Tensor
    labels: Tensor | None = None
    features: Tensor | None = None
    domain: Tensor | None = None
    example_id: Tensor | None = None
    progress: float = 0.0
    teacher: Any = None
    hidden: dict[str, Tensor] = field(default_factory=dict)

    @property
    def labelled(self) -> Tensor:
        """(N,) bool: rows with a label."""
        return labelled_rows({"labels": self.labels}, len(self.logits), self.logits.device)

    @property
    def source(self) -> Step:
        """The rows with domain 0."""
        return self.rows(self._domain() == SOURCE)

    @property
    def target(self) -> Step:
        """The rows with domain 1."""
        return self.rows(self._domain() == TARGET)

    def rows(self, mask: Tensor) -> Step:
        """The same step, cut to some rows.

        Args:
            mask: (N,) bool.
        """
        cut: dict[str, Any] = {
            f.name: getattr(self, f.name)[mask]
            for f in fields(self)
            if f.name in ("logits", "labels", "features", "domain", "example_id") and getattr(self, f.name) is not None
        }
        inputs = {
            k: v[mask] if torch.is_tensor(v) and v.dim() and len(v) == len(mask) else v for k, v in self.inputs.items()
        }
        teacher = None if self.teacher is None else self.teacher.rows(mask)
        hidden = {name: value[mask] for name, value in self.hidden.items()}
        return replace(self, inputs=inputs, teacher=teacher, hidden=hidden, **cut)

    def _domain(self) -> Tensor:
        if self.domain is None:
            raise TransferError(
                "This term needs the rows' `domain` column (0 = source, 1 = target), and the batch has none. "
                "Build the data with hf_transfer.data.splits.combine(source=..., target=...)."
            )
        return self.domain


def labelled_rows(batch: Mapping[str, Any], rows: int, device: torch.device) -> Tensor:
    """(N,) bool: which rows of a collated batch carry a label (any label other than -100)."""
    labels = batch.get("labels")
    if labels is None:
        return torch.zeros(rows, dtype=torch.bool, device=device)
    return (labels != UNLABELLED).reshape(len(labels), -1).any(dim=1)


class Objective(nn.Module):
    """One term of the sum: a subclass computes it in `forward(step)`.

    A term may own parameters and buffers: they train, checkpoint, resume and synchronise with everything else, and
    never land in the saved model.

    Args:
        weight: A number, or a schedule of training progress in [0, 1].
        name: The name it is logged under; the class's name in snake case by default.

    Raises:
        TransferError: If a constant weight is not finite.
    """

    uses_features: bool = False
    """Whether `forward` reads `step.features`."""
    in_evaluation: bool = False
    """Whether the term is part of the evaluation loss (supervised terms are)."""

    def __init__(self, weight: float | Schedule = 1.0, name: str | None = None) -> None:
        super().__init__()
        if not callable(weight) and not math.isfinite(weight):
            raise TransferError(f"{type(self).__name__}: weight must be finite or a schedule, got {weight!r}.")
        self.weight = weight
        self.name = name or _snake_case(type(self).__name__)

    @property
    def student_layers(self) -> tuple[str, ...]:
        """Modules of the model whose outputs `forward` reads in `step.hidden`; none by default."""
        return ()

    def weight_at(self, progress: float) -> float:
        """The term's weight at this progress in [0, 1]."""
        return self.weight(progress) if callable(self.weight) else self.weight

    def prepare(self, model: nn.Module, anatomy: Anatomy | None) -> None:
        """Called once with the model as it starts, before training: size what is owned, remember the weights."""

    def count(self, batch: Mapping[str, Any]) -> Tensor | None:
        """How many items of a collated batch `forward` returns values for, known from the batch alone.

        Returns:
            A 0-d tensor; or None (the default) where `forward` returns one number that couples the batch, which is
            then averaged over micro-batches and processes.
        """
        return None

    def forward(self, step: Step) -> Tensor:
        """The term's value: 0-d where `count` is None, else one value an item (any shape; items not counted are 0)."""
        raise NotImplementedError

    def own_mean(self, step: Step) -> Tensor | None:
        """The mean over one batch alone, 0-d, where there is a cheaper way to it than by `forward` and `count`.

        Returns:
            The mean; None (the default) where there is none.
        """
        return None

    def extra_repr(self) -> str:
        """What it was made with, as far as attributes of its own tell."""
        told = {name: value for name, value in vars(self).items() if not name.startswith("_") and name != "training"}
        simple = {
            name: value for name, value in told.items() if callable(value) or isinstance(value, (int, float, str))
        }
        return ", ".join(f"{name}={value!r}" for name, value in simple.items())


@dataclass
class Signal:
    """What a Learner returns: the loss to minimise, the model's outputs, and each term's value for the log."""

    loss: Tensor | None
    outputs: Any
    terms: dict[str, Tensor] = field(default_factory=dict)


class Learner(nn.Module):
    """The user's model and the terms in one module, whose forward computes the summed loss.

    It takes the model's place where a training engine wraps the model (DDP and its like), so that every parameter,
    the terms' included, is seen by the engine's hooks.

    Args:
        model: Any model whose output has logits.
        objectives: The terms; their names must differ.
        anatomy: Where the classifier is; needed if a term `uses_features`.

    Attributes:
        trained: The parameters that have gradients, once a trainer knows; None before.
        answers_detached: Whether the outputs of training are without graph. DDP waits for the gradients of all that
            outputs depend on, and of a head that no term reads none comes.
    """

    def __init__(self, model: nn.Module, objectives: Sequence[Objective], anatomy: Anatomy | None) -> None:
        super().__init__()
        names = [term.name for term in objectives]
        if len(set(names)) != len(names):
            raise TransferError(f"Two terms share a name: {names}. Pass name=... to tell them apart in the log.")
        self.model = model
        self.objectives = nn.ModuleList(objectives)
        self._terms = list(objectives)
        self.trained: list[nn.Parameter] | None = None
        self.answers_detached = False
        self.anatomy = anatomy
        for term in objectives:
            term.prepare(model, anatomy)
        self._feature_taps, self._layer_taps = self._make_taps()
        self._tapped = any(term.uses_features or term.student_layers for term in objectives)

    def _make_taps(self) -> tuple[Taps, Taps]:
        """Taps at the classifier's input and at the layers that terms name; made once, looking modules up is slow."""
        from .anatomy import Taps

        classifier = [self._classifier()] if any(term.uses_features for term in self.terms()) else []
        layers = dict.fromkeys(layer for term in self.terms() for layer in term.student_layers)
        return Taps(self.model, classifier, inputs=True), Taps(self.model, list(layers))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it the hooks that read layers stay; where each step sets its own they break a compiled graph."""
        with self._feature_taps, self._layer_taps:
            yield

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As a module's, over `trained` where a trainer has set it: looking for the parameters takes longer."""
        if self.trained is None or not set_to_none:
            super().zero_grad(set_to_none)
            return
        for parameter in self.trained:
            parameter.grad = None

    def terms(self) -> list[Objective]:
        """The terms, in the order given."""
        return self._terms

    def counts(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Items of this batch by term, for the terms that count them."""
        counted = {
            term.name: _exact(term.count(batch)) for term in self.terms() if self.training or term.in_evaluation
        }
        return {name: count for name, count in counted.items() if count is not None}

    def forward(
        self,
        batch: dict[str, Any],
        progress: float = 0.0,
        counts: Mapping[str, Tensor] | None = None,
        micro_batches: int = 1,
        teacher: Any = None,
    ) -> Signal:
        """Runs the model once and sums the terms.

        Args:
            batch: A collated batch on the model's device, with the contract's columns.
            progress: Share of training done, in [0, 1].
            counts: Each counting term's items in the whole accumulated batch, divided by the number of processes
                (engines average gradients over processes). None: this batch is the whole one, on one process.
            micro_batches: Number of batches that are accumulated before the optimizer steps.
            teacher: The teacher's signal for this batch.

        Returns:
            The loss (None where no term applies), the outputs, and each term's unweighted share of the log.
        """
        step = self._run(batch, progress, teacher)
        terms = self._terms
        if not self.training:
            terms = [term for term in terms if term.in_evaluation and step.labels is not None]
        values = self._means(terms, step, batch, counts, micro_batches)
        loss = None
        for term in terms:
            weight = term.weight_at(progress)
            weighted = values[term.name] if weight == 1 else values[term.name] * weight
            loss = weighted if loss is None else loss + weighted
        dtype = torch.promote_types(step.logits.dtype, torch.float32)  # means over exact counts are in float64
        loss = None if loss is None else loss.to(dtype)
        outputs = step.outputs
        if self.training and self.answers_detached:
            outputs = tree_map_only(Tensor, Tensor.detach, outputs)
        return Signal(loss, outputs, {name: value.detach().to(dtype) for name, value in values.items()})

    def _means(
        self,
        terms: Sequence[Objective],
        step: Step,
        batch: Mapping[str, Any],
        counts: Mapping[str, Tensor] | None,
        micro_batches: int,
    ) -> dict[str, Tensor]:
        """Each term's share of its mean over the whole accumulated batch, by name."""
        return {term.name: self._mean(term, step, batch, counts, micro_batches) for term in terms}

    def _mean(
        self,
        term: Objective,
        step: Step,
        batch: Mapping[str, Any],
        counts: Mapping[str, Tensor] | None,
        micro_batches: int,
    ) -> Tensor:
        alone = counts is None and not torch.compiler.is_compiling()  # a look at a value would cut the graph in two
        if alone and (mean := term.own_mean(step)) is not None:
            return mean
        count = _exact(term.count(batch)) if counts is None else counts.get(term.name)
        value = term(step)
        if is_sharded(value):
            raise TransferError(
                f"The term '{term.name}' reads weights of the model, and FSDP leaves each process a part of them: sum "
                "over them with hf_transfer.shards.over_parts, as L2SP does, or launch with DDP."
            )
        if count is not None:
            return over_items(wide(value).sum(), count)
        if value.dim() != 0:
            raise TransferError(
                f"The term '{term.name}' returned values of shape {tuple(value.shape)} but counts no items: "
                "return a mean (0-d), or define count(batch)."
            )
        return wide(value) / micro_batches

    def _run(self, batch: dict[str, Any], progress: float, teacher: Any) -> Step:
        inputs = model_inputs(batch)
        columns: dict[str, Any] = {name: batch.get(name) for name in CONTRACT_COLUMNS}
        if not self._tapped:
            outputs = self._outputs(inputs)
            logits = wide(logits_of(outputs))
            return Step(
                model=self.model, inputs=inputs, outputs=outputs, logits=logits, progress=progress, teacher=teacher,
                **columns,
            )  # fmt: skip
        with self._feature_taps as features, self._layer_taps as hidden:
            outputs = self._outputs(inputs)
        logits = wide(logits_of(outputs))
        mask = inputs.get("attention_mask")
        step = Step(
            model=self.model, inputs=inputs, outputs=outputs, logits=logits, progress=progress, teacher=teacher,
            features=next((match_rows(found, logits, mask) for found in features.values.values()), None),
            hidden=dict(hidden.values), **columns,
        )  # fmt: skip
        features.values.clear()  # the taps outlive the step, its tensors should not
        hidden.values.clear()
        return step

    def _outputs(self, inputs: dict[str, Any]) -> Any:
        """What the model returns."""
        return self.model(**inputs)

    def _classifier(self) -> str:
        """The layer whose input is the feature vector."""
        if self.anatomy is None or not self.anatomy.classifiers:
            raise TransferError(
                f"A term needs features, but no classifier was found in {type(self.model).__name__}: features are the "
                "input of the layer that gives the logits. Load the model with load_backbone(), or drop the term."
            )
        return self.anatomy.classifiers[0]


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a collated batch the model is given: all but the contract's columns and a teacher's."""
    return {
        name: value
        for name, value in batch.items()
        if name not in CONTRACT_COLUMNS and not name.startswith(TEACHER_PREFIX)
    }


def _exact(count: Tensor | None) -> Tensor | None:
    """In float64, as the counts of several batches are."""
    return None if count is None else count.double()


def over_items(total: Tensor, count: Tensor) -> Tensor:
    """A sum of values divided by their number; 0 where there are none."""
    return total / count.to(total.device).clamp(min=torch.finfo(torch.float32).tiny)


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float32 else x.to(torch.promote_types(x.dtype, torch.float32))


def logits_of(outputs: Any) -> Tensor:
    """The logits in whatever a model returns: an output with `.logits`, a mapping, a tuple, or the tensor itself."""
    if torch.is_tensor(outputs):
        return outputs
    if isinstance(outputs, Mapping):
        return outputs["logits"]
    return outputs[0] if isinstance(outputs, tuple) else outputs.logits


def match_rows(features: Tensor, logits: Tensor, attention_mask: Tensor | None) -> Tensor:
    """One feature vector a row of logits.

    Decoders apply their classifier to every token and keep the last one's logits: the features kept are the same
    token's. Convolutional classifiers see (N, D, 1, 1).

    Args:
        features: (N, D), (N, T, D) or (N, D, 1, 1).
        logits: (N, C) or (N, T, C).
        attention_mask: (N, T), where the input is text.

    Returns:
        (N, D), or (N, T, D) where the logits have tokens too.
    """
    if features.dim() == logits.dim():
        return features
    if features.dim() == 3 and logits.dim() == 2:
        n, t = features.shape[:2]
        if attention_mask is None:
            last = torch.full((n,), t - 1, device=features.device)
        else:
            last = (attention_mask * torch.arange(t, device=features.device)).argmax(dim=1)  # (N,)
        return features[torch.arange(n, device=features.device), last]
    return features.flatten(1)


def _snake_case(name: str) -> str:
    """CrossEntropy -> cross_entropy, L2SP -> l2sp, DANN -> dann."""
    pairs = zip(" " + name, name, name[1:] + " ", strict=False)
    return "".join(
        ("_" if c.isupper() and before != " " and (before.islower() or after.islower()) else "") + c.lower()
        for before, c, after in pairs
    )
