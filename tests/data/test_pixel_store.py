"""A store is written whole or not at all, once, and read only for its own rows."""

from __future__ import annotations

import errno
import json
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest

from hf_transfer.data import pixel_store
from hf_transfer.data.pixel_store import PixelStore, StoreKey, StoreTooLarge, write_store
from hf_transfer.errors import TransferError

KEY = StoreKey("rows", "done", 3)
SIZES = {7: (20, 30), 1 << 41: (5, 4), 2: (9, 9)}


def pictures(sizes: dict[int, tuple[int, int]] = SIZES) -> list[tuple[int, np.ndarray]]:
    generator = np.random.default_rng(0)
    return [(i, generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for i, size in sizes.items()]


def write(folder: Path, **options) -> PixelStore:
    return write_store(folder, KEY, pictures, **{"max_bytes": 1 << 30, **options})


def test_images_of_any_size_are_found_by_id(tmp_path):
    store, expected = write(tmp_path / "a"), dict(pictures())
    ids = [2, 7, 1 << 41, 7]
    for found, i in zip(store.images(store.places(ids)), ids, strict=True):
        assert np.array_equal(found, expected[i])
    assert len(store) == 3 and store.bytes == sum(x.size for x in expected.values())
    with pytest.raises(TransferError, match="has no example_id 3"):
        store.places([7, 3])


def test_small_images_of_one_size_come_as_one_array(tmp_path):
    same = dict.fromkeys(range(5), (8, 6))
    store = write_store(tmp_path / "a", KEY, lambda: pictures(same), max_bytes=1 << 20)
    found = store.images(store.places([3, 1]))
    assert isinstance(found, np.ndarray) and found.shape == (2, 8, 6, 3)
    assert np.array_equal(found[0], dict(pictures(same))[3])


def test_it_is_written_once(tmp_path):
    write(tmp_path / "a")

    def refuse():
        raise AssertionError

    again = write_store(tmp_path / "a", KEY, refuse, max_bytes=1)
    assert len(again) == 3


def test_it_pickles_without_its_images(tmp_path):
    store = write_store(tmp_path / "a", KEY, lambda: pictures({0: (300, 300)}), max_bytes=1 << 20)
    data = pickle.dumps(store)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data).images(np.array([0]))[0], store.images(np.array([0]))[0])


@pytest.mark.parametrize("change", [{"rows": "x"}, {"done": "x"}, {"channels": 1}])
def test_another_stores_images_are_refused(tmp_path, change):
    write(tmp_path / "a")
    other = StoreKey(**{**vars(KEY), **change})
    with pytest.raises(TransferError, match=f"is of other {next(iter(change))}"):
        write_store(tmp_path / "a", other, pictures, max_bytes=1 << 20)


def test_another_programs_folder_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "something"}))
    with pytest.raises(TransferError, match="not of an image store"):
        write(tmp_path)


def test_an_image_that_fails_leaves_nothing(tmp_path):
    def broken():
        yield from pictures()
        raise TransferError("row 5")

    with pytest.raises(TransferError, match="row 5"):
        write_store(tmp_path / "a", KEY, broken, max_bytes=1 << 20)
    assert not (tmp_path / "a").exists()
    assert len(write(tmp_path / "a")) == 3


def test_too_much_leaves_nothing(tmp_path):
    with pytest.raises(StoreTooLarge, match="image_store_max_bytes=2,000, after 2 rows"):
        write(tmp_path / "a", max_bytes=2000)
    assert not (tmp_path / "a").exists()


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pixel_store.os, "fsync", full)
    with pytest.raises(TransferError, match=r"No space is left on the disk of .*/a'"):
        write(tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("damage", ["cut", "no manifest", "no index"])
def test_an_interrupted_one_is_written_anew(tmp_path, damage):
    write(tmp_path / "a")
    if damage == "cut":
        with (tmp_path / "a" / "pixels.u8").open("r+b") as file:
            file.truncate(100)
    else:
        (tmp_path / "a" / ("manifest.json" if damage == "no manifest" else "images.npy")).unlink()
    with pytest.raises(TransferError, match="no complete image store"):
        PixelStore.open(tmp_path / "a", KEY)
    (tmp_path / ".a.left").mkdir()  # the workspace of a writer that was killed
    assert len(write(tmp_path / "a")) == 3
    assert not (tmp_path / ".a.left").exists()


def _slowly_written(folder: Path, written: Path) -> None:
    def images():
        with written.open("a") as file:
            file.write("once\n")
        yield from pictures()

    store = write_store(folder, KEY, images, max_bytes=1 << 20)
    assert len(store) == 3


def test_many_processes_write_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_slowly_written, args=(tmp_path / "a", tmp_path / "log")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "log").read_text() == "once\n"
