"""Data from anywhere into one shape: train, validation and test with known columns, names and row identities."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import TransferError
from .columns import EXAMPLE_ID, Columns, class_ids, infer, values
from .identity import SPLITS, add_example_id
from .labels import encode, without_hidden_labels
from .readers import read
from .splits import stratified_order

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

logger = logging.getLogger(__name__)

_ALIASES = {
    "training": "train", "valid": "validation", "val": "validation", "dev": "validation", "eval": "validation",
    "testing": "test",
}  # fmt: skip


@dataclass
class Data:
    """A data set, ready to be prepared for a backbone.

    Attributes:
        splits: "train", and "validation" and "test" as present; every row has an `example_id`.
        columns: What the columns mean.
        labels: Names of the classes in id order; None for regression and language modelling.
        name: What to call the data in a report; no local path.
        fingerprint: Hash of the rows in use: which they are, all their labels, and the content of a sample of them.
        selection: How the validation rows came to be, in words.
    """

    splits: DatasetDict
    columns: Columns
    labels: list[str] | None
    name: str
    fingerprint: str
    selection: str

    @property
    def outputs(self) -> int | None:
        """How many numbers a row's label is, in regression; None otherwise."""
        if self.columns.task != "regression" or self.columns.label is None:
            return None
        return int(np.size(values(self.splits["train"].select([0]), self.columns.label)[0]))


def load_data(
    source: str | Path | Dataset | DatasetDict | Mapping[str, Dataset],
    *,
    input_column: str | None = None,
    label_column: str | None = None,
    task: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    validation: float = 0.1,
    seed: int = 0,
) -> Data:
    """Loads data and settles all that can be wrong with it before any work.

    Args:
        source: A Hub id (`id` or `id:config`); a folder of images by class; a folder with
            `train|validation|test.parquet` (or csv, json, jsonl); one such file; "digits" (scikit-learn's handwritten
            digits, no network); a Dataset, a DatasetDict, or a mapping of splits.
        input_column: The input, if it cannot be inferred.
        label_column: The label, if it cannot be inferred.
        task: "causal-lm" for text without labels, "regression" to read whole numbers as numbers; any other must be
            what the columns say.
        max_train_samples: Train on a seeded, stratified subset of so many rows.
        max_eval_samples: Evaluate on the first so many rows of validation and of test, the same for every run.
        validation: Share of train, in [0, 1), that is held out where the data has no validation split; stratified and
            seeded. 0 holds out nothing. Test rows are never used for it.
        seed: Seed of the hold-out and of the subset.

    Raises:
        TransferError: If the source cannot be found or read, or its columns, labels or splits do not serve.
    """
    from datasets import DatasetDict

    if not 0 <= validation < 1:
        raise TransferError(f"validation={validation}: the share of train to hold out must be in [0, 1).")
    name, found = read(source)
    splits = DatasetDict({s: add_example_id(rows, s) for s, rows in _known_splits(found).items()})
    columns = infer(splits["train"], input_column=input_column, label_column=label_column, task=task)
    _check_inputs(splits, columns)
    splits, hidden = without_hidden_labels(_as_media(splits, columns), columns)
    splits, labels = encode(splits, columns)
    splits, selection = _with_validation(splits, columns, validation, seed)
    if hidden:
        selection += f"; {' and '.join(hidden)} left out: no labels"
    splits = _limited(splits, columns, max_train_samples, max_eval_samples, seed)
    _check_unique(splits)
    logger.info("%s: %s; %s", name, ", ".join(f"{s} {len(d)} rows" for s, d in splits.items()), selection)
    return Data(splits, columns, labels, name, fingerprint(splits, columns), selection)


def fingerprint(splits: DatasetDict, columns: Columns, sample: int = 64) -> str:
    """A hash of the rows, equal on every machine: their identities and labels, and the content of `sample` a split."""
    digest = hashlib.sha256()
    for split, dataset in splits.items():
        chosen = np.unique(np.linspace(0, len(dataset) - 1, min(sample, len(dataset))).astype(int))
        labels = None if columns.label is None else values(dataset, columns.label)
        digest.update(json.dumps([split, values(dataset, EXAMPLE_ID), labels], default=str).encode())
        inputs = [c for c in (columns.input, columns.pair) if c is not None]
        for row in _undecoded(dataset, columns).select(chosen).select_columns(inputs):
            for column in inputs:
                digest.update(_content(row[column]))
    return digest.hexdigest()[:16]


def _content(value: Any) -> bytes:
    if isinstance(value, dict):  # a file: its bytes, and never the path where this machine keeps it
        if value["bytes"] is not None:
            return value["bytes"]
        path = Path(value["path"] or "")
        return path.read_bytes() if path.is_file() else path.name.encode()
    return json.dumps(value).encode()


def _known_splits(found: Mapping[str, Dataset]) -> dict[str, Dataset]:
    named = {_ALIASES.get(name, name): dataset for name, dataset in found.items()}
    splits = {name: _plain(named[name], name) for name in SPLITS if name in named}
    ignored = sorted(set(named) - set(SPLITS))
    if "train" not in splits:
        raise TransferError(
            f"The data has no train split; its splits are {', '.join(sorted(found))}. Pass a mapping, e.g. "
            f"load_data({{'train': dataset[{next(iter(found), 'all')!r}]}})."
        )
    if ignored:
        logger.warning("splits %s are not used: known names are train, validation and test", ", ".join(ignored))
    for name, dataset in splits.items():
        if not len(dataset):
            raise TransferError(f"Split {name!r} is empty: give it rows, or leave it out.")
    return splits


def _plain(dataset: Dataset, split: str) -> Dataset:
    """The dataset without a format. One with a transform is refused: dropping that would change the data."""
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise TransferError(
            f"Split {split!r} is a {type(dataset).__name__}; a datasets.Dataset is needed. For a stream: "
            "Dataset.from_list(list(stream.take(n)))."
        )
    if dataset.format["type"] == "custom":
        raise TransferError(
            f"Split {split!r} carries a transform (with_transform), which hides its columns. Pass the data without: "
            "dataset.with_format(None)."
        )
    return dataset.with_format(None)


def _check_inputs(splits: DatasetDict, columns: Columns) -> None:
    for split, dataset in splits.items():
        for column in (columns.input, columns.pair):
            if column is not None and column not in dataset.column_names:
                raise TransferError(
                    f"Split {split!r} has no column {column!r}, which is the input in train. Its columns: "
                    f"{', '.join(dataset.column_names)}."
                )


def _as_media(splits: DatasetDict, columns: Columns) -> DatasetDict:
    """Gives images and sounds that are stored as plain {bytes, path} their type. Sounds stay undecoded."""
    from datasets import Audio, Image

    feature = {"image": Image(), "audio": Audio(decode=False)}.get(columns.modality)
    return splits if feature is None else splits.cast_column(columns.input, feature)


def _undecoded(dataset: Dataset, columns: Columns) -> Dataset:
    from datasets import Image

    return dataset.cast_column(columns.input, Image(decode=False)) if columns.modality == "image" else dataset


def _with_validation(splits: DatasetDict, columns: Columns, share: float, seed: int) -> tuple[DatasetDict, str]:
    """Holds validation rows out of train where the data has none."""
    if "validation" in splits:
        return splits, "validation: the data's own split"
    train = splits["train"]
    held_out = round(len(train) * share)
    if share == 0:
        return splits, "no validation split: none in the data, none held out"
    if not 0 < held_out < len(train):
        raise TransferError(
            f"Nothing can be held out for validation: {share} of {len(train)} train rows. Pass validation=0, a larger "
            "share, or a validation split."
        )
    classes = None if columns.label is None else class_ids(train, columns.label)
    order = stratified_order(classes, len(train), seed)
    rest, held = np.sort(order[:-held_out]), order[-held_out:]
    splits = type(splits)({**splits, "train": train.select(rest), "validation": train.select(held)})
    how = "at random" if classes is None else "stratified by class"
    return (
        type(splits)({name: splits[name] for name in SPLITS if name in splits}),
        f"validation: {held_out} rows ({share:.0%}) held out of train, {how}, seed {seed}",
    )


def _limited(
    splits: DatasetDict, columns: Columns, max_train: int | None, max_eval: int | None, seed: int
) -> DatasetDict:
    for name, limit in (("max_train_samples", max_train), ("max_eval_samples", max_eval)):
        if limit is not None and limit < 1:
            raise TransferError(f"{name}={limit}: it must be at least 1, or None for all rows.")
    limited = dict(splits)
    if max_train is not None and max_train < len(splits["train"]):
        limited["train"] = _subset(splits["train"], columns, max_train, seed)
    if max_eval is not None:
        for name in set(splits) - {"train"}:
            limited[name] = splits[name].select(range(min(max_eval, len(splits[name]))))
    return type(splits)(limited)


def _subset(train: Dataset, columns: Columns, rows: int, seed: int) -> Dataset:
    classes = None if columns.label is None else class_ids(train, columns.label)
    needed = 1 if classes is None else len(np.unique(classes))
    if rows < needed:
        raise TransferError(
            f"max_train_samples={rows} leaves classes without an example in train: there are {needed} classes."
        )
    return train.select(np.sort(stratified_order(classes, len(train), seed)[:rows]))


def _check_unique(splits: DatasetDict) -> None:
    """Rows that bring an example_id of their own must not share one over splits."""
    ids = np.concatenate([values(dataset, EXAMPLE_ID) for dataset in splits.values()])
    if len(np.unique(ids)) != len(ids):
        raise TransferError(
            f"The splits share values of {EXAMPLE_ID!r}: a row is in two of them, or each split counts from 0. Remove "
            f"the column (remove_columns({EXAMPLE_ID!r})) to have rows numbered, and check that test is not in train."
        )
