"""What is cached on a disk is listed whole or in part, and removed only if it is named."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
from huggingface_hub.utils import WeakFileLock

from hf_transfer import TransferConfig, TransferError, cli, load_backbone
from hf_transfer.config import RunConfig
from hf_transfer.data.pixel_store import PixelStore, StoreKey, write_store
from hf_transfer.data.sources import load_data
from hf_transfer.data.store_choice import stored_splits
from hf_transfer.data.transforms import prepare
from hf_transfer.distillation.cache import write_cache
from hf_transfer.distillation.signal import TeacherSignal
from hf_transfer.frozen.cache import CacheKey, PrefixCache, write_prefix_cache
from hf_transfer.store.folders import Found, cache_folder, caches_in, chosen, default_home, remove

KEY = CacheKey("weights" * 3, "data" * 5, "transform" * 3, views=1)
BATCH = {"example_id": torch.arange(4)}
IMAGES = StoreKey("rows", "done", 3)


def prefix_cache(folder: Path, about: str = "resnet, before fc", stop: bool = False) -> None:
    def computed(view: int, there: np.ndarray) -> Any:
        yield BATCH, torch.ones(4, 8)
        if stop:
            raise KeyboardInterrupt

    write_prefix_cache(folder, KEY, computed, about=about)


def teacher_cache(folder: Path) -> None:
    write_cache(folder, KEY, lambda batch: TeacherSignal(logits=torch.zeros(4, 3)), lambda view: [BATCH])


def image_store(folder: Path) -> PixelStore:
    images = [(row, np.zeros((6, 5, 3), np.uint8)) for row in range(4)]
    return write_store(folder, IMAGES, lambda: images, max_bytes=1 << 20, about="4 images, 6 x 5 pixels")


def killed(folder: Path, after: int) -> None:
    """Writes an image store and is killed after so many images."""

    def images() -> Any:
        yield from [(row, np.zeros((6, 5, 3), np.uint8)) for row in range(after)]
        os._exit(9)

    child = multiprocessing.get_context("fork").Process(
        target=write_store, args=(folder, IMAGES, images), kwargs={"max_bytes": 1 << 20, "about": "9 images"}
    )
    child.start()
    child.join()
    assert child.exitcode == 9


def stored_by_a_run(backbone: Path) -> Path:
    """Where a run puts the images of its training rows."""
    data = load_data(tiny_runs.digits(20, 10))
    train = prepare(data.splits["train"], load_backbone(backbone), data.columns, train=False)
    run = RunConfig(model=str(backbone), dataset="digits", image_store="always")
    args = TransferConfig(output_dir=str(backbone), report_to="none", num_train_epochs=2)
    return stored_splits({"train": train}, run, args)["train"].store.folder


def used_days_ago(folder: Path, days: float) -> None:
    then = time.time() - 86400 * days
    for path in folder.rglob("*"):
        os.utime(path, (then, then))


@pytest.fixture
def caches(tmp_path: Path) -> Path:
    """A whole cache of 40 days ago, one that was interrupted yesterday, a teacher's of today, and something else."""
    prefix_cache(tmp_path / "old")
    used_days_ago(tmp_path / "old", 40)
    with pytest.raises(KeyboardInterrupt):
        prefix_cache(tmp_path / "half", about="vit, after block 3", stop=True)
    used_days_ago(tmp_path / "half", 1)
    teacher_cache(tmp_path / "taught")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "manifest.json").write_text('{"name": "web app"}')
    return tmp_path


def test_what_lies_there(caches: Path) -> None:
    found = caches_in([caches, caches / "none"])
    assert [cache.folder.name for cache in found] == ["taught", "half", "old"]  # the last used first
    assert [cache.kind for cache in found] == ["teacher cache", "prefix cache", "prefix cache"]
    assert [cache.complete for cache in found] == [True, False, True]
    assert [cache.about for cache in found] == ["", "vit, after block 3", "resnet, before fc"]
    sizes = [sum(path.stat().st_size for path in (caches / name).rglob("*") if path.is_file() and path.name != ".lock")
             for name in ("taught", "half", "old")]  # fmt: skip
    assert [cache.size for cache in found] == sizes
    assert [round(cache.days) for cache in found] == [0, 1, 40]


def test_opening_one_is_using_it(caches: Path) -> None:
    PrefixCache.open(caches / "old", KEY)
    assert round({cache.folder.name: cache.days for cache in caches_in([caches])}["old"]) == 0


def test_removed_with_nothing_that_is_not_the_caches(caches: Path) -> None:
    (caches / "taught" / "notes.txt").write_text("mine")
    for cache in caches_in([caches]):
        remove(cache)
    assert [path.name for path in sorted(caches.iterdir())] == ["photos", "taught"]
    assert [path.name for path in (caches / "taught").iterdir()] == ["notes.txt"]


def test_image_stores_among_them(caches: Path) -> None:
    image_store(caches / "pixels")
    used_days_ago(caches / "pixels", 3)
    killed(caches / "shot", after=3)
    used_days_ago(caches / "shot", 5)
    found = {cache.folder.name: cache for cache in caches_in([caches])}
    assert list(found) == ["taught", "half", "pixels", "shot", "old"]
    assert [(found[name].kind, found[name].about, found[name].complete) for name in ("pixels", "shot")] == [
        ("images", "4 images, 6 x 5 pixels", True),
        ("images", "9 images", False),
    ]
    assert found["pixels"].size == sum(path.stat().st_size for path in (caches / "pixels").iterdir()) > 4 * 6 * 5 * 3
    assert [round(found[name].days) for name in ("pixels", "shot")] == [3, 5]
    PixelStore.open(caches / "pixels", IMAGES)
    assert round({cache.folder.name: cache.days for cache in caches_in([caches])}["pixels"]) == 0


def test_an_image_store_is_removed_with_its_lock(caches: Path) -> None:
    before = sorted(caches.iterdir())
    image_store(caches / "pixels")
    image_store(caches / "more")
    (caches / "more" / "notes.txt").write_text("mine")
    found = {cache.folder.name: cache for cache in caches_in([caches])}
    with WeakFileLock(caches / "pixels.lock"), pytest.raises(TransferError, match=r"A run is writing .*pixels"):
        remove(found["pixels"])
    assert len(image_store(caches / "pixels")) == 4
    remove(found["pixels"])
    remove(found["more"])
    assert sorted(caches.iterdir()) == sorted([*before, caches / "more"])
    assert [path.name for path in (caches / "more").iterdir()] == ["notes.txt"]
    killed(caches / "pixels", after=2)
    assert len(image_store(caches / "pixels")) == 4  # what a killed run left is written anew


def test_the_command_looks_where_runs_put_each_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    teacher_cache(default_home("teachers") / "a")
    prefix_cache(default_home("prefixes") / "b")
    store = stored_by_a_run(tiny_runs.image_backbone(tmp_path / "start", labels=[str(digit) for digit in range(10)]))
    assert store.parent == default_home("images")
    cli.main(["cache"])
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()[1:4]] == [store.name, "b", "a"]
    assert "days ago  18 images, 32 x 32 pixels" in listed
    cli.main(["cache", "--remove", store.name])
    assert not any(default_home("images").iterdir())


def test_one_that_is_being_written_stays(caches: Path) -> None:
    half = next(cache for cache in caches_in([caches]) if not cache.complete)
    with WeakFileLock(half.folder / ".lock"), pytest.raises(TransferError, match=r"A run is writing .*half"):
        remove(half)
    assert half in caches_in([caches])


def test_none_is_chosen_that_was_not_named(caches: Path) -> None:
    found = caches_in([caches])
    assert [cache.folder.name for cache in chosen(found, ["old"], all_of_them=True)] == ["old"]
    assert chosen(found, [], all_of_them=True) == found
    with pytest.raises(TransferError, match=r"names no cache.*There are: taught, half, old"):
        chosen(found, [], all_of_them=False)
    with pytest.raises(TransferError, match=r"no cache named photos\. There are: taught, half, old"):
        chosen(found, ["old", "photos"], all_of_them=False)


def test_the_command(caches: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*flags: str) -> str:
        cli.main(["cache", "--folder", str(caches), *flags])
        return capsys.readouterr().out

    listed = said()
    assert "half    prefix cache, incomplete" in listed
    assert "40.0 days ago  resnet, before fc" in listed
    assert "MiB in all" in listed
    assert "half" not in said("--older-than", "30")
    assert (caches / "old").exists()  # nothing is removed by looking
    assert said("--older-than", "30", "--remove").startswith(f"removed {caches / 'old'}: 0.0 MiB")
    assert not (caches / "old").exists()
    said("--remove", "half")
    assert sorted(path.name for path in caches.iterdir()) == ["photos", "taught"]
    with pytest.raises(SystemExit):
        cli.main(["cache", "--folder", str(caches), "--remove"])
    cli.main(["cache", "--folder", str(caches / "none")])
    assert capsys.readouterr().out == "no caches\n"


def test_one_of_an_older_version_is_listed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "manifest.json").write_text('{"format": "hf_transfer teacher cache 1"}')
    (found,) = caches_in([tmp_path])
    assert (found.kind, found.about) == ("teacher cache", "written by an older version, not read any more")
    assert isinstance(found, Found)


def test_where_caches_lie_by_default(tmp_path: Path) -> None:
    named = "weightsweigh-datadatadata-transformtra-1-float16"
    assert cache_folder(None, "prefixes", KEY, "float16") == default_home("prefixes") / named
    assert cache_folder(tmp_path, "prefixes", KEY, "float16") == tmp_path / named
