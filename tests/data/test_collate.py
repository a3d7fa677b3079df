"""Batches: types and padding of inputs and labels, the contract's columns, and blended images."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from data_fakes import FakeBackbone

from hf_transfer.data.collate import collator_for
from hf_transfer.data.columns import Columns
from hf_transfer.data.mixing import Mixing
from hf_transfer.data.replay import dataset_epoch
from hf_transfer.data.transforms import prepare
from hf_transfer.errors import TransferError

IMAGES = Columns("image", "label", "image", "image-classification")


def image_row(i: int, label=0, **more) -> dict:
    return {"pixel_values": torch.full((1, 2, 2), float(i)), "labels": label, "example_id": i, **more}


def token_row(length: int, **more) -> dict:
    return {"input_ids": list(range(5, 5 + length)), "attention_mask": [1] * length, "example_id": length, **more}


def test_images_are_stacked_and_only_the_contracts_columns_kept():
    rows = [image_row(i, label=i, domain=i % 2, author="x") for i in range(3)]
    batch = collator_for(FakeBackbone())(rows)
    assert set(batch) == {"pixel_values", "labels", "domain", "example_id"}
    assert batch["pixel_values"].shape == (3, 1, 2, 2)
    assert {name: batch[name].tolist() for name in ("labels", "domain", "example_id")} == {
        "labels": [0, 1, 2], "domain": [0, 1, 0], "example_id": [0, 1, 2],
    }  # fmt: skip
    assert {batch[name].dtype for name in ("labels", "domain", "example_id")} == {torch.int64}


def test_identities_keep_all_their_bits():
    identity = (3 << 44) + (2 << 40) + 1
    assert collator_for(FakeBackbone())([image_row(identity)])["example_id"].tolist() == [identity]


@pytest.mark.parametrize(
    ("task", "labels", "expected"),
    [
        ("image-classification", [1, 2], torch.tensor([1, 2])),
        ("image-classification", [1], torch.tensor([1])),
        ("image-classification", [[0.25, 0.75], [1.0, 0.0]], torch.tensor([[0.25, 0.75], [1.0, 0.0]])),
        ("regression", [1, 2], torch.tensor([1.0, 2.0])),
        ("regression", [0.5], torch.tensor([0.5])),
        ("regression", [[1.0, 2.0], [3.0, 4.0]], torch.tensor([[1.0, 2.0], [3.0, 4.0]])),
    ],
)
def test_labels_have_the_tasks_type(task, labels, expected):
    backbone = FakeBackbone(task=task)
    found = collator_for(backbone)([image_row(i, label=label) for i, label in enumerate(labels)])["labels"]
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_rows_without_labels_make_a_batch_without():
    row = image_row(0)
    del row["labels"]
    assert "labels" not in collator_for(FakeBackbone())([row])


@pytest.mark.parametrize("side", ["right", "left"])
def test_text_is_padded_on_the_tokenizers_side(text_backbone, side):
    text_backbone.processor.padding_side = side
    batch = collator_for(text_backbone)([token_row(2, labels=1), token_row(4, labels=0)])
    short = [5, 6, 0, 0] if side == "right" else [0, 0, 5, 6]
    assert batch["input_ids"].tolist() == [short, [5, 6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[int(i != 0) for i in short], [1] * 4]
    assert batch["labels"].tolist() == [1, 0]


@pytest.mark.parametrize("side", ["right", "left"])
def test_word_labels_are_padded_like_the_text(text_backbone, side):
    text_backbone.task = "token-classification"
    text_backbone.processor.padding_side = side
    batch = collator_for(text_backbone)([token_row(2, labels=[-100, 1]), token_row(3, labels=[-100, 0, 2])])
    assert batch["labels"].tolist() == [[-100, 1, -100] if side == "right" else [-100, -100, 1], [-100, 0, 2]]
    assert batch["labels"].dtype == torch.int64


def test_padding_agrees_with_the_tokenizers(text_backbone):
    rows = [token_row(3, token_type_ids=[0, 0, 1], labels=0), token_row(5, token_type_ids=[0, 0, 0, 1, 1], labels=1)]
    batch = collator_for(text_backbone)(rows)
    names = ("input_ids", "attention_mask", "token_type_ids")
    expected = text_backbone.processor.pad([{n: row[n] for n in names} for row in rows], return_tensors="pt")
    for name in names:
        assert torch.equal(batch[name], expected[name]), name


def test_quantities_of_texts(text_backbone):
    text_backbone.task = "regression"
    rows = [token_row(2, labels=[1, 2]), token_row(3, labels=[3, 4])]
    assert collator_for(text_backbone)(rows)["labels"].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_a_tokenizer_without_padding_is_refused(text_backbone):
    text_backbone.processor.pad_token = None
    with pytest.raises(TransferError, match=r"has no padding token.*eos_token"):
        collator_for(text_backbone)


def test_collators_pickle(text_backbone):
    for collator, rows in (
        (collator_for(text_backbone), [token_row(2, labels=1)]),
        (collator_for(FakeBackbone(), mixup=0.2), [image_row(0, epoch=0), image_row(1, epoch=0)]),
    ):
        again = pickle.loads(pickle.dumps(collator))(rows)
        assert all(torch.equal(again[name], value) for name, value in collator(rows).items())


# ---- mixup and CutMix -----------------------------------------------------------------------------------------------


def batch_of(n: int, size: int = 16, classes: int = 4):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(n, 3, size, size, generator=generator)
    return pixels, torch.arange(n) % classes, list(range(100, 100 + n))


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_mixup_blends_images_as_it_blends_labels(n):
    pixels, labels, ids = batch_of(n)
    mixed, soft = Mixing(0.8, 0.0, 4, seed=1)(pixels, labels, ids, epoch=0)
    assert soft.dtype == torch.float32
    assert torch.allclose(soft.sum(1), torch.ones(n))
    hard = torch.nn.functional.one_hot(labels, 4).double()
    share = np.random.default_rng(0)  # the share is read off the first row whose partner has another class
    i = next((i for i in range(n) if labels[i] != labels[n - 1 - i]), None)
    share = 1.0 if i is None else float(soft[i, labels[i]])
    assert i is None or 0 < share < 1
    assert torch.allclose(soft.double(), share * hard + (1 - share) * hard.flip(0), atol=1e-6)
    expected = pixels if i is None else share * pixels.double() + (1 - share) * pixels.double().flip(0)
    assert torch.allclose(mixed.double(), expected.double(), atol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_cutmix_takes_the_share_of_pixels_that_labels_say(seed):
    pixels, labels, ids = batch_of(4)
    mixed, soft = Mixing(0.0, 1.0, 4, seed)(pixels, labels, ids, epoch=0)
    partner = pixels.flip(0)
    kept = (mixed == pixels).all(dim=1)  # (N, H, W)
    assert ((mixed == partner).all(dim=1) | kept).all()
    assert torch.allclose(kept.float().mean((1, 2)), soft[torch.arange(4), labels])
    box = torch.nonzero(~kept[0])
    if len(box):
        height, width = (box.max(0).values - box.min(0).values + 1).tolist()
        assert height * width == len(box)  # a rectangle


def test_boxes_have_the_area_that_was_drawn_where_the_border_clips_none():
    from hf_transfer.data.mixing import _box

    for share in (0.1, 0.5, 0.9):
        areas = []
        for seed in range(200):
            rows, columns = _box(200, 100, share, np.random.default_rng(seed))
            assert 0 <= rows.start <= rows.stop <= 200
            assert 0 <= columns.start <= columns.stop <= 100
            areas.append((rows.stop - rows.start) * (columns.stop - columns.start) / 20000)
        assert max(areas) == pytest.approx(1 - share, abs=0.02)


def test_both_take_turns():
    pixels, labels, ids = batch_of(4)
    mixing = Mixing(0.5, 1.0, 4)
    cut = 0
    for epoch in range(200):
        mixed, _ = mixing(pixels, labels, ids, epoch)
        cut += bool(((mixed == pixels) | (mixed == pixels.flip(0))).all())
    assert 70 < cut < 130


def test_the_ratio_follows_the_beta_distribution():
    """Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1))."""
    pixels, labels, ids = batch_of(2, size=1)
    for alpha in (0.2, 1.0):
        mixing = Mixing(alpha, 0.0, 4)
        shares = np.array([mixing(pixels, labels, ids, epoch)[1][0, 0].item() for epoch in range(2000)])
        assert shares.mean() == pytest.approx(0.5, abs=0.04)
        assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_a_blend_is_a_function_of_seed_epoch_and_rows():
    pixels, labels, ids = batch_of(4)
    first = Mixing(1.0, 0.0, 4)(pixels, labels, ids, 0)[1]
    torch.manual_seed(5), np.random.seed(5)
    before = torch.get_rng_state()
    assert torch.equal(first, Mixing(1.0, 0.0, 4)(pixels, labels, ids, 0)[1])
    assert torch.equal(before, torch.get_rng_state())
    for other in (
        Mixing(1.0, 0.0, 4, seed=1)(pixels, labels, ids, 0),
        Mixing(1.0, 0.0, 4)(pixels, labels, ids, 1),
        Mixing(1.0, 0.0, 4)(pixels, labels, [*ids[:3], 999], 0),
    ):
        assert not torch.equal(first, other[1])


def test_unlabelled_rows_stay_as_they_are():
    pixels, labels, ids = batch_of(6)
    labels[[1, 4]] = -100
    mixed, soft = Mixing(1.0, 0.0, 4)(pixels, labels, ids, 0)
    assert (soft[[1, 4]] == -100).all()
    assert torch.equal(mixed[[1, 4]], pixels[[1, 4]])
    labelled = [0, 2, 3, 5]
    assert torch.allclose(soft[labelled].sum(1), torch.ones(4))
    share = (mixed[0] - pixels[5]).norm() / (pixels[0] - pixels[5]).norm()  # 0 and 5 are partners
    assert soft[0, labels[0]].item() == pytest.approx(share.item(), abs=1e-5)


def test_a_batch_without_labels_is_not_blended():
    pixels, labels, ids = batch_of(3)
    mixed, soft = Mixing(1.0, 0.0, 4)(pixels, torch.full_like(labels, -100), ids, 0)
    assert torch.equal(mixed, pixels)
    assert (soft == -100).all()


def test_training_rows_are_blended_and_evaluation_rows_are_not(image_rows):
    backbone = FakeBackbone()
    collate = collator_for(backbone, mixup=0.4)
    for train in (True, False):
        rows = prepare(image_rows(4), backbone, IMAGES, train=train, augment="none")
        batch = collate([rows[i] for i in range(4)])
        assert set(batch) == {"pixel_values", "labels", "example_id"}
        assert batch["labels"].shape == ((4, 3) if train else (4,))
        assert batch["labels"].is_floating_point() == train


def test_the_blend_moves_with_the_datasets_epoch(image_rows):
    backbone = FakeBackbone()
    collate = collator_for(backbone, mixup=0.4)
    rows = prepare(image_rows(3), backbone, IMAGES, train=True, augment="none")
    blends = []
    for epoch in (0, 1, 0):
        dataset_epoch(rows).set(epoch)
        blends.append(collate([rows[i] for i in range(3)])["labels"])
    assert torch.equal(blends[0], blends[2])
    assert not torch.equal(blends[0], blends[1])


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        (FakeBackbone(task="regression"), {"mixup": 0.2}, "the backbone's task is regression"),
        (FakeBackbone(), {"mixup": -0.2}, "alphas are >= 0"),
        (FakeBackbone(labels=["one"]), {"cutmix": 1.0}, "the backbone has 1 output"),
    ],
)
def test_what_cannot_be_blended_is_refused(backbone, options, message):
    with pytest.raises(TransferError, match=message):
        collator_for(backbone, **options)


def test_text_is_not_blended(text_backbone):
    with pytest.raises(TransferError, match="blend images with classes"):
        collator_for(text_backbone, mixup=0.2)


def test_labels_decide_the_number_of_classes():
    rows = [image_row(i, label=i, epoch=0) for i in range(2)]
    batch = collator_for(FakeBackbone(labels=list("abcdef")), mixup=0.2)(rows)
    assert batch["labels"].shape == (2, 6)
    assert Counter((batch["labels"] > 0).sum(1).tolist()) == {2: 2}
