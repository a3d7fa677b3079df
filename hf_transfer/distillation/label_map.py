"""The teacher's classes in the student's order, matched by name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import TransferError

if TYPE_CHECKING:
    from ..backbones import Backbone

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassMap:
    """Which of the teacher's logits the student's classes are.

    Attributes:
        outputs: Logits that the teacher gives; None where it does not say beforehand.
        width: Classes that are kept, the first ones unless `index` says which. For a language model it may be less
            than the student's own vocabulary, whose padding then has no counterpart: compare `logits[..., :width]`.
        index: (width,) int64, the teacher's class for each of the student's; None where the order is the same.
    """

    outputs: int | None
    width: int
    index: Tensor | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """(..., C_teacher) -> (..., width).

        Raises:
            TransferError: If there are not as many logits as the teacher's classes.
        """
        if logits.shape[-1] != (self.outputs or self.width):
            raise TransferError(
                f"The teacher gave {logits.shape[-1]} logits where its configuration says {self.outputs or self.width}"
                " classes. Correct its labels."
            )
        if self.index is not None:
            return logits.index_select(-1, self.index)
        return logits[..., : self.width] if logits.shape[-1] > self.width else logits

    def to(self, device: torch.device | str) -> ClassMap:
        """The map on another device."""
        return ClassMap(self.outputs, self.width, None if self.index is None else self.index.to(device))

    def __str__(self) -> str:
        return f"{self.width} of {self.outputs}: {None if self.index is None else self.index.tolist()}"


def class_map(student: Backbone, teacher: Backbone) -> ClassMap:
    """Matches a teacher's classes with a student's.

    By name, upper and lower case being the same where that is unambiguous. A permutation is mended and classes that
    only the teacher knows are left out; both are logged. Classes without names are kept in their order, with a
    warning, where neither network names them and both have as many.

    Args:
        student: Its labels say what is wanted.
        teacher: Of the same task.

    Returns:
        What to keep of the teacher's logits.

    Raises:
        TransferError: If the teacher lacks a class of the student's, or nothing says which is which.
    """
    theirs, own = outputs_of(teacher), outputs_of(student)
    if student.task == "causal-lm":
        return _vocabulary_map(student, theirs, own)
    if own is None:
        raise TransferError(f"The student {student.name!r} does not say how many classes it has. Give it labels.")
    if student.labels is not None and teacher.labels is not None:
        if student.labels == teacher.labels:
            return ClassMap(theirs, own)
        index = _index_by_name(student.labels, teacher.labels)
        if index is not None:
            return _mended(index, student.labels, teacher.labels, theirs)
    return _unnamed(student, teacher, theirs, own)


def outputs_of(backbone: Backbone) -> int | None:
    """Number of logits that a backbone gives; None for a module that does not say."""
    model: Any = backbone.model
    if getattr(model, "config", None) is not None:
        return backbone.outputs
    return len(backbone.labels) if backbone.labels is not None else getattr(model, "num_classes", None)


def _index_by_name(own: Sequence[str], theirs: Sequence[str]) -> list[int] | None:
    """The place among `theirs` of each of `own`; None where one is missing, or stands for two."""
    for spell in (str, _folded):
        names = [spell(name) for name in theirs]
        wanted = [spell(name) for name in own]
        if len(set(wanted)) == len(wanted) and all(names.count(name) == 1 for name in wanted):
            return [names.index(name) for name in wanted]
    return None


def _folded(name: str) -> str:
    return name.strip().casefold()


def _mended(index: list[int], own: Sequence[str], theirs: Sequence[str], outputs: int | None) -> ClassMap:
    if len(theirs) > len(own):
        unused = [name for i, name in enumerate(theirs) if i not in index]
        logger.info(
            "the student learns %d of the teacher's %d classes, without %s", len(own), len(theirs), some(unused)
        )
    if index == list(range(len(index))):
        return ClassMap(outputs, len(own))
    logger.info("the teacher numbers the classes otherwise than the student: matched by name, %s", some(own))
    return ClassMap(outputs, len(own), torch.tensor(index))


def _unnamed(student: Backbone, teacher: Backbone, theirs: int | None, own: int) -> ClassMap:
    """What to do without a match of names."""
    nameless = [_only_counted(student.labels), _only_counted(teacher.labels)]
    if theirs not in (None, own):
        named = ". " if any(nameless) else f": it lacks {some(_missing(student.labels or [], teacher.labels or []))}. "
        raise TransferError(
            f"The teacher {teacher.name!r} has {theirs} classes and the student {own}, and their names do not match"
            f"{named}The student's: {some(student.labels or [])}; the teacher's: {some(teacher.labels or [])}. Train "
            "the teacher on the student's classes, or name those of both alike: load_backbone(..., labels=[...])."
        )
    if own == 1:
        return ClassMap(theirs, own)
    if all(nameless):
        logger.warning(
            "neither the teacher nor the student names its %d %s: they are taken to be in the same order. Load both "
            "with labels=[...] to make sure",
            own, "outputs" if student.task == "regression" else "classes",
        )  # fmt: skip
        return ClassMap(theirs, own)
    if any(nameless):
        who = "student" if nameless[0] else "teacher"
        raise TransferError(
            f"The {who} does not name its {own} classes, so that nothing says which of them are "
            f"{some((teacher if nameless[0] else student).labels or [])}. Load it with "
            "load_backbone(..., labels=[...]), names in its own order."
        )
    missing = _missing(student.labels or [], teacher.labels or [])
    raise TransferError(
        f"The teacher {teacher.name!r} does not know the student's classes {some(missing)}: its are "
        f"{some(teacher.labels or [])}. Train it on the student's classes, or, where only the spelling differs, load "
        "it with load_backbone(..., labels=[...]), the student's names in the teacher's order."
    )


def _missing(own: Sequence[str], theirs: Sequence[str]) -> list[str]:
    """Names that are not there, or are there twice and so say nothing."""
    return [name for name in own if list(theirs).count(name) != 1] or list(own)


def _only_counted(names: Sequence[str] | None) -> bool:
    """Whether there are no names, or they only count: 0, 1 ... or LABEL_0, LABEL_1 ..."""
    return names is None or any(
        all(name == form.format(i) for i, name in enumerate(names)) for form in ("{}", "LABEL_{}")
    )


def _vocabulary_map(student: Backbone, theirs: int | None, own: int | None) -> ClassMap:
    """One vocabulary, whose matrices are padded to different sizes: the shared part, which must hold every token."""
    if theirs is None or own is None:
        raise TransferError("A language model must say the size of its vocabulary (config.vocab_size).")
    width = min(theirs, own)
    if student.processor is not None:
        tokens = max(student.processor.get_vocab().values()) + 1
        if tokens > width:
            raise TransferError(
                f"The tokenizer has {tokens} tokens, and the student has logits for {own}, the teacher for {theirs}: "
                "resize the smaller one with model.resize_token_embeddings(len(tokenizer)) and train it."
            )
    if theirs != own:
        logger.info(
            "the vocabularies are padded to %d (teacher) and %d (student): %d are compared", theirs, own, width
        )
    return ClassMap(theirs, width)


def some(items: Sequence[str], most: int = 10) -> str:
    """The first of many names, for messages."""
    shown = ", ".join(items[:most]) or "none"
    return f"{shown}, ... ({len(items)} in all)" if len(items) > most else shown
