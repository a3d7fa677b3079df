"""Which column is the input, which the label, and what they are: image, text, tokens or audio; class or number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import TransferError

if TYPE_CHECKING:
    from datasets import Dataset

    from ..backbones import Backbone
    from .stored_rows import StoredRows

Modality = Literal["image", "text", "tokens", "audio"]

LABELS, DOMAIN, EXAMPLE_ID = "labels", "domain", "example_id"  # the data contract's own columns
EPOCH = "epoch"  # on training rows only, between transform and collator
INPUT_NAMES = ("image", "img", "text", "sentence", "tokens", "audio")
LABEL_NAMES = ("label", "labels", "ner_tags", "tags", "target", "class")
PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"), ("question1", "question2"),
    ("text1", "text2"),
)  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """What the columns of a dataset mean.

    Attributes:
        input: The column a model reads.
        label: The column it learns to predict; None for language modelling.
        modality: What the input is; tokens are text that is already cut into words.
        task: One of `hf_transfer.backbones.TASKS`.
        pair: The second text column, for sentence pairs, and the completion where `input` is a prompt.
    """

    input: str
    label: str | None
    modality: Modality
    task: str
    pair: str | None = None


def infer(
    dataset: Dataset,
    *,
    input_column: str | None = None,
    label_column: str | None = None,
    task: str | None = None,
) -> Columns:
    """Finds input and label by the columns' types, then by their usual names.

    Args:
        dataset: Any split of the data.
        input_column: The input, where it is known.
        label_column: The label, where it is known.
        task: "causal-lm" for text without labels, "regression" to read whole numbers as numbers; any other must be
            what the columns say.

    Raises:
        TransferError: If a named column is missing, if none or several columns qualify, or if the task is another.
    """
    if task == "causal-lm":
        return _language_modelling(dataset, input_column)
    name, modality, pair = infer_input(dataset, input_column, exclude=(label_column,))
    label = infer_label(dataset, label_column, tokens=modality == "tokens", exclude=(name, pair))
    numbers = _is_float(dataset.features[label]) or task == "regression"
    kind = "token" if modality == "tokens" else modality
    found = "regression" if numbers and modality != "tokens" else f"{kind}-classification"
    if task not in (None, found):
        raise TransferError(
            f"task={task!r}, but input {name!r} ({_kind(dataset.features[name])}) and label {label!r} "
            f"({_kind(dataset.features[label])}) are data for {found}. Leave the task out, or name other columns by "
            "input_column and label_column."
        )
    return Columns(name, label, modality, found, pair)


def infer_input(
    dataset: Dataset, input_column: str | None = None, *, exclude: Iterable[str | None] = ()
) -> tuple[str, Modality, str | None]:
    """The input column, its modality, and the second text of a sentence pair.

    Raises:
        TransferError: If the column is missing or of no known type, or if none or several columns qualify.
    """
    features = dataset.features
    if input_column is not None:
        _check_present(dataset, input_column, "input_column")
        modality = modality_of(dataset, input_column)
        if modality is None:
            raise TransferError(
                f"input_column={input_column!r} is {_kind(features[input_column])}, which no backbone reads: an input "
                "is Image(), Audio(), a string or a list of strings. Cast it, e.g. "
                f"dataset.cast_column({input_column!r}, datasets.Image())."
            )
        return input_column, modality, None
    hidden = {*exclude, DOMAIN, EXAMPLE_ID}
    found = {c: m for c in features if c not in hidden and (m := modality_of(dataset, c)) is not None}
    for first, second in PAIRS:
        if found.get(first) == found.get(second) == "text" and not set(found) & set(INPUT_NAMES):
            return first, "text", second
    if not set(LABEL_NAMES) >= set(found):  # a string label is no input, unless nothing else is there
        found = {c: m for c, m in found.items() if c not in LABEL_NAMES}
    usual = [c for c in found if c in INPUT_NAMES]
    chosen = usual if len(usual) == 1 else list(found)
    if len(chosen) != 1:
        problem = f"{len(chosen)} columns could be the input ({', '.join(chosen)})" if chosen else "No input column"
        raise TransferError(
            f"{problem}. {_listing(dataset)} Pass input_column=..., naming an image, audio, text or tokens column."
        )
    return chosen[0], found[chosen[0]], None


def infer_label(
    dataset: Dataset,
    label_column: str | None = None,
    *,
    tokens: bool = False,
    exclude: Iterable[str | None] = (),
) -> str:
    """The label column: the one named so, else the only one that holds classes.

    Args:
        dataset: Any split of the data.
        label_column: The label, where it is known.
        tokens: Whether there is a label for every word, so that a label is a list.
        exclude: Columns that are something else.

    Raises:
        TransferError: If the column is missing, or if none or several columns qualify.
    """
    if label_column is not None:
        _check_present(dataset, label_column, "label_column")
        return label_column
    candidates = {
        name: feature
        for name, feature in dataset.features.items()
        if name not in {*exclude, DOMAIN, EXAMPLE_ID} and (_is_list(feature) or not tokens)
    }
    named = [name for name in candidates if name in LABEL_NAMES]
    classes = [name for name, feature in candidates.items() if _holds_classes(feature, tokens)]
    chosen = named if len(named) == 1 else [name for name in named if name in classes] or named or classes
    if len(chosen) != 1:
        problem = f"{len(chosen)} columns could be the label ({', '.join(chosen)})" if chosen else "No label column"
        raise TransferError(f"{problem}. {_listing(dataset)} Pass label_column=... to name it.")
    return chosen[0]


def modality_of(dataset: Dataset, column: str) -> Modality | None:
    """What a column holds, or None if no backbone reads it.

    Files kept as plain `{bytes, path}` structs (what a writer without `datasets` leaves) are told by their content.
    """
    from datasets import Audio, Image, Value

    feature = dataset.features[column]
    if isinstance(feature, Image):
        return "image"
    if isinstance(feature, Audio):
        return "audio"
    if isinstance(feature, Value):
        return "text" if "string" in feature.dtype else None
    if _is_list(feature):
        inner = feature.feature
        return "tokens" if isinstance(inner, Value) and "string" in inner.dtype else None
    if isinstance(feature, dict) and set(feature) == {"bytes", "path"} and len(dataset):
        return _file_modality(dataset.with_format(None)[0][column])
    return None


def check_fits(backbone_modality: str, columns: Columns) -> None:
    """Raises TransferError where a backbone cannot read the data's input.

    Args:
        backbone_modality: "image", "text" or "audio".
        columns: What the data's columns mean.
    """
    needed: dict[Modality, str] = {"image": "image", "text": "text", "tokens": "text", "audio": "audio"}
    if needed[columns.modality] == backbone_modality:
        return
    hint = ""
    if columns.modality == "text":
        cast = {"image": "Image", "audio": "Audio"}.get(backbone_modality)
        hint = (
            f" If it holds paths of files, dataset.cast_column({columns.input!r}, datasets.{cast}())." if cast else ""
        )
    raise TransferError(
        f"The backbone reads {backbone_modality}, and column {columns.input!r} holds {columns.modality}. Pass "
        f"input_column=... to name a column of {backbone_modality}, or choose a {needed[columns.modality]} backbone."
        + hint
    )


def check_processor(backbone: Backbone) -> None:
    """Raises TransferError where a backbone came without what prepares its input."""
    if backbone.modality != "image" and backbone.processor is None:
        kind = {"text": "tokenizer", "audio": "feature extractor"}[backbone.modality]
        raise TransferError(
            f"The backbone {backbone.name!r} came without a {kind}. Load the one that it was trained with, e.g. "
            f"backbone.processor = transformers.Auto{'Tokenizer' if kind == 'tokenizer' else 'FeatureExtractor'}"
            ".from_pretrained(...)."
        )


def values(dataset: Dataset | StoredRows, column: str) -> list[Any]:
    """A column's stored values, past any transform that the dataset carries, and without decoding another column."""
    from .stored_rows import StoredRows

    if isinstance(dataset, StoredRows):
        return dataset.columns[column]
    return list(dataset.with_format(None).select_columns([column])[:][column])


def list_lengths(dataset: Dataset, column: str) -> np.ndarray:
    """(N,) int64 how many items a column of lists has in each row; reads none of them."""
    table: Any = dataset.with_format("arrow").select_columns([column])[:]
    chunks = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in table[column].chunks]
    return np.concatenate([np.empty(0), *chunks]).astype(np.int64)


def class_ids(dataset: Dataset, label_column: str) -> np.ndarray | None:
    """(N,) int64 class of each row; None where a row has no one class (numbers, a label for every word)."""
    from datasets import ClassLabel, Value

    feature = dataset.features[label_column]
    if isinstance(feature, Value) and "string" in feature.dtype:
        return np.unique(np.asarray(values(dataset, label_column), dtype=str), return_inverse=True)[1]
    if isinstance(feature, ClassLabel) or (isinstance(feature, Value) and _is_whole(feature)):
        return np.asarray(values(dataset, label_column), dtype=np.int64)
    return None


def _language_modelling(dataset: Dataset, input_column: str | None) -> Columns:
    if input_column is None and {"prompt", "completion"} <= set(dataset.features):
        return Columns("prompt", None, "text", "causal-lm", pair="completion")
    name, modality, _ = infer_input(dataset, input_column)
    if modality != "text":
        raise TransferError(f"Language modelling reads text, and column {name!r} holds {modality}.")
    return Columns(name, None, "text", "causal-lm")


def _check_present(dataset: Dataset, column: str, argument: str) -> None:
    if column not in dataset.features:
        raise TransferError(f"{argument}={column!r} is not a column of the data. {_listing(dataset)}")


def _listing(dataset: Dataset) -> str:
    return f"Its columns: {', '.join(f'{name} ({_kind(f)})' for name, f in dataset.features.items())}."


def _kind(feature: Any) -> str:
    from datasets import ClassLabel, Value

    if isinstance(feature, ClassLabel):
        return f"{feature.num_classes} classes"
    if isinstance(feature, Value):
        return feature.dtype
    if _is_list(feature):
        return f"list of {_kind(feature.feature)}"
    return "struct" if isinstance(feature, dict) else type(feature).__name__


def _is_list(feature: Any) -> bool:
    from datasets import LargeList, List

    return isinstance(feature, (List, LargeList))


def _innermost(feature: Any) -> Any:
    return _innermost(feature.feature) if _is_list(feature) else feature


def _is_float(feature: Any) -> bool:
    dtype = getattr(_innermost(feature), "dtype", "")
    return dtype.startswith(("float", "double"))


def _is_whole(feature: Any) -> bool:
    return feature.dtype.startswith(("int", "uint", "bool"))


def _holds_classes(feature: Any, tokens: bool) -> bool:
    from datasets import ClassLabel, Value

    inner = feature.feature if tokens and _is_list(feature) else feature
    return isinstance(inner, ClassLabel) or (tokens and isinstance(inner, Value) and _is_whole(inner))


def _file_modality(value: dict[str, Any] | None) -> Modality | None:
    """Image or audio, by trying to read the file's header."""
    if value is None:
        return None
    content = BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]
    readers: tuple[tuple[Modality, Callable[[Any], Any]], ...] = (("image", _image_header), ("audio", _audio_header))
    for modality, reader in readers:
        if reader(content):
            return modality
        if isinstance(content, BytesIO):
            content.seek(0)
    return None


def _image_header(content: Any) -> bool:
    from PIL import Image, UnidentifiedImageError

    try:
        Image.open(content)
    except (UnidentifiedImageError, OSError):
        return False
    return True


def _audio_header(content: Any) -> bool:
    from .decoding import soundfile

    try:
        soundfile().info(content)
    except RuntimeError:  # soundfile.LibsndfileError
        return False
    return True
