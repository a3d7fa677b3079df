"""Data from every kind of source arrives as train, validation, test with known labels and stable identities."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, Value
from PIL import Image as Pillow

from hf_transfer.data.columns import Columns
from hf_transfer.data.sources import load_data
from hf_transfer.errors import TransferError


def texts(labels, prefix: str = "row") -> Dataset:
    return Dataset.from_dict({"text": [f"{prefix} {i}" for i in range(len(labels))], "label": list(labels)})


def ids(data, split: str) -> list[int]:
    return list(data.splits[split]["example_id"])


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images by class: train/{cat,dog}/*.png and test/..., in the layout of torchvision's and datasets' folders."""
    for split, count in (("train", 6), ("test", 2)):
        for label, level in (("cat", 50), ("dog", 200)):
            place = tmp_path / "pets" / split / label
            place.mkdir(parents=True)
            for i in range(count):
                Pillow.fromarray(np.full((8, 8, 3), level + i, np.uint8)).save(place / f"{i}.png")
    return tmp_path / "pets"


def test_digits_need_no_network_and_test_on_other_writers():
    data = load_data("digits")
    assert data.columns == Columns("image", "label", "image", "image-classification")
    assert data.labels == [str(i) for i in range(10)]
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 1293, "validation": 144, "test": 360}
    assert data.splits["test"][0]["image"].size == (8, 8)
    assert np.asarray(data.splits["train"][0]["image"]).max() > 200
    from sklearn.datasets import load_digits

    expected = load_digits().images[-360:] * (255 / 16)
    found = np.stack([np.asarray(image) for image in data.splits["test"]["image"]])
    assert np.abs(found - expected).max() <= 0.5


@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "jsonl"])
def test_a_folder_of_split_files(tmp_path, kind):
    place = tmp_path / "reviews"
    place.mkdir()
    for name, rows in (("train", texts(["bad", "good"] * 10)), ("val", texts(["good"])), ("test", texts(["bad"]))):
        writer = {"parquet": rows.to_parquet, "csv": rows.to_csv}.get(kind, rows.to_json)
        writer(str(place / f"{name}.{kind}"))
    data = load_data(place)
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 20, "validation": 1, "test": 1}
    assert data.labels == ["bad", "good"]
    assert data.name == "reviews"
    assert data.selection == "validation: the data's own split"
    assert list(data.splits["test"]["label"]) == [0]


def test_shards_of_a_split_are_one_split(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(2):
        texts([0, 1] * 5, f"shard {i}").to_parquet(str(tmp_path / "data" / f"train-0000{i}-of-00002.parquet"))
    data = load_data(tmp_path, validation=0)
    assert len(data.splits["train"]) == 20
    assert data.splits["train"][10]["text"] == "shard 1 0"


def test_a_single_file(tmp_path):
    texts([0, 1] * 10).to_json(str(tmp_path / "all.jsonl"))
    data = load_data(str(tmp_path / "all.jsonl"))
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 18, "validation": 2}


def test_a_folder_of_images_by_class(folder):
    data = load_data(folder, validation=0.25)
    assert data.labels == ["cat", "dog"]
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 9, "validation": 3, "test": 4}
    for row in data.splits["test"]:
        assert (np.asarray(row["image"]).max() >= 200) == (row["label"] == 1)


def test_a_folder_of_images_without_splits(folder):
    data = load_data(folder / "train", validation=0.25)
    assert data.labels == ["cat", "dog"]
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 9, "validation": 3}


def test_a_class_without_images_in_one_split(folder):
    shutil.rmtree(folder / "test" / "cat")
    data = load_data(folder)
    assert data.labels == ["cat", "dog"]
    assert list(data.splits["test"]["label"]) == [1, 1]
    shutil.rmtree(folder / "train" / "dog")
    with pytest.raises(TransferError, match=r"'dog'.* no example in train"):
        load_data(folder)


def test_what_is_no_image_is_not_read(folder):
    (folder / "train" / "cat" / "notes.txt").write_text("none")
    (folder / "train" / "cat" / ".hidden.png").write_bytes(b"none")
    (folder / "README.md").write_text("none")
    assert len(load_data(folder, validation=0).splits["train"]) == 12


def test_mappings_and_datasets():
    rows = texts(["a", "b"] * 10)
    assert set(load_data(rows).splits) == {"train", "validation"}
    assert set(load_data({"train": rows, "dev": texts(["a"])}).splits) == {"train", "validation"}
    assert set(load_data(DatasetDict(train=rows, test=texts(["a"]))).splits) == {"train", "validation", "test"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such-data", "'no/such-data'.*(Hub cannot be reached|neither a local path)"),
        ("./nowhere", "No file or folder './nowhere'"),
        ("/nowhere/at/all", "No file or folder"),
        ("missing.parquet", "No file or folder 'missing.parquet'"),
        (3, "Data cannot be a int"),
        ({"books": texts([0, 1])}, "no train split; its splits are books"),
        ({"train": texts([0, 1] * 20), "test": texts([])}, "Split 'test' is empty"),
        ({"train": texts([])}, "Split 'train' is empty"),
        (
            {"train": texts([0, 1] * 9), "test": Dataset.from_dict({"x": [1], "label": [0]})},
            "'test' has no column 'text'",
        ),
        ({"train": texts([0, 1]).with_transform(lambda b: b)}, "'train' carries a transform"),
        ({"train": IterableDataset.from_generator(lambda: iter([]))}, "'train' is a IterableDataset"),
        (texts([0, 2] * 9), "are 0, 2: classes must be 0, 1, 2"),
        (texts([0, 1]), "Nothing can be held out for validation"),
        (Dataset.from_dict({"text": ["x"]}), "No label column"),
    ],
)  # fmt: skip
def test_each_bad_source_is_one_error(source, message):
    with pytest.raises(TransferError, match=message):
        load_data(source)


def test_a_folder_without_data_says_what_it_holds(tmp_path):
    texts([0]).to_parquet(str(tmp_path / "books.parquet"))
    with pytest.raises(TransferError, match=r"No data in the folder.*holds books\.parquet.*train\.parquet"):
        load_data(tmp_path)


def test_a_broken_file_is_one_error(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"not parquet")
    with pytest.raises(TransferError, match=r"train\.parquet' cannot be read: "):
        load_data(tmp_path)


def test_a_script_of_the_hub_is_one_error_with_a_way_out(monkeypatch):
    """As datasets says it of `leondz/wnut_17`, whose script it no longer runs."""

    def refuse(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported, but found wnut_17.py")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    way_out = r"load_dataset\('leondz/wnut_17', revision='refs/convert/parquet'"
    with pytest.raises(TransferError, match=rf"'leondz/wnut_17:all' is a script.*{way_out}.*folder"):
        load_data("leondz/wnut_17:all")


@pytest.mark.parametrize(
    "options", [{"validation": 1.0}, {"validation": -0.1}, {"max_train_samples": 0}, {"max_eval_samples": 0}]
)
def test_options_out_of_range(options):
    with pytest.raises(TransferError, match=next(iter(options))):
        load_data(texts([0, 1] * 10), **options)


def test_identities_are_positions_before_any_cut_and_shared_by_no_two_rows():
    splits = {"train": texts(["a", "b"] * 50), "test": texts(["a", "b"] * 5)}
    data = load_data(splits, max_train_samples=20, max_eval_samples=4)
    for split, first in (("train", 0), ("validation", 0), ("test", 2 << 40)):
        for row in data.splits[split]:
            assert row["text"] == f"row {row['example_id'] - first}"
    everything = ids(data, "train") + ids(data, "validation") + ids(data, "test")
    assert len(set(everything)) == len(everything)


def test_own_identities_are_kept_and_must_be_unique():
    rows = texts([0, 1] * 5)
    own = rows.add_column("example_id", list(range(100, 110)))
    assert ids(load_data(own, validation=0), "train") == list(range(100, 110))
    with pytest.raises(TransferError, match="not one unique whole number"):
        load_data(rows.add_column("example_id", [0] * 10))
    with pytest.raises(TransferError, match="splits share values of 'example_id'"):
        load_data({"train": own, "test": own})


def test_held_out_rows_are_stratified_seeded_disjoint_and_never_of_test():
    splits = {"train": texts(["a"] * 90 + ["b"] * 10), "test": texts(["a", "b"], "test")}
    data = load_data(splits, validation=0.2)
    assert Counter(data.splits["validation"]["label"]) == {0: 18, 1: 2}
    assert sorted(ids(data, "train") + ids(data, "validation")) == list(range(100))
    assert data.selection == "validation: 20 rows (20%) held out of train, stratified by class, seed 0"
    assert list(data.splits["test"]["text"]) == ["test 0", "test 1"]
    assert ids(data, "validation") == ids(load_data(splits, validation=0.2), "validation")
    assert ids(data, "validation") != ids(load_data(splits, validation=0.2, seed=1), "validation")


@pytest.mark.parametrize("seed", range(5))
def test_a_class_of_one_row_is_not_held_out(seed):
    data = load_data(texts(["rare"] + ["a", "b"] * 10), validation=0.4, seed=seed)
    assert set(data.splits["train"]["label"]) == {0, 1, 2}


def test_held_out_rows_do_not_depend_on_the_subset_trained_on():
    splits = {"train": texts(["a", "b"] * 50)}
    assert ids(load_data(splits), "validation") == ids(load_data(splits, max_train_samples=10), "validation")


def test_no_validation_if_not_wanted():
    data = load_data(texts([0, 1] * 10), validation=0)
    assert set(data.splits) == {"train"}
    assert "none held out" in data.selection


def test_the_train_subset_is_random_seeded_and_stratified():
    splits = {"train": texts(["a"] * 80 + ["b"] * 20), "validation": texts(["a", "b"] * 10)}
    first, again, other = (load_data(splits, max_train_samples=10, seed=s) for s in (0, 0, 1))
    assert Counter(first.splits["train"]["label"]) == {0: 8, 1: 2}
    assert ids(first, "train") == ids(again, "train") != ids(other, "train")
    assert len(load_data(splits, max_train_samples=1000).splits["train"]) == 100
    with pytest.raises(TransferError, match="max_train_samples=1 leaves classes without an example"):
        load_data(splits, max_train_samples=1)


def test_evaluation_takes_the_first_rows_whatever_the_seed():
    splits = {"train": texts([0, 1] * 10), "validation": texts([0, 1] * 10), "test": texts([0, 1] * 10)}
    data = load_data(splits, max_eval_samples=3, seed=5)
    for split in ("validation", "test"):
        assert list(data.splits[split]["text"]) == ["row 0", "row 1", "row 2"]
    assert len(data.splits["train"]) == 20


def test_a_test_split_without_labels_is_left_out():
    feature = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    rows = texts([0, 1] * 10).cast(feature)
    hidden = Dataset.from_dict({"text": ["x"], "label": [-1]}, features=feature)
    data = load_data({"train": rows, "test": hidden})
    assert set(data.splits) == {"train", "validation"}
    assert data.selection.endswith("test left out: no labels")


def test_outputs_of_a_regression():
    assert load_data(texts([0.5, 1.0] * 10)).outputs == 1
    assert load_data(texts([[0.5, 1.0]] * 10)).outputs == 2
    assert load_data(texts([0, 1] * 10)).outputs is None


def test_a_language_modelling_corpus_needs_no_labels():
    data = load_data(Dataset.from_dict({"text": ["x"] * 20}), task="causal-lm")
    assert data.labels is None
    assert len(data.splits["validation"]) == 2


def test_the_fingerprint_is_of_the_rows_and_not_of_the_place(folder, tmp_path):
    first = load_data(folder).fingerprint
    shutil.copytree(folder, tmp_path / "moved" / "pets")
    assert load_data(tmp_path / "moved" / "pets").fingerprint == first
    Pillow.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "moved" / "pets" / "test" / "cat" / "0.png")
    assert load_data(tmp_path / "moved" / "pets").fingerprint != first


def test_the_fingerprint_knows_labels_and_rows():
    rows, relabelled = texts([0, 1] * 10), texts([1, 0] * 10)
    prints = {
        load_data(rows).fingerprint,
        load_data(rows, seed=1).fingerprint,
        load_data(rows, max_train_samples=5).fingerprint,
        load_data(relabelled).fingerprint,
    }
    assert len(prints) == 4
    assert load_data(rows).fingerprint in prints


def test_no_local_path_is_in_the_data_or_its_name(folder):
    data = load_data(folder)
    assert str(folder.parent) not in f"{data.name} {data.selection} {data.fingerprint}"


def test_images_in_memory():
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    pixels = [np.full((4, 4, 3), i, np.uint8) for i in range(20)]
    data = load_data(Dataset.from_dict({"image": pixels, "label": [0, 1] * 10}, features=features))
    assert data.columns.modality == "image"


def test_importing_the_readers_imports_no_framework():
    import subprocess

    code = (
        "import sys, hf_transfer.data.sources; "
        "print([m for m in ('datasets', 'transformers', 'timm', 'torchvision', 'sklearn') if m in sys.modules])"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "modality", "classes", "train"),
    [
        ("cifar10", "image", 10, 45000), ("mnist", "image", 10, 9000), ("usps", "image", 10, 6562),
        ("pneumonia", "image", 2, 3882), ("sst2", "text", 2, 6920), ("banking77", "text", 77, 9003),
        ("wnut17", "tokens", 13, 3394), ("spoken_digits", "audio", 10, 810),
    ],
)  # fmt: skip
def test_real_data(shared, name, modality, classes, train):
    data = load_data(shared(f"data/{name}"))
    assert (data.columns.modality, len(data.labels), len(data.splits["train"])) == (modality, classes, train)
