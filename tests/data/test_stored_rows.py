"""Rows from a store are the rows decoded anew, bit for bit, for all that reads prepared rows."""

from __future__ import annotations

import logging
import pickle
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from data_fakes import COLOUR, GREY, FakeBackbone
from PIL import Image as Pillow
from torch.utils.data import DataLoader, Subset

from hf_transfer.data import on_device
from hf_transfer.data.augmentations import AUGMENTATIONS
from hf_transfer.data.collate import collator_for
from hf_transfer.data.columns import Columns
from hf_transfer.data.draws import Draws
from hf_transfer.data.on_device import finished, handing_over
from hf_transfer.data.replay import dataset_epoch, is_random
from hf_transfer.data.sampling import BalancedSampler
from hf_transfer.data.stored_rows import StoredRow, store_images
from hf_transfer.data.transforms import prepare
from hf_transfer.distillation.signature import data_signature, transform_signature
from hf_transfer.errors import TransferError

IMAGES = Columns("image", "label", "image", "image-classification")
ALL = "light+geometric+photometric+colour+noise+occlusion"
prepare_train = partial(prepare, columns=IMAGES, train=True)


def ragged(sizes=((50, 40), (20, 30), (32, 32), (300, 90), (25, 25), (64, 200))) -> datasets.Dataset:
    """JPEGs and PNGs of several sizes."""
    from io import BytesIO

    files = []
    for i, (width, height) in enumerate(sizes):
        y, x = np.mgrid[0:height, 0:width] / 11
        waves = np.stack([np.sin(x * (i + 1) / 3 + c) + np.cos(y + c) for c in range(3)], axis=2)
        file = BytesIO()
        Pillow.fromarray((127 + 60 * waves).astype(np.uint8)).save(file, "JPEG" if i % 2 else "PNG")
        files.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Value("int64"), "example_id": datasets.Value("int64")}
    )
    columns = {"image": files, "label": [i % 3 for i in range(len(sizes))], "example_id": [5, 3, 9, 1, 0, 7]}
    return datasets.Dataset.from_dict({n: v[: len(sizes)] for n, v in columns.items()}, features=features)


def batches(rows, collate, size=4, **options):
    return list(DataLoader(rows, batch_size=size, collate_fn=collate, **options))


def assert_same(a, b) -> None:
    assert len(a) == len(b)
    for first, second in zip(a, b, strict=True):
        assert first.keys() == second.keys()
        for name in first:
            assert first[name].dtype == second[name].dtype
            assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("config", [COLOUR, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize("augment", [*AUGMENTATIONS, ALL, "light+randaugment+noise"])
def test_every_augmentation(tmp_path, augment, config):
    backbone = FakeBackbone(data_config=dict(config))
    live = prepare_train(ragged(), backbone, augment=augment)
    stored = store_images(live, tmp_path / "store")
    collate = collator_for(backbone)
    for epoch in (0, 3):
        dataset_epoch(stored).set(epoch)
        assert_same(batches(live, collate), batches(stored, collate))
    assert is_random(stored) == is_random(live) == (augment != "none")


def test_evaluation_rows_are_the_backbones_own(tmp_path, image_rows):
    backbone, rows = FakeBackbone(), image_rows(5)
    live = prepare(rows, backbone, IMAGES, train=False)
    stored = store_images(live, tmp_path / "store")
    assert_same(batches(live, collator_for(backbone)), batches(stored, collator_for(backbone)))
    assert stored.store.bytes == 5 * 32 * 32 * 3
    assert "epoch" not in stored[0]


@pytest.mark.parametrize("name", ["ViTImageProcessor", "ConvNextImageProcessor"])
def test_image_processors_of_transformers(tmp_path, name):
    import transformers

    size = {"height": 32, "width": 32} if name.startswith("ViT") else {"shortest_edge": 32}
    backbone = FakeBackbone(processor=getattr(transformers, name)(size=size))
    for train in (False, True):
        live = prepare(ragged(), backbone, IMAGES, train=train)
        stored = store_images(live, tmp_path / f"store-{train}")
        assert_same(batches(live, collator_for(backbone)), batches(stored, collator_for(backbone)))


def test_a_processor_that_resizes_floats_is_refused(tmp_path):
    import transformers

    processor = transformers.MobileViTImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    with pytest.raises(TransferError, match="MobileViTImageProcessor resizes other than 8-bit images"):
        store_images(prepare(ragged(), FakeBackbone(processor=processor), IMAGES, train=False), tmp_path)


def test_a_row_is_a_mapping_of_what_the_live_row_holds(tmp_path):
    live = prepare_train(ragged().add_column("domain", [0, 1, 0, 1, 0, 1]), FakeBackbone(), augment=ALL)
    stored = store_images(live, tmp_path / "store")
    for row in range(6):
        a, b = live[row], {**stored[row]}
        assert a.keys() == b.keys() and len(stored[row]) == len(a)
        assert torch.equal(a.pop("pixel_values"), b.pop("pixel_values"))
        assert a == b
    assert stored[-1]["example_id"] == live[-1]["example_id"]
    with pytest.raises(IndexError):
        stored[6]
    assert "width" not in stored[0]


def test_position_and_batch_do_not_matter(tmp_path):
    backbone = FakeBackbone()
    stored = store_images(prepare_train(ragged(), backbone, augment=ALL), tmp_path / "store")
    collate = collator_for(backbone)
    whole = {
        int(i): x
        for batch in batches(stored, collate)
        for i, x in zip(batch["example_id"], batch["pixel_values"], strict=True)
    }
    for some in (Subset(stored, [4, 1]), stored.select([4, 1])):
        for batch in batches(some, collate, size=2):
            for i, x in zip(batch["example_id"], batch["pixel_values"], strict=True):
                assert torch.equal(whole[int(i)], x)
    mixed = [stored[3], {**stored[0]}]  # not of one batch
    assert torch.equal(collate(mixed)["pixel_values"][0], whole[1])


def test_mixing_balance_and_signatures_are_those_of_the_live_rows(tmp_path):
    backbone = FakeBackbone()
    live = prepare_train(ragged(), backbone, augment="light")
    stored = store_images(live, tmp_path / "store")
    blend = collator_for(backbone, mixup=0.4, cutmix=1.0)
    assert_same(batches(live, blend), batches(stored, blend))
    assert list(BalancedSampler.over_classes(live)) == list(BalancedSampler.over_classes(stored))
    assert data_signature(stored) == data_signature(live)
    assert transform_signature(stored) == transform_signature(live)
    assert data_signature(Subset(stored, [2, 4])) == data_signature(live.select([4, 2]))


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_persistent_workers_see_the_epoch(tmp_path, context):
    backbone = FakeBackbone()
    stored = store_images(prepare_train(ragged(), backbone, augment=ALL), tmp_path / "store", num_workers=2)
    collate = collator_for(backbone)
    loader = DataLoader(
        stored, batch_size=4, collate_fn=collate, num_workers=2, persistent_workers=True,
        multiprocessing_context=context,
    )  # fmt: skip
    for epoch in (0, 1):
        dataset_epoch(stored).set(epoch)
        assert_same(batches(stored, collate), list(loader))


def test_it_pickles_without_pixels_and_without_files(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    rows = datasets.Dataset.from_dict(
        {"image": [noise] * 4, "label": [0] * 4, "example_id": [0, 1, 2, 3]},
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.Value("int64"), "example_id": datasets.Value("int64")}
        ),
    )
    stored = store_images(prepare_train(rows, FakeBackbone(), augment="light"), tmp_path / "store")
    data = pickle.dumps(stored)
    assert len(data) < 20_000
    assert torch.equal(pickle.loads(data)[2]["pixel_values"], stored[2]["pixel_values"])


def test_large_images_are_shrunk_once_and_little_changes(tmp_path):
    """Those of up to twice the crop by their shorter side stay exact; of others, a crop differs by under 2 levels."""
    backbone = FakeBackbone(data_config={**COLOUR, "interpolation": "bilinear", "mean": (0.0,) * 3, "std": (1.0,) * 3})
    live = prepare_train(ragged(((300, 260), (64, 70), (90, 64))), backbone, augment="light")
    stored = store_images(live, tmp_path / "store")
    assert [x.shape[:2] for x in stored.store.images(stored.places)] == [(64, 74), (70, 64), (64, 90)]
    original = ragged(((300, 260),))[0]["image"]
    differences = []
    for epoch in range(20):
        dataset_epoch(live).set(epoch)
        found = stored[0]["pixel_values"]
        assert torch.equal(found, live[0]["pixel_values"])
        differences.append(255 * (found - _whole_crop(stored, original, epoch)).abs().mean())
    assert np.mean(differences) < 2


def _whole_crop(stored, image, epoch: int) -> torch.Tensor:
    """The crop of that epoch, cut from the whole image."""
    from hf_transfer.data.random_boxes import random_crops

    draws = Draws(0, epoch, stored.ids[:1])
    (box,), (flip,) = random_crops(np.array([64]), np.array([74]), draws, 1, area=(0.5, 1.0))
    share = image.size[1] / 64
    top, left, height, width = (box * share).tolist()
    cut = image.resize((32, 32), Pillow.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    found = np.asarray(cut)[:, ::-1] if flip else np.asarray(cut)
    return torch.from_numpy(found.copy()).permute(2, 0, 1) / 255


def test_its_size_is_told_before_it_is_written(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="hf_transfer")
    live = prepare_train(ragged(), FakeBackbone(), augment="light")
    stored = store_images(live, tmp_path / "store")
    said = caplog.messages[0]
    assert "6 images, about 0.1 MiB" in said and "MiB free" in said
    assert stored.store.bytes == pytest.approx(0.1 * 2**20, rel=0.5)


def test_other_rows_are_refused(tmp_path, image_rows):
    backbone = FakeBackbone()
    store_images(prepare_train(ragged(), backbone), tmp_path / "store")
    with pytest.raises(TransferError, match="is of other rows"):
        store_images(prepare_train(image_rows(4), backbone), tmp_path / "store")
    with pytest.raises(TransferError, match="is of other done"):
        store_images(prepare_train(ragged(), backbone, augment="noise"), tmp_path / "store")
    store_images(prepare_train(ragged().shuffle(seed=0), backbone), tmp_path / "store")


def test_what_was_not_prepared_is_refused(tmp_path, image_rows):
    for rows in (image_rows(2), [1, 2]):
        with pytest.raises(TransferError, match=r"prepare\(\) has prepared"):
            store_images(rows, tmp_path)


def test_a_bad_row_is_named(tmp_path):
    rows = ragged().cast_column("image", datasets.Image(decode=False))
    files = list(rows["image"])
    files[2] = {"bytes": files[2]["bytes"][:200], "path": None}
    live = prepare_train(rows.remove_columns("image").add_column("image", files), FakeBackbone())
    with pytest.raises(TransferError, match="example_id 9"):
        store_images(live, tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("augment", ["light", ALL, "light+randaugment+colour"])
def test_on_a_device_the_batch_becomes_what_it_is_on_the_host(tmp_path, monkeypatch, augment):
    backbone = FakeBackbone()
    stored = store_images(prepare_train(ragged(), backbone, augment=augment), tmp_path / "store")
    collate = collator_for(backbone)
    cpu = torch.device("cpu")
    assert handing_over(collate, stored, cpu) is collate
    monkeypatch.setattr(on_device, "worth_it", lambda device: True)
    split = handing_over(collate, stored, cpu)
    dataset_epoch(stored).set(2)
    for expected, found in zip(batches(stored, collate), batches(stored, split), strict=True):
        assert found["pixel_values"].dtype == torch.uint8
        assert_same([expected], [finished(found, stored)])
        assert finished(expected, stored) is expected
    blend = collator_for(backbone, mixup=0.4)
    assert handing_over(blend, stored, cpu) is blend
    assert handing_over(collate, prepare_train(ragged(), backbone), cpu) is collate


def test_a_row_knows_the_epoch_in_which_it_was_taken(tmp_path):
    stored = store_images(prepare_train(ragged(), FakeBackbone(), augment="light"), tmp_path / "store")
    row = stored[0]
    before = row["pixel_values"]
    dataset_epoch(stored).set(1)
    assert isinstance(row, StoredRow) and row["epoch"] == 0
    assert torch.equal(row["pixel_values"], before)
    assert not torch.equal(stored[0]["pixel_values"], before)


def test_large_images_are_augmented_a_few_at_a_time(tmp_path):
    backbone = FakeBackbone(data_config={**COLOUR, "input_size": (3, 224, 224)})
    stored = store_images(prepare_train(ragged(), backbone, augment=ALL), tmp_path / "store")
    whole = collator_for(backbone)([stored[row] for row in range(6)])["pixel_values"]
    for row in range(6):
        assert torch.equal(stored[row]["pixel_values"], whole[row])


@pytest.mark.parametrize("config", [COLOUR, GREY], ids=["colour", "grey"])
def test_on_a_device_nothing_is_left_on_the_cpu(tmp_path, config):
    """torch's "meta" device computes nothing, and refuses tensors of another."""
    backbone = FakeBackbone(data_config=dict(config))
    stored = store_images(prepare_train(ragged(), backbone, augment=ALL), tmp_path / "store")
    channels, height, width = config["input_size"]
    pixels = torch.empty(6, channels, height, width, dtype=torch.uint8, device="meta")
    ids = stored.ids.to("meta")
    found = stored.transform.on_device(pixels, Draws(0, torch.zeros_like(ids), ids))
    assert found.device.type == "meta" and found.shape == (6, *config["input_size"]) and found.dtype == torch.float32
