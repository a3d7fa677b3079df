"""What is cached on a disk is listed whole or in part, and removed only if it is named."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.utils import WeakFileLock

from hf_transfer import TransferError, cli
from hf_transfer.distillation.cache import write_cache
from hf_transfer.distillation.signal import TeacherSignal
from hf_transfer.frozen.cache import CacheKey, PrefixCache, write_prefix_cache
from hf_transfer.store.folders import Found, cache_folder, caches_in, chosen, default_home, remove

KEY = CacheKey("weights" * 3, "data" * 5, "transform" * 3, views=1)
BATCH = {"example_id": torch.arange(4)}


def prefix_cache(folder: Path, about: str = "resnet, before fc", stop: bool = False) -> None:
    def computed(view: int, there: np.ndarray) -> Any:
        yield BATCH, torch.ones(4, 8)
        if stop:
            raise KeyboardInterrupt

    write_prefix_cache(folder, KEY, computed, about=about)


def teacher_cache(folder: Path) -> None:
    write_cache(folder, KEY, lambda batch: TeacherSignal(logits=torch.zeros(4, 3)), lambda view: [BATCH])


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
