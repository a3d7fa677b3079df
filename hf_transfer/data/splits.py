"""Cutting data: stratified splits and folds, few-shot subsets, and two domains put together.

Every function takes rows apart or puts them together; none changes a row's `example_id`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import TransferError
from .columns import DOMAIN, EXAMPLE_ID, Columns, class_ids, infer_input, infer_label, values
from .identity import add_example_id, first_id
from .labels import UNLABELLED, replace_column

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


def stratified_order(classes: np.ndarray | None, rows: int, seed: int) -> np.ndarray:
    """A random order of rows of which every prefix has the classes in their proportions, as near as whole rows allow.

    The first rows are one of each class; so a prefix of at least as many rows as classes holds every class, and a
    suffix is a stratified hold-out that leaves each class an example.

    Args:
        classes: (N,) integers; None for rows without classes, which are shuffled.
        rows: N.
        seed: Same seed, same order.

    Returns:
        (N,) positions.
    """
    generator = np.random.default_rng(seed)
    classes = np.zeros(rows, dtype=np.int64) if classes is None else classes
    place = np.zeros(rows)
    for one in np.unique(classes):
        members = generator.permutation(np.flatnonzero(classes == one))
        place[members] = (np.arange(len(members)) + generator.random()) / len(members)  # evenly spaced in (0, 1)
        place[members[0]] = -generator.random()  # in front of all
    return np.argsort(place, kind="stable")


def stratified_split(
    dataset: Dataset, fractions: Mapping[str, float], *, label_column: str | None = None, seed: int = 0
) -> DatasetDict:
    """Cuts a dataset into named parts with equal shares of each class.

    Args:
        dataset: The rows. Numbers and word labels have no classes to balance: their rows are cut at random.
        fractions: Share of the rows by part, each in (0, 1], summing to 1 at most; e.g. {"train": 0.8, "test": 0.2}.
            The first part is given an example of every class before the others.
        label_column: The label; found by name if None.
        seed: Same seed, same parts.

    Raises:
        TransferError: If the fractions are not shares, or a part would be empty.
    """
    from datasets import DatasetDict

    total = sum(fractions.values())
    if not fractions or any(not 0 < share <= 1 for share in fractions.values()) or total > 1 + 1e-9:
        raise TransferError(f"fractions={dict(fractions)}: each must be in (0, 1], and their sum at most 1.")
    classes = class_ids(dataset, label_column or infer_label(dataset))
    order = stratified_order(classes, len(dataset), seed)
    ends = np.rint(np.cumsum(list(fractions.values())) * len(dataset)).astype(int)
    parts = np.split(order, ends)[: len(fractions)]
    for name, part in zip(fractions, parts, strict=True):
        if not len(part):
            raise TransferError(f"Split {name!r} would be empty: {fractions[name]} of {len(dataset)} rows.")
    return DatasetDict({name: dataset.select(np.sort(part)) for name, part in zip(fractions, parts, strict=True)})


def kfold(
    dataset: Dataset, k: int = 5, *, label_column: str | None = None, seed: int = 0
) -> Iterator[tuple[Dataset, Dataset]]:
    """Stratified k-fold cross-validation.

    Args:
        dataset: The rows.
        k: Number of folds, >= 2 and at most the size of the smallest class.
        label_column: The label; found by name if None.
        seed: Same seed, same folds.

    Returns:
        k pairs (train, validation); every row is in exactly one validation part.

    Raises:
        TransferError: If k is out of range. Raised at once, not at the first pair.
    """
    from sklearn.model_selection import KFold, StratifiedKFold

    classes = class_ids(dataset, label_column or infer_label(dataset))
    smallest = (
        len(dataset) if classes is None else int(np.unique(classes, return_counts=True)[1].min(initial=len(dataset)))
    )
    if not 2 <= k <= smallest:
        what = "number of rows" if classes is None else "size of the smallest class"
        raise TransferError(f"k={k} folds: k must be between 2 and the {what}, {smallest}.")
    folder = KFold if classes is None else StratifiedKFold
    pairs = folder(k, shuffle=True, random_state=seed).split(np.zeros(len(dataset)), classes)
    return ((dataset.select(train), dataset.select(held_out)) for train, held_out in pairs)


def few_shot(dataset: Dataset, n: int, *, label_column: str | None = None, seed: int = 0) -> Dataset:
    """n rows of every class, drawn at random.

    Args:
        dataset: Rows with one class each; unlabelled rows (-100) are left out.
        n: Rows a class, >= 1.
        label_column: The label; found by name if None.
        seed: Same seed, same rows; and for n < m, the n rows are among the m.

    Raises:
        TransferError: If a class has fewer than n rows, or the label is no class.
    """
    column = label_column or infer_label(dataset)
    classes = class_ids(dataset, column)
    if classes is None:
        raise TransferError(f"few_shot needs one class a row, and column {column!r} holds {dataset.features[column]}.")
    kinds, counts = np.unique(classes[classes != UNLABELLED], return_counts=True)
    if not len(kinds):
        raise TransferError(f"few_shot: no row has a label in column {column!r}.")
    if not 1 <= n <= counts.min():
        raise TransferError(
            f"few_shot of n={n} rows a class: the smallest class, "
            f"{_class_name(dataset, column, int(kinds[counts.argmin()]))}, has {counts.min()} rows. Choose n between "
            "1 and that, or leave the class out with keep_classes()."
        )
    generator = np.random.default_rng(seed)
    chosen = [generator.permutation(np.flatnonzero(classes == one))[:n] for one in kinds]
    return dataset.select(np.sort(np.concatenate(chosen)))


def keep_classes(dataset: Dataset, names: Sequence[str], *, label_column: str | None = None) -> Dataset:
    """The rows of some classes, which are numbered 0, 1, ... in the order given.

    Args:
        dataset: Rows whose label is a ClassLabel.
        names: The classes to keep.
        label_column: The label; found by name if None.

    Raises:
        TransferError: If a name is not a class of the data.
    """
    from datasets import ClassLabel

    column = label_column or infer_label(dataset)
    feature = dataset.features[column]
    known = feature.names if isinstance(feature, ClassLabel) else []
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise TransferError(f"keep_classes: {unknown or 'nothing'} is not among the classes of {column!r}: {known}.")
    ids = np.asarray(values(dataset, column))
    wanted = [known.index(name) for name in names]
    kept = np.flatnonzero(np.isin(ids, wanted))
    renumber = {old: new for new, old in enumerate(wanted)}
    new_ids = np.asarray([renumber[i] for i in ids[kept]], dtype=np.int64)
    return replace_column(dataset.select(kept), column, new_ids, ClassLabel(names=list(names)))


def combine(*, source: Dataset, target: Dataset, columns: Columns | None = None) -> Dataset:
    """One training set of two domains: labelled source rows (`domain` 0) and unlabelled target rows (`domain` 1).

    The target's labels are set to -100: they are not in the result at all. Columns other than input, label and
    `example_id` are dropped; the target's input column takes the source's name.

    Args:
        source: Labelled rows.
        target: Rows of the same kind of input; with or without labels.
        columns: What the source's columns mean; inferred if None.

    Returns:
        The source's rows, then the target's. Labels are plain int64 (the source's numbering), or floats.

    Raises:
        TransferError: If the two inputs are of different kinds, or a side is empty.
    """
    from datasets import Features, Value, concatenate_datasets

    from .columns import infer

    columns = columns or infer(source)
    if columns.label is None or columns.modality == "tokens" or columns.pair is not None:
        raise TransferError("combine() puts together images, single texts or audio with one label a row.")
    target_input, modality, _ = infer_input(target, columns.input if columns.input in target.column_names else None)
    if modality != columns.modality:
        raise TransferError(
            f"source's {columns.input!r} holds {columns.modality}, target's {target_input!r} holds {modality}: a "
            "model reads one of them."
        )
    for name, side in (("source", source), ("target", target)):
        if not len(side):
            raise TransferError(f"combine(): {name} has no rows.")
    label = columns.label
    numeric = "float32" if columns.task == "regression" else "int64"
    inputs = source.features[columns.input]
    wanted = Features(
        {columns.input: inputs, label: Value(numeric), EXAMPLE_ID: Value("int64"), DOMAIN: Value("int64")}
    )
    labels = np.asarray(values(source, label), dtype=numeric)
    sides = [
        _side(source, columns.input, columns.input, label, labels, 0, wanted),
        _side(target, target_input, columns.input, label, np.full(len(target), UNLABELLED, numeric), 1, wanted),
    ]
    return concatenate_datasets(sides)


def _side(
    dataset: Dataset, old: str, new: str, label: str, labels: np.ndarray, domain: int, features: Mapping
) -> Dataset:
    """One domain's rows with exactly the columns of `features`."""
    dataset = add_example_id(dataset.with_format(None))
    ids = np.asarray(values(dataset, EXAMPLE_ID), dtype=np.int64) + first_id("train", domain)
    # The cast comes first: select_columns leaves blocks without columns, whose number of rows a cast forgets.
    bare = dataset.cast_column(old, features[new]).select_columns([old])
    bare = bare if old == new else bare.rename_column(old, new)
    for name, column in (
        (label, labels), (EXAMPLE_ID, ids), (DOMAIN, np.full(len(dataset), domain, dtype=np.int64)),
    ):  # fmt: skip
        bare = bare.add_column(name, column, feature=features[name])
    return bare


def _class_name(dataset: Dataset, column: str, class_id: int) -> str:
    names = getattr(dataset.features[column], "names", None)
    return repr(names[class_id] if names else class_id)
