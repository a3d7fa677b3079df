"""A writer that is killed loses the block that it was at, and no other."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_transfer.errors import TransferError
from hf_transfer.store import journal
from hf_transfer.store.key import CacheKey, Kind
from hf_transfer.store.manifest import Contents
from hf_transfer.store.reading import RowCache
from hf_transfer.store.writing import write

ROWS, STEP = 12, 2


class Cache(RowCache):
    kind = Kind("tested cache", source="source", instead="compute it")


def contents(**kept: Any) -> Contents:
    return Contents(CacheKey("s", "d", "t", views=2), kept, "rows of a test")


def entries(
    each: Callable[[int], None] = lambda view: None, own: slice = slice(None)
) -> Callable[[int, np.ndarray], Iterator[Any]]:
    """Rows that hold their view and number; `each` sees the view of every batch before it is given."""

    def given(view: int, there: np.ndarray) -> Iterator[Any]:
        ids = np.setdiff1d(np.arange(ROWS), there)[own]
        for start in range(0, len(ids), STEP):
            each(view)
            part = ids[start : start + STEP]
            yield {"ids": part, "values": part[:, None] + 100.0 * view}, {"classes": 1}

    return given


def check(cache: Cache) -> None:
    for view in range(2):
        place = cache._find(np.arange(ROWS), view)
        shard = np.searchsorted(cache._first_row, place, side="right") - 1
        values = cache._read(shard, place - cache._first_row[shard])["values"]
        assert values[:, 0].tolist() == [number + 100.0 * view for number in range(ROWS)]


def written_slowly(folder: Path) -> None:
    """Nearly to the end, where it waits to be killed, however late that comes."""
    seen: list[int] = []

    def pause(view: int) -> None:
        seen.append(view)
        time.sleep(0.02 if len(seen) < 10 else 60)

    write(Cache, folder, contents(), entries(pause))


def test_a_killed_writer_loses_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "BLOCK_SECONDS", -1.0)  # a block a batch
    child = multiprocessing.get_context("fork").Process(target=written_slowly, args=(tmp_path,))
    child.start()
    path = tmp_path / "shards" / "000-00000.journal"
    for _ in range(1000):
        if path.exists() and len(path.read_bytes().splitlines()) > 7:  # the sixth block was of view 0, the last of it
            break
        time.sleep(0.01)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join(30)
    blocks = [json.loads(line) for line in path.read_bytes().splitlines()[1:]]
    there = sum(block["rows"] for block in blocks)
    assert 0 < there < 2 * ROWS
    computed: list[int] = []
    check(write(Cache, tmp_path, contents(), entries(computed.append)))
    assert STEP * len(computed) == 2 * ROWS - there
    assert len(list(path.parent.glob("*.journal"))) == 2


def test_what_several_processes_left_is_shared_by_others(tmp_path: Path) -> None:
    """Two processes are interrupted; one goes on for both."""

    def interrupted(view: int) -> None:
        if view == 1:
            raise TransferError("stopped")

    barrier = threading.Barrier(2, timeout=20)

    def work(rank: int) -> None:
        with pytest.raises(TransferError):
            write(
                Cache, tmp_path, contents(), entries(interrupted, slice(rank, None, 2)), rank=rank, world_size=2,
                wait=barrier.wait,
            )  # fmt: skip

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    computed: list[int] = []
    check(write(Cache, tmp_path, contents(), entries(computed.append)))
    assert computed == [1] * (ROWS // STEP)


def test_what_is_left_of_something_else_is_not_gone_on_from(tmp_path: Path) -> None:
    def interrupted(view: int) -> None:
        if view == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(Cache, tmp_path, contents(dtype="float16"), entries(interrupted))
    computed: list[int] = []
    check(write(Cache, tmp_path, contents(dtype="float32"), entries(computed.append)))
    assert len(computed) == 2 * ROWS // STEP
    assert len(list((tmp_path / "shards").glob("*.journal"))) == 1
