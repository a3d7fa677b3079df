"""The cache of what crosses a cut: what is read is what was written, by row, view and token."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_transfer.distillation.cache import write_cache
from hf_transfer.distillation.signal import TeacherSignal
from hf_transfer.errors import TransferError
from hf_transfer.frozen.cache import CacheKey, IncompleteCache, PrefixCache, row_bytes, write_prefix_cache

KEY = CacheKey("weights", "data", "transform", views=2)
IDS = torch.tensor([40, 3, 17, 8, 25])
LENGTHS = torch.tensor([2, 5, 3, 1, 4])


def value_of(ids: Tensor, view: int, shape: tuple[int, ...]) -> Tensor:
    """A value that each row and view has alone."""
    flat = torch.arange(torch.tensor(shape).prod()).reshape(shape) / 7
    return ids.view(-1, *[1] * len(shape)) + 100.0 * view + flat


class Prefix:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.rows, self.view = shape, 0, 0

    def __call__(self, batch: Any) -> Tensor:
        self.rows += len(batch["example_id"])
        shape = self.shape
        if "attention_mask" in batch:
            shape = (batch["attention_mask"].shape[1], *shape[1:])
        return value_of(batch["example_id"], self.view, shape)

    def batches(self, view: int, text: bool = False) -> Iterator[dict[str, Tensor]]:
        self.view = view
        for rows in (slice(0, 2), slice(2, 5)):
            batch = {"example_id": IDS[rows]}
            if text:
                length = int(LENGTHS[rows].max())
                batch["attention_mask"] = (torch.arange(length) < LENGTHS[rows, None]).long()
            yield batch

    def computed(self, view: int, there: np.ndarray, text: bool = False) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for batch in self.batches(view, text):
            if not np.isin(batch["example_id"], there).all():
                yield batch, self(batch)


@pytest.mark.parametrize("shape", [(6,), (3, 4), (2, 3, 3)], ids=["vector", "tokens", "map"])
@pytest.mark.parametrize(
    ("dtype", "torch_dtype"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_rows_and_views_come_back_in_any_order(shape: Any, dtype: str, torch_dtype: Any, tmp_path: Path) -> None:
    prefix = Prefix(shape)
    cache = write_prefix_cache(tmp_path / "c", KEY, prefix.computed, dtype=dtype)
    asked = torch.tensor([8, 40, 3])
    for view in (1, 0):
        found = cache.values(asked, view)
        assert found.dtype == torch_dtype
        assert torch.equal(found, value_of(asked, view, shape).to(torch_dtype))
        if not cache.per_token:
            assert torch.equal(cache.at(cache.places(asked.numpy(), view)), found)
    size = sum(path.stat().st_size for path in (tmp_path / "c" / "shards").glob("*.activations"))
    assert size == 10 * (row_bytes(shape, dtype) - 8)


def test_of_texts_attended_tokens_are_kept(tmp_path: Path) -> None:
    prefix = Prefix((5, 4))
    cache = write_prefix_cache(tmp_path / "c", KEY, lambda view, there: prefix.computed(view, there, text=True))
    order = torch.tensor([1, 3, 0])
    mask = torch.arange(6) < LENGTHS[order, None]  # padded otherwise than when it was written
    found = cache.values(IDS[order], 1, mask)
    expected = value_of(IDS[order], 1, (6, 4)) * mask[..., None]
    assert torch.equal(found, expected)
    size = sum(path.stat().st_size for path in (tmp_path / "c" / "shards").glob("*.activations"))
    assert size == 2 * int(LENGTHS.sum()) * 4 * 4
    with pytest.raises(TransferError, match="has 6 tokens here, and 5 in the"):
        cache.values(IDS[1:2], 0, torch.ones(1, 6))


def test_written_once_and_refused_where_it_is_of_something_else(tmp_path: Path) -> None:
    prefix = Prefix((6,))
    write_prefix_cache(tmp_path / "c", KEY, prefix.computed)
    rows = prefix.rows
    write_prefix_cache(tmp_path / "c", KEY, prefix.computed)
    assert prefix.rows == rows
    for other in (CacheKey("other", "data", "transform", 2), CacheKey("weights", "data", "other", 2)):
        with pytest.raises(TransferError, match="is of another"):
            write_prefix_cache(tmp_path / "c", other, prefix.computed)
    with pytest.raises(TransferError, match="bfloat16"):
        write_prefix_cache(tmp_path / "c", KEY, prefix.computed, dtype="bfloat16")
    with pytest.raises(TransferError, match=r"float64.*one of float32, bfloat16, float16"):
        write_prefix_cache(tmp_path / "d", KEY, prefix.computed, dtype="float64")
    with pytest.raises(TransferError, match=r"The frozen layers' values reach 4.*float16 cannot hold"):
        large = ((batch, 1e6 * value) for batch, value in prefix.computed(0, np.empty(0)))
        write_prefix_cache(tmp_path / "e", KEY, lambda view, there: large, dtype="float16")


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("rows_before", [2, 5, 7])
def test_an_interrupted_one_is_not_read_and_goes_on(text: bool, rows_before: int, tmp_path: Path) -> None:
    prefix = Prefix((6, 4) if text else (6,))

    def interrupted(view: int, there: np.ndarray) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for item in prefix.computed(view, there, text):
            if prefix.rows > rows_before:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        write_prefix_cache(tmp_path / "c", KEY, interrupted)
    with pytest.raises(IncompleteCache, match=r"The prefix cache in .* is incomplete.*what is whole is kept"):
        PrefixCache.open(tmp_path / "c", KEY)
    prefix.rows = 0
    cache = write_prefix_cache(tmp_path / "c", KEY, lambda view, there: prefix.computed(view, there, text))
    assert prefix.rows == 10 - rows_before
    mask = torch.arange(5) < LENGTHS[:, None] if text else None
    for view in range(2):
        expected = value_of(IDS, view, (5, 4) if text else (6,))
        found = cache.values(IDS, view, mask)
        assert torch.equal(found, expected * mask[..., None] if mask is not None else expected)


def test_a_second_run_waits_for_the_first_and_reads_what_it_wrote(tmp_path: Path) -> None:
    """Two runs that start at once: each row is computed by one of them."""
    prefixes, caches = [Prefix((6,)), Prefix((6,))], []

    def slowly(prefix: Prefix) -> Any:
        def computed(view: int, there: np.ndarray) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
            for item in prefix.computed(view, there):
                time.sleep(0.02)
                yield item

        return computed

    threads = [
        threading.Thread(target=lambda p=p: caches.append(write_prefix_cache(tmp_path / "c", KEY, slowly(p))))
        for p in prefixes
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(prefix.rows for prefix in prefixes) == [0, 10]
    for cache in caches:
        assert torch.equal(cache.values(IDS, 1), value_of(IDS, 1, (6,)))


def test_a_pickled_one_maps_the_same_files(tmp_path: Path) -> None:
    prefix = Prefix((6, 1000))
    cache = write_prefix_cache(tmp_path / "c", KEY, prefix.computed)
    sent = pickle.dumps(cache)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent).values(IDS, 1), cache.values(IDS, 1))


def test_a_teachers_cache_is_none(tmp_path: Path) -> None:
    write_cache(
        tmp_path / "c", KEY, lambda batch: TeacherSignal(logits=torch.zeros(len(batch["example_id"]), 3)),
        Prefix((6,)).batches,
    )  # fmt: skip
    with pytest.raises(TransferError, match="is not a prefix cache but a teacher cache: choose another folder"):
        PrefixCache.open(tmp_path / "c", KEY)
