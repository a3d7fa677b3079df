"""Splits keep classes in proportion, rows apart and identities whole; two domains become one set."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from hf_transfer.data.columns import infer
from hf_transfer.data.identity import describe
from hf_transfer.data.splits import combine, few_shot, keep_classes, kfold, stratified_order, stratified_split
from hf_transfer.errors import TransferError

NAMES = ["rare", "some", "many"]


def rows(counts=(5, 20, 75), **extra) -> Dataset:
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = np.random.default_rng(1).permutation(labels)
    columns = {"text": [f"row {i}" for i in range(len(labels))], "label": labels, "example_id": range(len(labels))}
    features = Features(
        {"text": Value("string"), "label": ClassLabel(names=NAMES[: len(counts)]), "example_id": Value("int64")}
    )
    return Dataset.from_dict(columns, features=features)


def counts(dataset: Dataset) -> dict[int, int]:
    return dict(sorted(Counter(dataset["label"]).items()))


def ids(dataset: Dataset) -> list[int]:
    return list(dataset["example_id"])


@pytest.mark.parametrize("seed", range(5))
def test_every_prefix_of_a_stratified_order_is_in_proportion(seed):
    classes = np.asarray(rows()["label"])
    order = stratified_order(classes, 100, seed)
    assert sorted(order) == list(range(100))
    assert set(classes[order[:3]]) == {0, 1, 2}  # one of each first
    share = np.bincount(classes) / 100
    for n in range(3, 101):
        found = np.bincount(classes[order[:n]], minlength=3)
        assert np.abs(found - share * n).max() <= 2.0, (n, found)


def test_rows_without_classes_are_shuffled():
    order = stratified_order(None, 50, 0)
    assert sorted(order) == list(range(50))
    assert list(order) != list(range(50))
    assert list(order) != list(stratified_order(None, 50, 1))


def test_a_split_is_stratified_disjoint_and_complete():
    parts = stratified_split(rows(), {"train": 0.6, "validation": 0.2, "test": 0.2}, seed=0)
    assert [len(part) for part in parts.values()] == [60, 20, 20]
    assert sorted(chain.from_iterable(map(ids, parts.values()))) == list(range(100))
    for part in parts.values():
        assert counts(part).keys() == {0, 1, 2}
        assert abs(counts(part)[2] / len(part) - 0.75) <= 0.05


def test_a_split_is_a_function_of_its_seed():
    first, again, other = (ids(stratified_split(rows(), {"a": 0.5}, seed=s)["a"]) for s in (0, 0, 1))
    assert first == again != other


def test_a_class_with_one_row_goes_to_train():
    for seed in range(20):
        parts = stratified_split(rows((1, 1, 8)), {"train": 0.5, "test": 0.5}, seed=seed)
        assert counts(parts["train"]).keys() == {0, 1, 2}


@pytest.mark.parametrize("fractions", [{}, {"a": 0.0}, {"a": 0.7, "b": 0.4}, {"a": 1.2}])
def test_fractions_must_be_shares(fractions):
    with pytest.raises(TransferError, match="fractions"):
        stratified_split(rows(), fractions)


def test_an_empty_part_is_refused():
    with pytest.raises(TransferError, match="'b' would be empty"):
        stratified_split(rows(), {"a": 0.99, "b": 0.001})


def test_folds_cover_every_row_once_in_proportion():
    folds = list(kfold(rows(), 5))
    assert sorted(chain.from_iterable(ids(held_out) for _, held_out in folds)) == list(range(100))
    for train, held_out in folds:
        assert counts(held_out) == {0: 1, 1: 4, 2: 15}
        assert not set(ids(train)) & set(ids(held_out))
        assert len(train) == 80


def test_folds_of_quantities():
    data = Dataset.from_dict({"text": ["x"] * 10, "label": [i / 2 for i in range(10)]})
    assert [len(held_out) for _, held_out in kfold(data, 5)] == [2] * 5


@pytest.mark.parametrize("k", [1, 6])
def test_more_folds_than_the_smallest_class_is_refused_at_once(k):
    with pytest.raises(TransferError, match=f"k={k} folds: k must be between 2 and the size of the smallest class, 5"):
        kfold(rows(), k)


def test_few_shot_draws_n_of_each_class():
    few = few_shot(rows(), 4)
    assert counts(few) == {0: 4, 1: 4, 2: 4}
    assert ids(few) == ids(few_shot(rows(), 4)) != ids(few_shot(rows(), 4, seed=1))
    assert set(ids(few_shot(rows(), 2))) < set(ids(few))


def test_few_shot_leaves_unlabelled_rows_out():
    data = Dataset.from_dict({"text": list("abcd"), "label": [0, 1, -100, -100]})
    assert few_shot(data, 1)["text"][:] == ["a", "b"]


@pytest.mark.parametrize("n", [0, 6])
def test_few_shot_beyond_the_smallest_class_names_it(n):
    with pytest.raises(TransferError, match=f"n={n} rows a class: the smallest class, 'rare', has 5 rows"):
        few_shot(rows(), n)


def test_few_shot_needs_classes():
    with pytest.raises(TransferError, match="needs one class a row"):
        few_shot(Dataset.from_dict({"text": ["x"], "label": [0.5]}), 1)


def test_classes_are_kept_in_the_order_given():
    kept = keep_classes(rows(), ["many", "rare"])
    assert kept.features["label"].names == ["many", "rare"]
    assert counts(kept) == {0: 75, 1: 5}
    before = dict(zip(rows()["example_id"], rows()["label"], strict=True))
    assert all({0: 2, 1: 0}[label] == before[i] for i, label in zip(ids(kept), kept["label"], strict=True))
    with pytest.raises(TransferError, match=r"\['none'\] is not among the classes"):
        keep_classes(rows(), ["none"])


def domain(pixels: int, rows: int, name: str = "image", **more) -> Dataset:
    features = Features({name: Image(), "label": ClassLabel(names=["a", "b"])})
    columns = {
        name: [np.full((pixels, pixels), i, np.uint8) for i in range(rows)],
        "label": [i % 2 for i in range(rows)],
    }
    return Dataset.from_dict(columns, features=features)


def test_two_domains_become_one_set_without_the_targets_labels():
    mixed = combine(source=domain(28, 4), target=domain(16, 3, "img"))
    assert mixed.column_names == ["image", "label", "example_id", "domain"]
    assert list(mixed["domain"]) == [0, 0, 0, 0, 1, 1, 1]
    assert list(mixed["label"]) == [0, 1, 0, 1, -100, -100, -100]
    assert len(set(mixed["example_id"])) == 7
    assert [image.size for image in mixed["image"]] == [(28, 28)] * 4 + [(16, 16)] * 3
    assert mixed.features["label"] == Value("int64")
    assert infer(mixed) == infer(domain(28, 1))


def test_a_mixed_row_can_be_named():
    mixed = combine(source=domain(8, 4), target=domain(8, 3))
    assert describe(mixed[6]["example_id"]).startswith("train row 2 of domain 1 (example_id ")


def test_the_target_needs_no_labels():
    mixed = combine(source=domain(8, 2), target=domain(8, 2).remove_columns("label"))
    assert list(mixed["label"]) == [0, 1, -100, -100]


def test_rows_taken_out_of_order_combine():
    mixed = combine(source=domain(8, 4).select([3, 0]), target=domain(8, 4).shuffle(seed=0))
    assert list(mixed["label"])[:2] == [1, 0]
    assert np.asarray(mixed[0]["image"]).max() == 3


def test_texts_and_quantities_combine():
    side = Dataset.from_dict({"text": ["x", "y"], "label": [0.5, 1.0]})
    assert list(combine(source=side, target=side)["label"]) == [0.5, 1.0, -100.0, -100.0]


def test_domains_of_different_kinds_do_not_combine():
    text = Dataset.from_dict({"text": ["x"], "label": [0]})
    with pytest.raises(TransferError, match="source's 'image' holds image, target's 'text' holds text"):
        combine(source=domain(8, 2), target=text)
    with pytest.raises(TransferError, match="target has no rows"):
        combine(source=domain(8, 2), target=domain(8, 2).select([]))
