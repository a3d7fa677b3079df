"""Column inference: what is found without being told, and what one error says where it cannot be."""

from __future__ import annotations

import numpy as np
import pytest
from data_fakes import wav
from datasets import Audio, ClassLabel, Dataset, Features, Image, List, Value

from hf_transfer.data.columns import Columns, check_fits, class_ids, infer, values
from hf_transfer.errors import TransferError

CLASSES = ClassLabel(names=["a", "b"])
PIXELS = np.zeros((4, 4, 3), np.uint8)


def dataset(**columns) -> Dataset:
    """`dataset(text=Value("string"), label=CLASSES)`: two rows of that type."""
    samples = {
        "Value('string')": ["x", "y"], "Value('int64')": [0, 1], "Value('float32')": [0.5, 1.5],
        "Value('bool')": [True, False], "Image": [PIXELS, PIXELS], "ClassLabel": [0, 1],
    }  # fmt: skip

    def sample(feature):
        if isinstance(feature, List):
            return [[value] for value in sample(feature.feature)]
        return samples.get(repr(feature)) or samples[type(feature).__name__]

    return Dataset.from_dict({name: sample(f) for name, f in columns.items()}, features=Features(columns))


STRING, INT, FLOAT = Value("string"), Value("int64"), Value("float32")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"img": Image(), "label": CLASSES}, Columns("img", "label", "image", "image-classification")),
        ({"picture": Image(), "id": STRING, "kind": CLASSES}, None),
        ({"text": STRING, "id": STRING, "label": INT}, Columns("text", "label", "text", "text-classification")),
        ({"review": STRING, "label": STRING}, Columns("review", "label", "text", "text-classification")),
        ({"review": STRING, "sentiment": CLASSES}, Columns("review", "sentiment", "text", "text-classification")),
        ({"text": STRING, "label": FLOAT}, Columns("text", "label", "text", "regression")),
        ({"image": Image(), "label": List(FLOAT)}, Columns("image", "label", "image", "regression")),
        (
            {"tokens": List(STRING), "pos_tags": List(CLASSES), "ner_tags": List(CLASSES)},
            Columns("tokens", "ner_tags", "tokens", "token-classification"),
        ),
        ({"words": List(STRING), "pos": List(INT)}, Columns("words", "pos", "tokens", "token-classification")),
        (
            {"premise": STRING, "hypothesis": STRING, "idx": INT, "label": CLASSES},
            Columns("premise", "label", "text", "text-classification", pair="hypothesis"),
        ),
        (
            {"text": STRING, "label": CLASSES, "domain": INT, "example_id": INT},
            Columns("text", "label", "text", "text-classification"),
        ),
    ],
)
def test_columns_are_found_by_type_then_by_name(columns, expected):
    if expected is None:  # an image and a text, neither of the usual name
        with pytest.raises(TransferError, match=r"2 columns could be the input \(picture, id\).*input_column="):
            infer(dataset(**columns))
    else:
        assert infer(dataset(**columns)) == expected


def test_named_columns_win():
    data = dataset(text=STRING, title=STRING, label=CLASSES, other=INT)
    assert infer(data, input_column="title", label_column="other") == Columns(
        "title", "other", "text", "text-classification"
    )


def test_whole_numbers_are_quantities_when_asked():
    assert infer(dataset(text=STRING, label=INT), task="regression").task == "regression"


def test_another_task_than_the_columns_say_is_refused():
    assert infer(dataset(text=STRING, label=INT), task="text-classification").task == "text-classification"
    with pytest.raises(TransferError, match=r"but .* label 'label' \(float32\) are data for regression"):
        infer(dataset(text=STRING, label=FLOAT), task="text-classification")
    with pytest.raises(TransferError, match=r"task='segmentation', but .* are data for image-classification"):
        infer(dataset(image=Image(), label=CLASSES), task="segmentation")


def test_language_modelling_needs_no_label():
    assert infer(dataset(text=STRING), task="causal-lm") == Columns("text", None, "text", "causal-lm")
    found = infer(dataset(prompt=STRING, completion=STRING), task="causal-lm")
    assert (found.input, found.pair) == ("prompt", "completion")
    with pytest.raises(TransferError, match="Language modelling reads text"):
        infer(dataset(image=Image()), task="causal-lm")


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"image": Image()}, {}, r"No label column.*image \(Image\).*label_column="),
        ({"image": Image(), "x": INT}, {}, r"No label column.*x \(int64\).*label_column="),
        ({"image": Image(), "fine": CLASSES, "coarse": CLASSES}, {}, r"2 columns could be the label \(fine, coarse\)"),
        ({"x": INT, "label": CLASSES}, {}, r"No input column.*x \(int64\), label \(2 classes\)"),
        ({"title": STRING, "body": STRING, "label": CLASSES}, {}, r"2 columns could be the input \(title, body\)"),
        ({"text": STRING, "label": CLASSES}, {"label_column": "lable"}, r"label_column='lable' is not a column.*text"),
        ({"text": STRING, "label": CLASSES}, {"input_column": "img"}, r"input_column='img' is not a column.*text"),
        ({"x": INT, "label": CLASSES}, {"input_column": "x"}, r"input_column='x' is int64.*cast_column"),
    ],
)
def test_what_cannot_be_inferred_is_one_error_with_the_columns_and_the_fix(columns, options, message):
    with pytest.raises(TransferError, match=message):
        infer(dataset(**columns), **options)


def test_files_without_a_type_are_told_by_content():
    struct = {"bytes": Value("binary"), "path": STRING}
    png = Dataset.from_dict({"x": [PIXELS]}, features=Features({"x": Image()})).cast_column("x", Image(decode=False))
    for content, modality in ((png[0]["x"]["bytes"], "image"), (wav([0.1, 0.2]), "audio")):
        rows = {"file": [{"bytes": content, "path": None}], "label": [0]}
        found = infer(Dataset.from_dict(rows, features=Features({"file": struct, "label": CLASSES})))
        assert (found.input, found.modality) == ("file", modality)
    rows = {"file": [{"bytes": b"no file of any kind", "path": None}], "label": [0]}
    with pytest.raises(TransferError, match="No input column"):
        infer(Dataset.from_dict(rows, features=Features({"file": struct, "label": CLASSES})))


def test_audio_is_audio_without_a_decoder():
    data = Dataset.from_dict(
        {"sound": [{"bytes": wav([0.0]), "path": None}], "label": [0]},
        features=Features({"sound": {"bytes": Value("binary"), "path": STRING}, "label": CLASSES}),
    ).cast_column("sound", Audio())
    assert infer(data).modality == "audio"


@pytest.mark.parametrize(
    ("modality", "columns", "fits"),
    [
        ("image", Columns("x", "y", "image", "image-classification"), True),
        ("text", Columns("x", "y", "text", "text-classification"), True),
        ("text", Columns("x", "y", "tokens", "token-classification"), True),
        ("audio", Columns("x", "y", "audio", "audio-classification"), True),
        ("image", Columns("x", "y", "text", "text-classification"), False),
        ("image", Columns("x", "y", "tokens", "token-classification"), False),
        ("text", Columns("x", "y", "image", "image-classification"), False),
        ("audio", Columns("x", "y", "image", "image-classification"), False),
    ],
)
def test_data_must_fit_the_backbone(modality, columns, fits):
    if fits:
        check_fits(modality, columns)
    else:
        with pytest.raises(TransferError, match=f"backbone reads {modality}, and column 'x' holds {columns.modality}"):
            check_fits(modality, columns)


def test_text_for_an_image_backbone_may_be_paths():
    with pytest.raises(TransferError, match=r"paths of files, dataset\.cast_column\('x', datasets\.Image\(\)\)"):
        check_fits("image", Columns("x", "y", "text", "text-classification"))


def test_values_are_read_past_a_transform():
    data = dataset(image=Image(), label=CLASSES)

    def refuse(batch):
        raise AssertionError("the transform ran")

    assert values(data.with_transform(refuse), "label") == [0, 1]


def test_class_ids():
    assert class_ids(dataset(label=CLASSES), "label").tolist() == [0, 1]
    assert class_ids(dataset(label=STRING), "label").tolist() == [0, 1]
    assert class_ids(dataset(label=Value("bool")), "label").tolist() == [1, 0]
    assert class_ids(dataset(label=FLOAT), "label") is None
    assert class_ids(dataset(label=List(CLASSES)), "label") is None
