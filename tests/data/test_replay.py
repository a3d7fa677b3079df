"""Augmentation is a function of (seed, epoch, example_id): whoever computes it, whatever was random before."""

from __future__ import annotations

import copy
import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch
from data_fakes import FakeBackbone
from torch.utils.data import DataLoader, Subset

from hf_transfer.data.collate import collator_for
from hf_transfer.data.columns import Columns
from hf_transfer.data.replay import EpochCounter, borrowed_generators, dataset_epoch, key, seed_all
from hf_transfer.data.transforms import prepare

IMAGES = Columns("image", "label", "image", "image-classification")
prepare_train = partial(prepare, columns=IMAGES, train=True, augment="light+colour+noise+occlusion")


def pixels(rows) -> dict[int, torch.Tensor]:
    return {row["example_id"]: row["pixel_values"] for row in rows}


def assert_same(a: dict[int, torch.Tensor], b: dict[int, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for i in a:
        assert torch.equal(a[i], b[i]), i


def states() -> tuple:
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
        torch.get_rng_state().tolist(),
    )


def test_augmentation_neither_moves_nor_reads_global_randomness(image_rows):
    prepared = prepare_train(image_rows(), FakeBackbone())
    before = states()
    first = pixels(prepared)
    assert states() == before
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    assert_same(first, pixels(prepared))


def test_global_state_is_put_back_when_a_row_fails():
    before = states()
    with pytest.raises(KeyError), borrowed_generators():
        seed_all(1, 2, 3)
        assert states() != before
        raise KeyError
    assert states() == before


@pytest.mark.parametrize("augment", ["light", "noise"])  # drawn before and after normalisation
def test_an_epoch_can_be_replayed_and_differs_from_the_next(image_rows, augment):
    prepared = prepare_train(image_rows(), FakeBackbone(), augment=augment)
    counter = dataset_epoch(prepared)
    first = pixels(prepared)
    counter.set(1)
    second = pixels(prepared)
    assert not any(torch.equal(first[i], second[i]) for i in first)
    counter.set(0)
    assert_same(first, pixels(prepared))


def test_seed_and_row_change_the_draw(image_rows):
    rows = image_rows(2)
    twin = rows.select([0, 0])
    twin = twin.remove_columns("example_id").add_column("example_id", [7, 8])
    a, b = pixels(prepare_train(twin, FakeBackbone())).values()
    assert not torch.equal(a, b)
    other = pixels(prepare_train(rows, FakeBackbone(), seed=1))
    assert not torch.equal(other[0], pixels(prepare_train(rows, FakeBackbone()))[0])


def test_position_batch_and_order_do_not_matter(image_rows):
    prepared = prepare_train(image_rows(), FakeBackbone())
    whole = pixels(prepared)
    assert_same(whole, pixels(prepared.shuffle(seed=3)))
    picked = [9, 2, 5]
    assert_same({i: whole[i] for i in picked}, pixels(prepared.select(picked)))
    assert_same({i: whole[i] for i in picked}, pixels(prepared.__getitems__(picked)))
    assert_same({i: whole[i] for i in picked}, pixels(Subset(prepared, picked)))


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_persistent_workers_see_the_epoch_and_give_what_the_main_process_gives(image_rows, context):
    prepared = prepare_train(image_rows(), FakeBackbone())
    counter = dataset_epoch(prepared)
    collate = collator_for(FakeBackbone(), mixup=0.4)
    plain = DataLoader(prepared, batch_size=4, collate_fn=collate)
    workers = DataLoader(
        prepared, batch_size=4, collate_fn=collate, num_workers=2, persistent_workers=True,
        multiprocessing_context=context,
    )  # fmt: skip
    for epoch in (0, 1):
        counter.set(epoch)
        for expected, found in zip(plain, workers, strict=True):
            assert expected.keys() == found.keys()
            for name in expected:
                assert torch.equal(expected[name], found[name]), (epoch, name)


def test_processes_that_share_the_rows_see_the_same_augmentation(image_rows):
    prepared = prepare_train(image_rows(), FakeBackbone())
    alone = pixels(prepared)
    for processes in (2, 3):
        together = {}
        for rank in range(processes):
            together |= pixels(prepared.shard(processes, rank))
        assert_same(alone, together)


@pytest.mark.parametrize("change", ["select", "shuffle", "deepcopy", "subset"])
def test_one_counter_serves_all_derived_datasets(image_rows, change):
    prepared = prepare_train(image_rows(), FakeBackbone())
    derived = {
        "select": lambda: prepared.select([3, 1]),
        "shuffle": lambda: prepared.shuffle(seed=0),
        "deepcopy": lambda: copy.deepcopy(prepared),
        "subset": lambda: Subset(prepared.select(range(5)), [1, 2]),
    }[change]()
    dataset_epoch(prepared).set(5)
    assert dataset_epoch(derived).value == 5


def test_only_prepared_images_have_a_counter(image_rows):
    assert dataset_epoch(image_rows()) is None
    assert dataset_epoch([1, 2]) is None
    assert dataset_epoch(image_rows().with_transform(lambda batch: batch)) is None


def test_a_prepared_dataset_pickles(image_rows):
    prepared = prepare_train(image_rows(), FakeBackbone())
    dataset_epoch(prepared).set(3)
    restored = pickle.loads(pickle.dumps(prepared))
    assert dataset_epoch(restored).value == 3
    assert_same(pixels(prepared), pixels(restored))


def test_keys_depend_on_every_part_and_its_place():
    keys = {key(a, b, c) for a in range(4) for b in range(4) for c in (-1, 0, 1, 1 << 40, (1 << 40) + 1)}
    assert len(keys) == 80
    assert all(0 <= k < 1 << 64 for k in keys)


def test_a_counter_starts_at_zero():
    counter = EpochCounter()
    assert counter.value == 0
    counter.set(7)
    assert counter.value == 7
