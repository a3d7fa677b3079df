"""simplejpeg is used where it gives Pillow's pixels, and only there."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from hf_transfer.data import fast_jpeg
from hf_transfer.data.decoding import decode_image


def jpeg(mode: str = "RGB", **options) -> dict:
    y, x = np.mgrid[0:45, 0:61] / 9
    waves = np.stack([np.sin(x + c) + np.cos(y * c) for c in range(3)], axis=2)
    file = BytesIO()
    Image.fromarray((127 + 60 * waves).astype(np.uint8)).convert(mode).save(file, "JPEG", **options)
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How often simplejpeg decodes."""
    simplejpeg = pytest.importorskip("simplejpeg")
    assert fast_jpeg.is_exact()
    found: list[int] = []
    plain = simplejpeg.decode_jpeg

    def counted(content, *args, **kwargs):
        found.append(len(content))
        return plain(content, *args, **kwargs)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", counted)
    return found


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True, "quality": 40}, {"mode": "L"}])
def test_pixels_are_pillows(calls, options, tmp_path):
    file = jpeg(**options)
    expected = np.asarray(Image.open(BytesIO(file["bytes"])).convert("RGB"))
    found = decode_image(file)
    assert found.mode == "RGB" and np.array_equal(np.asarray(found), expected)
    path = tmp_path / "a.jpg"
    path.write_bytes(file["bytes"])
    assert np.array_equal(np.asarray(decode_image({"bytes": None, "path": str(path)})), expected)
    assert len(calls) == 2


def test_what_pillow_does_otherwise_is_left_to_it(calls):
    turned = Image.Exif()
    turned[0x0112] = 6
    assert decode_image(jpeg(exif=turned)).size == (45, 61)
    assert decode_image(jpeg(mode="CMYK")).size == (61, 45)
    assert decode_image(jpeg(), channels=1).mode == "L"  # its own grey is the luma before colours are made of it
    file = BytesIO()
    Image.new("RGB", (5, 6)).save(file, "PNG")
    assert decode_image({"bytes": file.getvalue(), "path": None}).size == (5, 6)
    assert not calls


def test_a_damaged_file_is_pillows_to_judge(calls):
    content = jpeg()["bytes"]
    with pytest.raises(OSError):
        decode_image({"bytes": content[: len(content) // 2], "path": None})


def test_other_pixels_are_not_used(calls, monkeypatch):
    import simplejpeg

    plain = simplejpeg.decode_jpeg
    monkeypatch.setattr(
        simplejpeg, "decode_jpeg", lambda content, *args, **kwargs: 255 - plain(content, *args, **kwargs)
    )
    fast_jpeg.is_exact.cache_clear()
    try:
        expected = np.asarray(Image.open(BytesIO(jpeg()["bytes"])))
        assert np.array_equal(np.asarray(decode_image(jpeg())), expected)
    finally:
        fast_jpeg.is_exact.cache_clear()


def test_it_is_not_needed(monkeypatch):
    monkeypatch.setattr(fast_jpeg, "find_spec", lambda name: None)
    fast_jpeg.is_exact.cache_clear()
    try:
        assert not fast_jpeg.is_exact()
        assert decode_image(jpeg()).size == (61, 45)
    finally:
        fast_jpeg.is_exact.cache_clear()
