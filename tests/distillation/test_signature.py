"""What keys a cache: equal for the same rows and views wherever they are made, other for what a teacher would see."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from cache_rows import IMAGES, image_backbone, images, prepared
from torch.utils.data import ConcatDataset, Subset

from hf_transfer.data.audio_transforms import AudioTransform
from hf_transfer.data.augmentations import AUGMENTATIONS
from hf_transfer.data.replay import Replayable, dataset_epoch
from hf_transfer.data.transforms import prepare
from hf_transfer.distillation.signature import data_signature, transform_signature
from hf_transfer.distillation.teacher_inputs import with_teacher_inputs
from hf_transfer.errors import TransferError


def tokens(rows: dict[int, list[int]], integer: str = "int64", **columns: Any) -> datasets.Dataset:
    """Tokenised rows by example_id."""
    features = {"input_ids": datasets.List(datasets.Value(integer)), "example_id": datasets.Value("int64")}
    features |= {name: datasets.Value("int64") for name in columns}
    return datasets.Dataset.from_dict(
        {"input_ids": list(rows.values()), "example_id": list(rows), **columns}, features=datasets.Features(features)
    )


ROWS = {4: [1, 2, 3], 9: [7], 2: [5, 5]}


def test_the_order_of_rows_and_how_they_are_held_do_not_count() -> None:
    rows = prepared()
    first = data_signature(rows)
    assert len(first) == 64
    shuffled = rows.shuffle(seed=1)
    assert {first} == {
        data_signature(x) for x in (prepared(), shuffled, Subset(shuffled, range(8)), rows.select(range(8)))
    }
    assert data_signature(pickle.loads(pickle.dumps(rows))) == first
    joined = datasets.concatenate_datasets([tokens({4: [1, 2, 3]}), tokens({9: [7], 2: [5, 5]})])
    assert data_signature(tokens(ROWS)) == data_signature(joined) == data_signature(tokens(ROWS, "int32"))
    assert data_signature(joined.select([2, 1]).shuffle(seed=0)) == data_signature(tokens({9: [7], 2: [5, 5]}))


def test_what_is_done_to_rows_and_their_labels_do_not_count() -> None:
    first = data_signature(prepared())
    assert data_signature(prepared("none", seed=3)) == first
    rows = prepared()
    dataset_epoch(rows).set(4)
    assert data_signature(rows) == first
    assert data_signature(tokens(ROWS, labels=[0, 1, 2])) == data_signature(tokens(ROWS, labels=[0, 1, 1]))


@pytest.mark.parametrize(
    "other",
    [
        {4: [1, 2, 3], 9: [7], 2: [5, 6]},  # a token
        {4: [1, 2], 9: [3, 7], 2: [5, 5]},  # where a row ends
        {4: [1, 2, 3], 9: [7], 3: [5, 5]},  # an identity
        {4: [1, 2, 3], 2: [7], 9: [5, 5]},  # whose row it is
        {4: [1, 2, 3], 9: [7]},  # a row less
        {4: [1, 2, 3], 9: [], 2: [7, 5, 5]},
    ],
)
def test_other_rows_have_another_signature(other: dict[int, list[int]]) -> None:
    assert data_signature(tokens(other)) != data_signature(tokens(ROWS))


def test_every_column_but_labels_counts() -> None:
    assert data_signature(tokens(ROWS, domain=[0, 1, 1])) != data_signature(tokens(ROWS, domain=[0, 1, 0]))
    assert data_signature(tokens(ROWS, domain=[0, 0, 0])) != data_signature(tokens(ROWS))


def test_one_pixel_of_an_image_counts() -> None:
    pixels = np.asarray(images()[3]["image"]).copy()
    pixels[0, 0, 0] ^= 1
    changed = [row if i != 3 else row | {"image": pixels} for i, row in enumerate(images())]
    other = datasets.Dataset.from_list(changed, features=images().features)
    as_rows = [data_signature(prepare(x, image_backbone(), IMAGES, train=False)) for x in (images(), other)]
    assert as_rows[0] != as_rows[1]


@pytest.mark.parametrize("size", [(30, 30), (200, 220)])  # below and above what is read whole
def test_files_count_by_what_is_in_them_not_by_where_they_are(tmp_path: Path, size: tuple[int, int]) -> None:
    from PIL import Image

    def rows(folder: Path) -> str:
        features = datasets.Features({"image": datasets.Image(), "example_id": datasets.Value("int64")})
        files = sorted(str(path) for path in folder.iterdir())
        found = datasets.Dataset.from_dict({"image": files, "example_id": list(range(len(files)))}, features=features)
        return data_signature(found.cast_column("image", datasets.Image(decode=False)))

    here = tmp_path / "here"
    here.mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(here / f"{i}.bmp")
    assert ((here / "0.bmp").stat().st_size > 1 << 16) == (size == (200, 220))
    shutil.copytree(here, tmp_path / "there")
    first = rows(here)
    assert rows(tmp_path / "there") == first
    content = bytearray((here / "1.bmp").read_bytes())
    content[-1] ^= 1
    (here / "1.bmp").write_bytes(content)
    assert rows(here) != first


# ---- transforms -----------------------------------------------------------------------------------------------------


def test_the_same_transform_has_the_same_signature_whenever_it_is_made() -> None:
    rows = prepared()
    first = transform_signature(rows)
    assert transform_signature(prepared()) == first
    assert transform_signature(prepared(rows=3)) == first
    dataset_epoch(rows).set(7)
    assert transform_signature(rows) == first
    assert transform_signature(copy.deepcopy(rows)) == first
    assert transform_signature(Subset(rows.shuffle(seed=0), [1, 2])) == first


def test_each_augmentation_and_setting_has_its_own() -> None:
    found = [transform_signature(prepared(name)) for name in AUGMENTATIONS]
    assert found == [transform_signature(prepared(name)) for name in AUGMENTATIONS]
    found += [
        transform_signature(prepared("light+noise")),
        transform_signature(prepared("light", seed=1)),
        transform_signature(prepared("light", input_size=(3, 14, 14))),
        transform_signature(prepared("light", std=(0.25, 0.25, 0.26))),
        transform_signature(prepared("light", interpolation="bicubic")),
        transform_signature(prepared("none", crop_pct=0.8)),
        transform_signature(tokens(ROWS)),
    ]
    assert len(set(found)) == len(found)


def test_without_randomness_neither_seed_nor_training_counts() -> None:
    evaluated = prepare(images(), image_backbone(), IMAGES, train=False)
    assert transform_signature(evaluated) == transform_signature(prepared("none", seed=5))


def test_a_release_that_may_draw_otherwise_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_transfer.distillation import signature

    fixed, drawn = transform_signature(prepared("none")), transform_signature(prepared())
    monkeypatch.setattr(signature, "version", lambda name: "999.0")
    assert transform_signature(prepared("none")) == fixed
    assert transform_signature(prepared()) != drawn
    again = transform_signature(prepared())
    monkeypatch.setattr(signature, "version", lambda name: "999.0+cu130")  # another build of the same
    assert transform_signature(prepared()) == again


def test_processors_of_transformers_count_by_their_settings() -> None:
    from transformers import ASTFeatureExtractor, ViTImageProcessor, Wav2Vec2FeatureExtractor

    def image(**settings: Any) -> str:
        backbone = image_backbone()
        backbone.processor = ViTImageProcessor(size={"height": 12, "width": 12}, **settings)
        return transform_signature(prepare(images(), backbone, IMAGES, train=True))

    assert image() == image()
    assert image() != image(image_std=[0.3, 0.3, 0.3])

    def sound(extractor: Any, max_seconds: float | None = None) -> str:
        return transform_signature(
            tokens(ROWS).with_transform(AudioTransform(extractor, "audio", max_seconds=max_seconds))
        )

    found = [
        sound(Wav2Vec2FeatureExtractor()),
        sound(Wav2Vec2FeatureExtractor(do_normalize=False)),
        sound(Wav2Vec2FeatureExtractor(), max_seconds=2.0),
        sound(ASTFeatureExtractor()),
    ]
    assert len(set(found)) == 4
    assert sound(Wav2Vec2FeatureExtractor()) == found[0]


def test_the_teachers_own_inputs_count() -> None:
    theirs = {4: [11, 12], 9: [13], 2: [14], 5: [0]}
    both = data_signature(with_teacher_inputs(tokens(ROWS), tokens(theirs)))
    assert both != data_signature(tokens(ROWS))
    assert both == data_signature(
        with_teacher_inputs(tokens(ROWS), tokens(theirs | {5: [1]}))
    )  # no row of the student's
    assert both != data_signature(with_teacher_inputs(tokens(ROWS), tokens(theirs | {2: [15]})))
    student = prepared(seed=0)
    pairs = [with_teacher_inputs(student, prepared(seed=0, input_size=(3, side, side))) for side in (12, 16)]
    assert transform_signature(pairs[0]) != transform_signature(pairs[1])


class Flip(Replayable):
    """A transform of a user's, which may hold anything."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.part = part

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch


def test_a_replayable_transform_of_a_users_counts_by_what_it_holds() -> None:
    parts = [0.1, "a", [1, 2], torch.zeros(2), np.ones(3), torch.nn.Dropout(0.2), {"x": {3, 1}}, torch.float16, len]
    found = [transform_signature(tokens(ROWS).with_transform(Flip(part))) for part in parts]
    assert len(set(found)) == len(parts)
    assert found == [transform_signature(tokens(ROWS).with_transform(Flip(copy.deepcopy(part)))) for part in parts]


def test_what_cannot_be_told_apart_is_refused() -> None:
    with pytest.raises(TransferError, match=r"holds the function .*<lambda>: give it one of a module"):
        transform_signature(tokens(ROWS).with_transform(Flip(lambda x: x)))
    with pytest.raises(TransferError, match="cannot be replayed or told from another: function"):
        transform_signature(tokens(ROWS).with_transform(lambda batch: batch))
    for other in (ConcatDataset([tokens(ROWS)]), [1, 2]):
        for signature in (data_signature, transform_signature):
            with pytest.raises(TransferError, match=rf"a datasets.Dataset from .*, got {type(other).__name__}"):
                signature(other)
    with pytest.raises(TransferError, match="no such column; it has input_ids"):
        data_signature(tokens(ROWS).remove_columns("example_id"))


@pytest.mark.slow
def test_another_process_finds_the_same() -> None:
    code = (
        "from cache_rows import prepared; from hf_transfer.distillation.signature import *;"
        "import sys; sys.stdout.write(data_signature(prepared()) + transform_signature(prepared()))"
    )
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout == data_signature(prepared()) + transform_signature(prepared()), done.stderr[-2000:]
