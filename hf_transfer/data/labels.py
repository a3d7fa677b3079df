"""Labels as contiguous classes with names, the same over all splits and the same as the model's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import TransferError
from .columns import Columns, values

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)

UNLABELLED = -100
MISSING = -1  # what datasets writes for a row without a class, as in the hidden test sets of benchmarks


def encode(splits: DatasetDict, columns: Columns) -> tuple[DatasetDict, list[str] | None]:
    """Makes every split's label a ClassLabel of the same names, or leaves numbers as they are.

    Strings are sorted; whole numbers must be 0..n-1 in train and are named so; ClassLabels keep train's order, and a
    split that orders the names otherwise is re-numbered by name.

    Args:
        splits: The data, by split.
        columns: What its columns mean.

    Returns:
        The splits, and the names in id order; None for regression and language modelling.

    Raises:
        TransferError: If labels are null, not contiguous, of different types by split, or in no train row.
    """
    if columns.label is None:
        return splits, None
    read = {name: _Labels(split, columns.label, name) for name, split in splits.items()}
    if columns.task == "regression":
        for name, labels in read.items():
            if labels.kind not in ("number", "int"):
                raise TransferError(
                    f"task='regression', but column {columns.label!r} of {name} holds {labels.kind} labels, not "
                    "numbers."
                )
        return splits, None
    names = _names(read, columns.label)
    encoded = type(splits)({name: labels.as_class_label(names) for name, labels in read.items()})
    _check_classes({name: labels.ids(names) for name, labels in read.items()}, names, columns)
    return encoded, names


def without_hidden_labels(splits: DatasetDict, columns: Columns) -> tuple[DatasetDict, list[str]]:
    """Drops the evaluation splits in which no row has a label, as benchmarks publish their test sets.

    Returns:
        The splits, and the names of those dropped.
    """
    dropped = [name for name, split in splits.items() if name != "train" and _is_hidden(split, columns.label)]
    return type(splits)({name: split for name, split in splits.items() if name not in dropped}), dropped


def align(dataset: Dataset, label_column: str, model_labels: Sequence[str] | None) -> Dataset:
    """Re-numbers a dataset's classes as the model numbers them, by name.

    Args:
        dataset: Rows whose label is a ClassLabel, a list of such, or plain numbers (then only the range is checked).
        label_column: The label.
        model_labels: The model's labels in id order; None where it has none.

    Raises:
        TransferError: If a label of the data is not among the model's.
    """
    labels = _Labels(dataset, label_column, "this split")
    if model_labels is None or labels.kind == "number":
        return dataset
    if labels.names is None:
        _check_range(labels, len(model_labels))
        return dataset
    if labels.names == list(model_labels):
        return dataset
    if not set(labels.names) <= set(model_labels):
        if len(labels.names) <= len(model_labels) and _are_generic(model_labels):
            return dataset
        unknown = [name for name in labels.names if name not in set(model_labels)]
        raise TransferError(
            f"Label {unknown[0]!r} of column {label_column!r} is not among the model's labels "
            f"({_some(list(model_labels))}). Load the backbone with labels=data.labels"
            f"{f'; {len(unknown)} labels are unknown to it: {_some(unknown)}' if len(unknown) > 1 else ''}."
        )
    logger.info("re-numbered the classes of column %r as the model numbers them", label_column)
    return labels.as_class_label(list(model_labels))


class _Labels:
    """The labels of one split, whatever their type, flattened over words."""

    def __init__(self, dataset: Dataset, column: str, split: str) -> None:
        from datasets import ClassLabel, LargeList, List

        self.dataset, self.column, self.split = dataset, column, split
        feature = dataset.features[column]
        rows = values(dataset, column)
        self.lengths = (
            [len(row) for row in rows if row is not None] if isinstance(feature, (List, LargeList)) else None
        )
        nulls = [i for i, row in enumerate(rows) if row is None]
        self.flat = rows if self.lengths is None or nulls else list(chain.from_iterable(rows))
        if nulls or None in self.flat:
            raise TransferError(
                f"{len(nulls) or 'Some'} rows of {split} have no label in column {column!r}"
                f"{f' (the first is row {nulls[0]})' if nulls else ''}. Remove them "
                f"(dataset.filter(lambda row: row[{column!r}] is not None)), or mark them unlabelled by {UNLABELLED}."
            )
        inner = feature.feature if self.lengths is not None else feature
        self.names = list(inner.names) if isinstance(inner, ClassLabel) and inner.names else None
        dtype = str(getattr(inner, "dtype", ""))
        self.kind = (
            "class" if self.names is not None
            else "string" if "string" in dtype
            else "number" if dtype.startswith(("float", "double"))
            else "int" if dtype.startswith(("int", "uint", "bool"))
            else "other"
        )  # fmt: skip
        if self.kind == "other":
            raise TransferError(
                f"Column {column!r} cannot be a label: it holds {feature}. A label is a class, a string, a number, "
                "or a list of these."
            )

        if self.kind == "number" and not np.isfinite(np.asarray(self.flat, dtype=np.float64)).all():
            raise TransferError(f"Column {column!r} of {split} holds NaN or infinite labels. Remove those rows.")

    def ids(self, names: list[str]) -> np.ndarray:
        """(rows or words,) int64, the index of each label in `names`; -100 stays."""
        if self.kind == "string":
            index = {name: i for i, name in enumerate(names)}
            return np.asarray([index[name] for name in self.flat], dtype=np.int64)
        ids = np.asarray(self.flat, dtype=np.int64)
        if self.names is None or self.names == names:
            return ids
        index = {name: i for i, name in enumerate(names)}
        renumber = np.asarray([index.get(name, UNLABELLED) for name in self.names], dtype=np.int64)
        return np.where(ids >= 0, renumber[ids], ids)

    def as_class_label(self, names: list[str]) -> Dataset:
        """The dataset with this column as ClassLabels of these names."""
        from datasets import ClassLabel, List

        if self.names == names:
            return self.dataset
        feature: Any = ClassLabel(names=names)
        column: Any = self.ids(names)
        if self.lengths is not None:
            feature = List(feature)
            column = [part.tolist() for part in np.split(column, np.cumsum(self.lengths)[:-1])]
        return replace_column(self.dataset, self.column, column, feature)


def replace_column(dataset: Dataset, column: str, new: Any, feature: Any) -> Dataset:
    """Gives a column new values and type, without touching the others' storage."""
    order = dataset.column_names
    replaced = dataset.remove_columns(column).add_column(column, new, feature=feature)
    return replaced.select_columns(order)


def _names(read: dict[str, _Labels], column: str) -> list[str]:
    """The names of all classes in id order, as the train split has them."""
    kinds = {name: labels.kind for name, labels in read.items()}
    if "string" in kinds.values() and "int" in kinds.values():
        raise TransferError(
            f"Column {column!r} holds "
            + ", ".join(f"{kind}s in {split}" for split, kind in kinds.items())
            + ": give all splits one type."
        )
    train = read["train"]
    if train.names is not None:
        known = set(train.names)
        for split, labels in read.items():
            used = _used_names(labels)
            _refuse_unknown(sorted(used - known), split, column, known)
        return train.names
    if train.kind == "string":
        names = sorted(set(train.flat))
        for split, labels in read.items():
            _refuse_unknown(sorted(_used_names(labels) - set(names)), split, column, set(names))
        return names
    return _names_of_numbers(read, column)


def _names_of_numbers(read: dict[str, _Labels], column: str) -> list[str]:
    named = [labels.names for labels in read.values() if labels.names is not None]
    if named:  # a split that lost its metadata: the numbers are those of the split that has names
        return named[0]
    used = sorted({int(label) for label in read["train"].flat} - {UNLABELLED})
    if used != list(range(len(used))):
        mapping = {old: new for new, old in enumerate(used)}
        raise TransferError(
            f"The labels in column {column!r} of train are {_some(used)}: classes must be 0, 1, 2, ... without gaps. "
            f"Re-number them, dataset.map(lambda row: {{{column!r}: {_some_mapping(mapping)}[row[{column!r}]]}}), or "
            'store them as strings, which are numbered here. Are they quantities? Then pass task="regression".'
        )
    for split, labels in read.items():
        unknown = sorted({int(label) for label in labels.flat} - {UNLABELLED, *used})
        _refuse_unknown([str(label) for label in unknown], split, column, {str(label) for label in used})
    if all(isinstance(label, bool) for label in read["train"].flat):
        return ["False", "True"][: len(used)]
    return [str(label) for label in used]


def _used_names(labels: _Labels) -> set[str]:
    if labels.names is None:
        return set(labels.flat) if labels.kind == "string" else set()
    return {labels.names[label] for label in set(labels.flat) if label >= 0}


def _refuse_unknown(unknown: list[str], split: str, column: str, known: set[str]) -> None:
    if unknown:
        raise TransferError(
            f"Label {unknown[0]!r} in column {column!r} of {split} is in no row of train"
            f"{f' (nor are {len(unknown) - 1} others)' if len(unknown) > 1 else ''}: a model cannot learn it. Train "
            f"has {_some(sorted(known))}. Correct the label, or leave those rows out of {split}."
        )


def _check_classes(ids: dict[str, np.ndarray], names: list[str], columns: Columns) -> None:
    """Range, missing labels, and one train example a class."""
    for split, labels in ids.items():
        outside = np.unique(labels[(labels >= len(names)) | ((labels < 0) & (labels != UNLABELLED))])
        if len(outside):
            raise TransferError(
                f"Label {outside[0]} in column {columns.label!r} of {split} is outside 0..{len(names) - 1} "
                f"({int(np.isin(labels, outside).sum())} rows): {MISSING} means that the label is missing. Filter "
                f"those rows out, or mark them unlabelled by {UNLABELLED}."
            )
    counts = np.bincount(ids["train"][ids["train"] >= 0], minlength=len(names))
    absent = [names[i] for i in np.flatnonzero(counts == 0)]
    if not absent:
        return
    if columns.modality == "tokens":  # rare entity types are often absent, and their other half (B- or I-) is not
        logger.warning("no example in train of the labels %s", _some(absent))
        return
    raise TransferError(
        f"Class {absent[0]!r} has no example in train"
        f"{f' (nor have {len(absent) - 1} others: {_some(absent[1:])})' if len(absent) > 1 else ''}. Add one, raise "
        "max_train_samples, or leave the class out with hf_transfer.data.splits.keep_classes()."
    )


def _check_range(labels: _Labels, classes: int) -> None:
    used = {int(label) for label in labels.flat} - {UNLABELLED}
    outside = sorted(label for label in used if not 0 <= label < classes)
    if outside:
        raise TransferError(
            f"Label {outside[0]} in column {labels.column!r} is outside the model's labels 0..{classes - 1}. Load the "
            "backbone with labels=data.labels, or correct the label."
        )


def _is_hidden(split: Dataset, label: str | None) -> bool:
    if label is None:
        return False
    if label not in split.column_names:
        return True
    return bool(len(split)) and all(value is None or _equals_missing(value) for value in values(split, label))


def _equals_missing(value: Any) -> bool:
    return not isinstance(value, (str, list)) and value == MISSING


def _are_generic(names: Sequence[str]) -> bool:
    """Whether names only count: LABEL_0, LABEL_1 ... or 0, 1 ..."""
    forms: tuple[Callable[[int], str], ...] = (str, "LABEL_{}".format)
    return any(all(name == form(i) for i, name in enumerate(names)) for form in forms)


def _some(items: Sequence[Any], most: int = 10) -> str:
    shown = ", ".join(str(item) for item in items[:most])
    return f"{shown}, ... ({len(items)} in all)" if len(items) > most else shown


def _some_mapping(mapping: dict[int, int], most: int = 10) -> str:
    shown = ", ".join(f"{old}: {new}" for old, new in list(mapping.items())[:most])
    return f"{{{shown}{', ...' if len(mapping) > most else ''}}}"
