"""Labels: named, contiguous, the same in all splits and in the model; each fault is one error."""

from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from hf_transfer.data.columns import Columns
from hf_transfer.data.labels import align, encode, without_hidden_labels
from hf_transfer.errors import TransferError

TEXT = Columns("text", "label", "text", "text-classification")
WORDS = Columns("text", "label", "tokens", "token-classification")


def split(labels: list, feature=None) -> Dataset:
    data = Dataset.from_dict({"text": ["x"] * len(labels), "label": labels})
    if feature is None:
        return data
    features = Features({"text": Value("string"), "label": feature})
    return Dataset.from_dict({"text": ["x"] * len(labels), "label": labels}, features=features)


def encoded(columns=TEXT, **splits: Dataset) -> tuple[dict[str, list], list[str]]:
    done, names = encode(DatasetDict(splits), columns)
    return {name: rows["label"][:] for name, rows in done.items()}, names


def test_strings_are_numbered_by_name_over_all_splits():
    labels, names = encoded(train=split(["b", "a", "c"]), test=split(["c", "b"]))
    assert names == ["a", "b", "c"]
    assert labels == {"train": [1, 0, 2], "test": [2, 1]}


def test_the_encoded_column_is_a_class_label_in_its_old_place():
    done, names = encode(DatasetDict(train=split(["b", "a"])), TEXT)
    assert done["train"].features["label"] == ClassLabel(names=names)
    assert done["train"].column_names == ["text", "label"]


def test_whole_numbers_are_named_by_themselves():
    assert encoded(train=split([0, 1, 2]), test=split([2])) == ({"train": [0, 1, 2], "test": [2]}, ["0", "1", "2"])


def test_booleans():
    assert encoded(train=split([True, False]), test=split([True])) == (
        {"train": [1, 0], "test": [1]}, ["False", "True"],
    )  # fmt: skip


def test_a_split_that_orders_the_names_otherwise_is_renumbered():
    train, test = ClassLabel(names=["x", "y", "z"]), ClassLabel(names=["z", "y"])
    labels, names = encoded(train=split([0, 1, 2], train), test=split([0, 0, 1], test))
    assert names == ["x", "y", "z"]
    assert labels["test"] == [2, 2, 1]


def test_a_split_that_lost_its_names_keeps_its_numbers():
    named = ClassLabel(names=["x", "y"])
    assert encoded(train=split([0, 1], named), test=split([1]))[0]["test"] == [1]
    assert encoded(train=split([0, 1]), test=split([1], named)) == ({"train": [0, 1], "test": [1]}, ["x", "y"])


def test_word_labels_from_strings():
    labels, names = encoded(WORDS, train=split([["O", "B-x"], [], ["O"]]), test=split([["B-x"]]))
    assert names == ["B-x", "O"]
    assert labels == {"train": [[1, 0], [], [1]], "test": [[0]]}


def test_unlabelled_rows_are_allowed():
    assert encoded(train=split([0, -100, 1]))[0]["train"] == [0, -100, 1]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (split([1, 2, 5]), None, r"are 1, 2, 5: classes must be 0, 1, 2.*\{1: 0, 2: 1, 5: 2\}\[row\['label'\]\]"),
        (split([0, 2]), None, r"are 0, 2: .*without gaps"),
        (split(["a", "b"]), split(["a", "zebra"]), "'zebra' in column 'label' of test is in no row of train.*a, b"),
        (split([0, 1]), split([2]), "'2' in column 'label' of test is in no row of train"),
        (
            split([0, 1], ClassLabel(names=["a", "b"])), split([0], ClassLabel(names=["zebra"])),
            "'zebra' in column 'label' of test is in no row of train",
        ),
        (split([0, 0], ClassLabel(names=["a", "b"])), None, "Class 'b' has no example in train.*keep_classes"),
        (split(["a"]), split([0]), "strings in train, ints in test: give all splits one type"),
        (split(["a", None]), None, r"1 rows of train have no label.*first is row 1.*filter.*-100"),
        (split([0, -1], ClassLabel(names=["a"])), None, "Label -1 .* outside 0..0 .*missing"),
    ],
)  # fmt: skip
def test_each_fault_is_one_error(train, test, message):
    splits = {"train": train} if test is None else {"train": train, "test": test}
    with pytest.raises(TransferError, match=message):
        encoded(**splits)


def test_what_is_no_label_is_refused():
    data = Dataset.from_dict({"text": ["x"], "label": [{"a": 1}]})
    with pytest.raises(TransferError, match="Column 'label' cannot be a label"):
        encode(DatasetDict(train=data), TEXT)


def test_a_rare_word_label_without_example_is_only_a_warning(caplog):
    feature = List(ClassLabel(names=["O", "B-x", "I-x"]))
    _, names = encoded(WORDS, train=split([[0, 1]], feature))
    assert len(names) == 3
    assert "no example in train of the labels I-x" in caplog.text


def test_quantities_are_left_alone():
    columns = Columns("text", "label", "text", "regression")
    assert encoded(columns, train=split([1.5, 7.0])) == ({"train": [1.5, 7.0]}, None)
    with pytest.raises(TransferError, match="NaN or infinite"):
        encoded(columns, train=split([1.5, float("nan")]))
    with pytest.raises(TransferError, match="holds string labels, not numbers"):
        encoded(columns, train=split(["high", "low"]))


def test_splits_whose_labels_are_hidden_are_dropped():
    feature = ClassLabel(names=["a", "b"])
    splits = DatasetDict(
        train=split([0, 1], feature),
        validation=split([-1, 0], feature),
        test=split([-1, -1], feature),
    )
    kept, dropped = without_hidden_labels(splits, TEXT)
    assert (set(kept), dropped) == ({"train", "validation"}, ["test"])
    splits["test"] = splits["train"].remove_columns("label")
    assert without_hidden_labels(splits, TEXT)[1] == ["test"]


def test_data_takes_the_models_numbering():
    data = split([0, 1, 1], ClassLabel(names=["negative", "positive"]))
    assert align(data, "label", ["positive", "neutral", "negative"])["label"][:] == [2, 0, 0]
    assert align(data, "label", ["negative", "positive"]) is data
    assert align(data, "label", ["LABEL_0", "LABEL_1"]) is data  # names that say nothing
    assert align(data, "label", None) is data


def test_word_labels_take_the_models_numbering():
    data = split([[0], [1, 0]], List(ClassLabel(names=["O", "B-x"])))
    assert align(data, "label", ["B-x", "O"])["label"][:] == [[1], [0, 1]]


def test_a_label_that_the_model_lacks_is_refused():
    data = split([0, 1], ClassLabel(names=["cat", "dog"]))
    with pytest.raises(TransferError, match=r"Label 'dog' .* not among the model's labels \(cat, bird\)"):
        align(data, "label", ["cat", "bird"])
    with pytest.raises(TransferError, match=r"not among the model's labels"):
        align(data, "label", ["LABEL_0"])
    with pytest.raises(TransferError, match=r"Label 5 .* outside the model's labels 0..1"):
        align(split([0, 5, -100]), "label", ["cat", "dog"])
    assert align(split([0, 1, -100]), "label", ["cat", "dog"])["label"][:] == [0, 1, -100]
