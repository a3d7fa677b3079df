"""A teacher with a tokenizer or extractor of its own: its inputs beside the student's, in columns `teacher_...`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.utils.data import Subset

from ..data.collate import Collator
from ..data.columns import EPOCH, EXAMPLE_ID, values
from ..data.replay import dataset_epoch
from ..errors import TransferError
from ..objective import CONTRACT_COLUMNS, TEACHER_PREFIX

if TYPE_CHECKING:
    from datasets import Dataset

_STUDENTS_ALONE = (*CONTRACT_COLUMNS, EPOCH)


def without_teacher_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch is for the student."""
    return {name: value for name, value in batch.items() if not name.startswith(TEACHER_PREFIX)}


def teacher_part(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch is for the teacher alone, by the names that the teacher takes."""
    return {
        name.removeprefix(TEACHER_PREFIX): value for name, value in batch.items() if name.startswith(TEACHER_PREFIX)
    }


def with_teacher_inputs(student_rows: Dataset, teacher_rows: Dataset) -> TeacherInputRows:
    """Rows of the student's inputs that also carry the teacher's.

    Args:
        student_rows: A split that `prepare()` made for the student.
        teacher_rows: The same split made for the teacher; more rows do no harm.

    Returns:
        The student's rows with `teacher_input_ids` and so on, for `TeacherInputs` to collate.

    Raises:
        TransferError: If a row of the student's is not among the teacher's.
    """
    return TeacherInputRows(student_rows, teacher_rows)


class TeacherInputRows(Subset):
    """The student's rows, each with the teacher's inputs for the same `example_id`.

    A Subset of the student's dataset, so that the trainer finds its epoch; the teacher's follows it, and an
    augmentation of the same seed makes the same view.
    """

    def __init__(self, student_rows: Dataset, teacher_rows: Dataset) -> None:
        super().__init__(student_rows, range(len(student_rows)))
        for name, rows in (("student", student_rows), ("teacher", teacher_rows)):
            if EXAMPLE_ID not in rows.column_names:
                raise TransferError(f"The {name}'s rows have no {EXAMPLE_ID!r}: make them with prepare().")
        self.teacher_rows = teacher_rows
        self.places = _places(values(student_rows, EXAMPLE_ID), values(teacher_rows, EXAMPLE_ID))  # (N,)
        self._epochs = dataset_epoch(student_rows), dataset_epoch(teacher_rows)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        own, theirs = self._epochs
        if own is not None and theirs is not None:
            theirs.set(own.value)
        student: Any = self.dataset
        rows = student.__getitems__(list(indices))
        other = self.teacher_rows.__getitems__(self.places[list(indices)].tolist())
        return [{**row, **_prefixed(extra)} for row, extra in zip(rows, other, strict=True)]


class TeacherInputs:
    """Collates rows of `with_teacher_inputs`: a student's batch with the teacher's inputs in columns `teacher_...`.

    Args:
        student_collator: Of the student's rows.
        teacher_collator: Of the teacher's.

    Raises:
        TransferError: If the student's batches are blended, of which the teacher's inputs would know nothing.
    """

    def __init__(self, student_collator: Callable[..., Any], teacher_collator: Callable[..., Any]) -> None:
        if isinstance(student_collator, Collator) and student_collator.mixing is not None:
            raise TransferError("mixup and CutMix blend the student's images, not `teacher_` columns: leave one out.")
        self.student_collator, self.teacher_collator = student_collator, teacher_collator

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.student_collator([without_teacher_inputs(row) for row in rows])
        return {**batch, **_prefixed(self.teacher_collator([teacher_part(row) for row in rows]))}


def _prefixed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{TEACHER_PREFIX}{name}": value for name, value in row.items() if name not in _STUDENTS_ALONE}


def _places(own: Sequence[int], theirs: Sequence[int]) -> np.ndarray:
    """(N,) int64, where each of N example_ids is among `theirs`."""
    wanted, ids = np.asarray(own, dtype=np.int64), np.asarray(theirs, dtype=np.int64)
    order = np.argsort(ids, kind="stable")
    places = np.searchsorted(ids, wanted, sorter=order).clip(max=max(len(ids) - 1, 0))
    missing = wanted if not len(ids) else wanted[ids[order[places]] != wanted]
    if len(missing):
        raise TransferError(
            f"{len(missing)} of the student's {len(wanted)} rows are not among the teacher's, first example_id "
            f"{missing[0]}. Prepare the same split for both, from rows that already have their example_id."
        )
    return order[places]
