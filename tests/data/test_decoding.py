"""What can go wrong with a stored image or sound, and how the row is named."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from data_fakes import FakeBackbone, wav
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

from hf_transfer.data.columns import Columns
from hf_transfer.data.decoding import decode_audio, decode_image, resample
from hf_transfer.data.identity import describe, first_id
from hf_transfer.data.transforms import prepare
from hf_transfer.errors import TransferError

IMAGES = Columns("image", "label", "image", "image-classification")


def stored(image: Pillow.Image, kind: str = "PNG", **options) -> dict:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def noise(size=(40, 40, 3)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)


@pytest.fixture
def rows():
    """Five test rows of which row 1 is cut short, row 2 is no image, row 3 is missing."""
    whole = stored(Pillow.fromarray(noise()), "JPEG")
    cut = {"bytes": whole["bytes"][: len(whole["bytes"]) // 2], "path": None}
    files = [whole, cut, {"bytes": b"nothing", "path": None}, None, whole]
    features = Features(
        {"image": Image(decode=False), "label": ClassLabel(names=["a", "b"]), "example_id": Value("int64")}
    )
    ids = [first_id("test") + i for i in range(5)]
    return Dataset.from_dict({"image": files, "label": [0, 1, 0, 1, 1], "example_id": ids}, features=features)


def prepared(rows, **options):
    return prepare(rows, FakeBackbone(), IMAGES, train=False, **options)


def test_a_row_that_is_no_image_is_named_before_any_work(rows):
    with pytest.raises(
        TransferError, match=r'image in test row 2 \(example_id 2199023255554\).*on_bad_example="skip"'
    ):
        prepared(rows)


def test_a_row_without_image_is_named(rows):
    with pytest.raises(TransferError, match=r"test row 3 .*: the row has no image"):
        prepared(rows.select([0, 3]))


def test_an_image_cut_short_is_named_when_it_is_read(rows):
    ready = prepared(rows.select([0, 1]))
    assert ready[0]["pixel_values"].shape == (3, 32, 32)
    with pytest.raises(TransferError, match=r"image in test row 1 .*truncated"):
        ready[1]


def test_skipping_is_decided_once_and_shifts_no_identity(rows, caplog):
    ready = prepared(rows, on_bad_example="skip")
    assert [row["example_id"] - first_id("test") for row in ready] == [0, 4]
    assert [row["labels"] for row in ready] == [0, 1]
    assert "left out 3 unreadable image rows: test row 1" in caplog.text


def test_nothing_readable_is_an_error(rows):
    with pytest.raises(TransferError, match="None of the 2 rows of column 'image' is a readable image"):
        prepared(rows.select([1, 2]), on_bad_example="skip")


def test_policies_are_two(rows):
    with pytest.raises(TransferError, match='on_bad_example=\'drop\': valid are "raise" and "skip"'):
        prepared(rows, on_bad_example="drop")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1", "LA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_usual_kind_of_image_is_read(mode, channels):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    image = decode_image(stored(Pillow.fromarray(noise()).convert(mode), kind), channels)
    assert image.mode == {1: "L", 3: "RGB"}[channels]
    assert image.size == (40, 40)


def test_16_bit_images_keep_their_contrast():
    ramp = np.linspace(0, 65535, 40 * 40).astype(np.uint16).reshape(40, 40)
    found = np.asarray(decode_image(stored(Pillow.fromarray(ramp)), 1))
    assert np.abs(found.astype(int) - ramp / 257).max() <= 1


def test_pixels_of_unknown_range_are_refused():
    with pytest.raises(ValueError, match="unknown range"):
        decode_image(stored(Pillow.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))


def test_images_are_turned_upright():
    exif = Pillow.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    assert decode_image(stored(Pillow.fromarray(noise((10, 30, 3))), "JPEG", exif=exif)).size == (10, 30)


def test_images_kept_as_paths_are_read(tmp_path):
    Pillow.fromarray(noise()).save(tmp_path / "a.png")
    assert decode_image({"bytes": None, "path": str(tmp_path / "a.png")}).size == (40, 40)


def test_sounds_become_one_channel():
    stereo = np.stack([np.full(100, 0.5), np.full(100, -0.25)], axis=1)
    waveform, rate = decode_audio({"bytes": wav(stereo, 11025, channels=2), "path": None})
    assert (rate, waveform.dtype, waveform.shape) == (11025, np.float32, (100,))
    assert np.allclose(waveform, 0.125, atol=1e-4)


def test_an_empty_sound_is_refused():
    with pytest.raises(ValueError, match="0 samples"):
        decode_audio({"bytes": wav([]), "path": None})


@pytest.mark.parametrize(("rate", "target"), [(8000, 16000), (44100, 16000), (16000, 8000), (22050, 48000)])
def test_resampling_keeps_a_tone(rate, target):
    seconds, tone = 0.5, 440
    before = np.sin(2 * np.pi * tone * np.arange(int(rate * seconds)) / rate).astype(np.float32)
    after = resample(before, rate, target)
    assert (len(after), after.dtype) == (-(-len(before) * target // rate), np.float32)
    expected = np.sin(2 * np.pi * tone * np.arange(len(after)) / target)
    middle = slice(len(after) // 10, -len(after) // 10)  # the filter's ends see silence
    assert np.abs(after - expected)[middle].max() < 0.01


def test_no_resampling_is_no_change():
    waveform = np.ones(3, np.float32)
    assert resample(waveform, 8000, 8000) is waveform


def test_rows_are_named_by_split_and_domain():
    assert describe(5) == "train row 5 (example_id 5)"
    assert describe(first_id("validation") + 3).startswith("validation row 3 (")
    assert describe(first_id("test", domain=2) + 1).startswith("test row 1 of domain 2 (")
