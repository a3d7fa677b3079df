"""A teacher's answers on disk: the same as live ones, complete or clearly not, and of nothing else."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_rows import CLASSES, ImageTeacher, image_batches, prepared, token_batch, token_rows

from hf_transfer.distillation import cache_records
from hf_transfer.distillation.cache import CachedTeacher, CacheKey, IncompleteCache, TeacherCache, write_cache
from hf_transfer.distillation.signal import TeacherSignal, TopLogits
from hf_transfer.distillation.signature import data_signature, transform_signature
from hf_transfer.errors import TransferError
from hf_transfer.store import journal

KEY = CacheKey(source="a1", data="b2", transform="c3", views=2)
SCRIPT = Path(__file__).with_name("cache_processes.py")


class Answers:
    """A teacher that says what a table says of a row in a view; counts its batches."""

    def __init__(self, views: int = 2, rows: int = 7, classes: int = CLASSES) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = 4 * torch.randn(views, rows, classes, generator=generator)
        self.ids = torch.arange(rows) * 5 + (1 << 44)  # as identity numbers another domain's
        self.asked = 0

    def batches(self, view: int, positions: Any = None, size: int = 3) -> Any:
        positions = torch.arange(len(self.ids)) if positions is None else torch.tensor(positions)
        for part in positions.split(size):
            yield {"example_id": self.ids[part], "view": torch.full((len(part),), view)}

    def __call__(self, batch: Any) -> TeacherSignal:
        self.asked += 1
        logits = self.table[batch["view"], (batch["example_id"] - (1 << 44)) // 5]
        return TeacherSignal(logits=logits, features=logits[:, :2] * 2)


def test_dense_answers_come_back_for_any_rows_in_any_order(tmp_path: Path) -> None:
    teacher = Answers()
    cache = write_cache(
        tmp_path, KEY, teacher, lambda view: teacher.batches(view, [4, 0, 6, 2, 1, 5, 3][:: 1 - 2 * view])
    )
    for opened in (cache, TeacherCache.open(tmp_path, KEY)):
        for view in range(2):
            rows = torch.tensor([6, 0, 3, 3])
            signal = opened.signal(teacher.ids[rows], view)
            assert torch.equal(signal.logits, teacher.table[view, rows].half())
            assert signal.contents() == ["logits"]
    assert cache.example_ids.tolist() == teacher.ids.tolist()
    assert cache.classes == CLASSES


@pytest.mark.parametrize("at_once", [1 << 25, 2 * CLASSES, 1])
def test_top_k_keeps_the_mass_of_the_others_at_each_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    teacher = Answers()
    monkeypatch.setattr(cache_records, "_AT_ONCE", at_once)  # taken in slices, so that memory stays flat
    cache = write_cache(tmp_path, KEY, teacher, teacher.batches, top_k=2, temperatures=(4.0, 1.0))
    signal = cache.signal(teacher.ids, 1)
    expected = TopLogits.of(teacher.table[1], 2, (1.0, 4.0))
    assert torch.equal(signal.top.values, expected.values.half())
    assert torch.equal(signal.top.indices.long(), expected.indices)
    assert signal.top.indices.dtype == torch.int16
    for t in (1.0, 4.0):
        assert torch.equal(signal.top.tails[t], expected.tails[t])
        student = torch.randn(7, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        for got, wanted in zip(
            signal.log_probs(student, t), TeacherSignal(top=expected).log_probs(student, t), strict=True
        ):
            torch.testing.assert_close(got.double(), wanted.double(), rtol=0, atol=4e-3)  # values in half precision


def test_indices_of_many_classes_fit(tmp_path: Path) -> None:
    logits = torch.zeros(1, 40000)
    logits[0, [39999, 7]] = torch.tensor([9.0, 8.0])
    cache = write_cache(
        tmp_path, replace(KEY, views=1), lambda batch: TeacherSignal(logits=logits),
        lambda view: [{"example_id": torch.tensor([0])}], top_k=2,
    )  # fmt: skip
    assert cache.signal(torch.tensor([0]), 0).top.indices.tolist() == [[39999, 7]]


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(("written_left", "read_left"), [(False, False), (True, True), (False, True), (True, False)])
def test_tokens_are_put_back_whatever_the_padding(
    tmp_path: Path, written_left: bool, read_left: bool, top_k: int | None
) -> None:
    rows = token_rows([3, 1, 6, 2, 4])
    ids = list(rows)
    written = [token_batch(rows, part, written_left) for part in (ids[:2], ids[2:])]
    answers = {int(batch["example_id"][0]): logits for batch, logits in written}
    cache = write_cache(
        tmp_path, replace(KEY, views=1), lambda batch: TeacherSignal(logits=answers[int(batch["example_id"][0])]),
        lambda view: [batch for batch, _ in written], top_k=top_k,
    )  # fmt: skip
    batch, expected = token_batch(rows, [ids[4], ids[1], ids[2]], read_left)  # other rows together, another length
    signal = cache.signal(batch["example_id"], 0, batch["attention_mask"])
    attended = batch["attention_mask"].bool()
    assert signal.logits_shape == expected.shape
    if top_k is None:
        assert torch.equal(signal.logits[attended], expected[attended].half())
        assert not signal.logits[~attended].any()
        return
    wanted = TopLogits.of(expected[attended], top_k)
    assert torch.equal(signal.top.values[attended], wanted.values.half())
    assert torch.equal(signal.top.indices[attended].long(), wanted.indices)
    assert torch.equal(signal.top.tails[1.0][attended], wanted.tails[1.0])
    assert all(x.isfinite().all() for x in signal.log_probs(torch.zeros(expected.shape)))  # at padding too


def test_padding_is_not_stored(tmp_path: Path) -> None:
    rows = token_rows([1, 50])
    batch, logits = token_batch(rows, list(rows), left=False)
    write_cache(
        tmp_path, replace(KEY, views=1), lambda _: TeacherSignal(logits=logits), lambda view: [batch],
    )  # fmt: skip
    assert next(tmp_path.glob("shards/*.logits")).stat().st_size == 51 * CLASSES * 2


def test_features_are_kept_where_asked(tmp_path: Path) -> None:
    teacher = Answers()
    cache = write_cache(tmp_path / "both", KEY, teacher, teacher.batches, features=True, dtype=torch.float32)
    signal = cache.signal(teacher.ids, 1)
    assert torch.equal(signal.features, 2 * teacher.table[1, :, :2])
    assert torch.equal(signal.logits, teacher.table[1])
    alone = write_cache(
        tmp_path / "alone", KEY, lambda batch: TeacherSignal(features=teacher(batch).features), teacher.batches,
        features=True,
    )  # fmt: skip
    assert alone.signal(teacher.ids, 0).contents() == ["features"]
    rows = token_rows([2, 3])
    batch, logits = token_batch(rows, list(rows), left=True)
    tokens = write_cache(
        tmp_path / "tokens", replace(KEY, views=1), lambda _: TeacherSignal(logits=logits, features=logits[..., :2]),
        lambda view: [batch], features=True,
    )  # fmt: skip
    signal, mask = tokens.signal(batch["example_id"], 0, batch["attention_mask"]), batch["attention_mask"].bool()
    assert torch.equal(signal.features[mask], logits[..., :2][mask].half())


def test_each_view_is_what_the_live_teacher_says_of_the_same_augmented_row(tmp_path: Path) -> None:
    rows, live = prepared(), ImageTeacher()
    key = CacheKey("t", data_signature(rows), transform_signature(rows), views=3)
    write_cache(tmp_path, key, live, lambda view: image_batches(rows, view))
    again = prepared()  # as a later run makes the data
    key = CacheKey("t", data_signature(again), transform_signature(again), views=3)
    teacher = CachedTeacher(TeacherCache.open(tmp_path, key))
    seen = []
    for epoch in range(4):
        teacher.view = epoch % teacher.views
        for batch in image_batches(again, teacher.view, positions=[5, 2, 7, 0], size=4):
            expected = live(batch).logits
            torch.testing.assert_close(teacher(batch).logits.float(), expected, rtol=1e-3, atol=1e-2)
            seen.append(expected)
    assert torch.equal(seen[3], seen[0])
    assert (seen[1] - seen[0]).abs().amin(dim=1).max() > 0.1  # views differ by far more than half precision


# ---- many processes -------------------------------------------------------------------------------------------------


def together(processes: int, work: Any) -> list[Any]:
    """Runs work(rank, wait) in threads that wait for each other, as processes do; results or errors by rank."""
    barrier, results = threading.Barrier(processes, timeout=20), [None] * processes

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank, barrier.wait)
        except TransferError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(
    "shares", [([0, 2, 4, 6], [1, 3, 5, 0]), ([6, 5, 4, 3, 2, 1, 0], []), ([3], [0, 1, 2, 4, 5, 6])]
)
def test_processes_write_a_shard_each_and_may_pad(tmp_path: Path, shares: Any) -> None:
    teacher = Answers()
    caches = together(
        2,
        lambda rank, wait: write_cache(
            tmp_path, KEY, teacher, lambda view: teacher.batches(view, shares[rank]) if shares[rank] else [],
            rank=rank, world_size=2, wait=wait,
        ),
    )  # fmt: skip
    for cache in caches:
        for view in range(2):
            rows = torch.tensor([5, 6, 0, 1, 3])
            assert torch.equal(cache.signal(teacher.ids[rows], view).logits, teacher.table[view, rows].half())
        assert len(cache.example_ids) == 7


def test_tokens_are_read_from_several_shards(tmp_path: Path) -> None:
    rows = token_rows([3, 1, 6, 2])
    ids = list(rows)

    def write(rank: int, wait: Any) -> TeacherCache:
        batch, logits = token_batch(rows, ids[rank::2], left=False)
        return write_cache(
            tmp_path, replace(KEY, views=1), lambda _: TeacherSignal(logits=logits), lambda view: [batch],
            rank=rank, world_size=2, wait=wait,
        )  # fmt: skip

    cache = together(2, write)[0]
    batch, expected = token_batch(rows, [ids[2], ids[1], ids[0], ids[3]], left=True)
    mask = batch["attention_mask"].bool()
    assert torch.equal(cache.signal(batch["example_id"], 0, mask).logits[mask], expected[mask].half())


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_stops_all_and_nothing_counts(tmp_path: Path, failing: int) -> None:
    teacher = Answers()

    def write(rank: int, wait: Any, fails: bool) -> TeacherCache:
        def answer(batch: Any) -> TeacherSignal:
            if fails and rank == failing and int(batch["view"][0]) == 1:
                raise TransferError("the teacher fell over")
            return teacher(batch)

        return write_cache(
            tmp_path, KEY, answer, lambda view: teacher.batches(view, list(range(rank, 7, 2))), rank=rank,
            world_size=2, wait=wait,
        )  # fmt: skip

    errors = together(2, lambda rank, wait: write(rank, wait, True))
    assert str(errors[failing]) == "the teacher fell over"
    assert f"processes [{failing}] of 2 did not write all" in str(errors[1 - failing])
    with pytest.raises(IncompleteCache, match="interrupted"):
        TeacherCache.open(tmp_path, KEY)
    caches = together(2, lambda rank, wait: write(rank, wait, False))
    assert torch.equal(caches[1].signal(teacher.ids, 1).logits, teacher.table[1].half())


@pytest.mark.slow
def test_two_real_processes(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path = os.pathsep.join([str(SCRIPT.parents[2]), str(SCRIPT.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [*torchrun, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert reports[1]["failed"] == "no answer from process 1"
    assert "processes [1] of 2 did not write all" in reports[0]["failed"]
    for report in reports:
        assert report["state after"] == "IncompleteCache"
        assert report["largest difference"] < 2e-2
        assert report["asked again"] == 0
        assert report["rows"] == 9
        assert "another teacher" in report["other teacher"]


# ---- complete, or clearly not ---------------------------------------------------------------------------------------


def die_in_view_1(folder: Path) -> None:
    teacher = Answers()

    def answer(batch: Any) -> TeacherSignal:
        if int(batch["view"][0]) == 1:
            os._exit(9)  # as a kill: nothing is cleaned up
        return teacher(batch)

    write_cache(folder, KEY, answer, teacher.batches)


def test_after_a_crash_the_cache_is_incomplete_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies in the middle of a block; the blocks before it are not computed again."""
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(journal, "BLOCK_SECONDS", -1.0)  # a block a batch
    child = multiprocessing.get_context("fork").Process(target=die_in_view_1, args=(tmp_path,))
    child.start()
    child.join(30)
    assert child.exitcode == 9
    with pytest.raises(IncompleteCache, match="is incomplete: the run that wrote it was interrupted"):
        TeacherCache.open(tmp_path, KEY)
    ids = next(tmp_path.glob("shards/*.ids"))
    with ids.open("ab") as file:
        file.write(b"half an id")  # as of a block that was being written
    teacher = Answers()
    cache = write_cache(tmp_path, KEY, teacher, teacher.batches)
    assert teacher.asked == 4  # of 6: the first two batches of view 0 were whole, the third had no successor
    for view in range(2):
        assert torch.equal(cache.signal(teacher.ids, view).logits, teacher.table[view].half())
    assert {path.name for path in tmp_path.iterdir()} - {".lock"} == {"manifest.json", "notes.txt", "shards"}


@pytest.mark.parametrize(("damage", "asked"), [("cut", 3), ("gone", 6), ("manifest", 0)])
def test_a_damaged_cache_is_incomplete_and_is_mended(tmp_path: Path, damage: str, asked: int) -> None:
    teacher = Answers()
    write_cache(tmp_path, KEY, teacher, teacher.batches)
    path = next(tmp_path.glob("shards/*.logits"))
    if damage == "cut":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "gone":
        path.unlink()
    else:
        (tmp_path / "manifest.json").write_text('{"format": "hf_tr')
    with pytest.raises(IncompleteCache, match="is incomplete"):
        TeacherCache.open(tmp_path, KEY)
    teacher.asked = 0
    cache = write_cache(tmp_path, KEY, teacher, teacher.batches)
    assert teacher.asked == asked  # a block a view: only the damaged one is written again
    assert torch.equal(cache.signal(teacher.ids, 0).logits, teacher.table[0].half())


def test_a_block_whose_bytes_changed_is_written_again(tmp_path: Path) -> None:
    teacher = Answers()
    write_cache(tmp_path, KEY, teacher, teacher.batches)
    path = next(tmp_path.glob("shards/*.logits"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    (tmp_path / "manifest.json").unlink()  # as if the run had died before the last step
    teacher.asked = 0
    cache = write_cache(tmp_path, KEY, teacher, teacher.batches)
    assert teacher.asked == 3
    assert torch.equal(cache.signal(teacher.ids, 1).logits, teacher.table[1].half())


def test_one_of_an_older_version_is_written_anew(tmp_path: Path) -> None:
    teacher = Answers()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "00000-ab.logits").write_bytes(b"1234")
    (tmp_path / "manifest.json").write_text('{"format": "hf_transfer teacher cache 1", "key": {"teacher": "a1"}}')
    with pytest.raises(IncompleteCache, match="of an older version"):
        TeacherCache.open(tmp_path, KEY)
    cache = write_cache(tmp_path, KEY, teacher, teacher.batches)
    assert torch.equal(cache.signal(teacher.ids, 0).logits, teacher.table[0].half())
    assert not (tmp_path / "shards" / "00000-ab.logits").exists()


@pytest.mark.parametrize("fsync", range(4))  # of the journal, of ids, of logits, of the journal
def test_a_full_disk_is_one_sentence_and_nothing_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: int
) -> None:
    teacher, calls = Answers(), iter(range(100))
    with monkeypatch.context() as patched:
        real = os.fsync

        def full(descriptor: int) -> None:
            if next(calls) == fsync:
                raise OSError(28, "No space left on device")
            real(descriptor)

        patched.setattr(journal.os, "fsync", full)
        with pytest.raises(TransferError, match=r"No space is left on the disk of '.*'\. "):
            write_cache(tmp_path, KEY, teacher, teacher.batches)
    with pytest.raises(IncompleteCache):
        TeacherCache.open(tmp_path, KEY)
    cache = write_cache(tmp_path, KEY, teacher, teacher.batches)
    assert torch.equal(cache.signal(teacher.ids, 0).logits, teacher.table[0].half())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device of Linux that is always full")
def test_the_kernels_own_full_disk_while_batches_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, teacher = Path.open, Answers(rows=4000)

    def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return open("/dev/full", "wb") if path.suffix == ".logits" else real(path, mode, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", opened)
        with pytest.raises(TransferError, match="No space is left on the disk"):
            write_cache(tmp_path, KEY, teacher, lambda view: teacher.batches(view, size=500))
    assert 0 < teacher.asked < 16  # told at once, not after the last batch


# ---- of this key and no other ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["teacher", "data", "transform", "views"])
def test_a_cache_of_another_key_is_refused(tmp_path: Path, name: str) -> None:
    teacher = Answers(views=3)
    write_cache(tmp_path, KEY, teacher, teacher.batches)
    other = replace(KEY, **{"source" if name == "teacher" else name: 3 if name == "views" else "f00"})
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for use in (
        lambda: TeacherCache.open(tmp_path, other),
        lambda: write_cache(tmp_path, other, teacher, teacher.batches),
    ):
        with pytest.raises(TransferError, match=rf"is of another {name}:\n  {name}: the cache's \w+, now (f00|3)\n"):
            use()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_complete_cache_is_used_again(tmp_path: Path) -> None:
    teacher = Answers()
    write_cache(tmp_path, KEY, teacher, teacher.batches)
    asked = teacher.asked
    cache = write_cache(str(tmp_path), KEY, teacher, teacher.batches)
    assert teacher.asked == asked == 6
    assert torch.equal(cache.signal(teacher.ids, 1).logits, teacher.table[1].half())
    with pytest.raises(TransferError, match=r"keeps \{'top_k': None.*and \{'top_k': 2.*is asked for"):
        write_cache(tmp_path, KEY, teacher, teacher.batches, top_k=2)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    teacher = Answers()
    with pytest.raises(TransferError, match="There is no teacher cache in"):
        TeacherCache.open(tmp_path / "none", KEY)
    (tmp_path / "manifest.json").write_text('{"name": "web app"}')
    for use in (
        lambda: TeacherCache.open(tmp_path, KEY),
        lambda: write_cache(tmp_path, KEY, teacher, teacher.batches),
    ):
        with pytest.raises(TransferError, match="is not of a teacher cache"):
            use()
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"name": "web app"}


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_rows_views_and_tokens_that_are_not_there_are_named(tmp_path: Path) -> None:
    teacher = Answers()
    cache = write_cache(tmp_path / "rows", KEY, teacher, teacher.batches)
    for missing in (teacher.ids[0] + 1, teacher.ids[-1] + 1, torch.tensor(5)):
        with pytest.raises(TransferError, match=rf"holds 7 rows, and .*example_id {missing}\) is not among them"):
            cache.signal(torch.stack([teacher.ids[0], missing]), 0)
    for view in (-1, 2):
        with pytest.raises(TransferError, match=rf"view={view}: the teacher cache holds views 0 to 1"):
            cache.signal(teacher.ids, view)
    rows = token_rows([2, 3])
    batch, logits = token_batch(rows, list(rows), left=False)
    tokens = write_cache(
        tmp_path / "tokens", replace(KEY, views=1), lambda _: TeacherSignal(logits=logits), lambda view: [batch]
    )
    for mask, number in ((torch.ones(2, 3), 3), (None, 3), (torch.ones(2, 5), 5)):
        with pytest.raises(TransferError, match=rf"train row 1 \(example_id 1\) has {number} tokens here, and 2"):
            tokens.signal(batch["example_id"], 0, mask)


def signal_of(**changes: Any) -> Any:
    return lambda batch: replace(TeacherSignal(logits=torch.zeros(len(batch["example_id"]), 3)), **changes)


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        (signal_of(logits=torch.full((3, 2), 7e4)), {}, r"logits reach 7e\+04, which float16 cannot hold"),
        (signal_of(logits=torch.full((3, 2), torch.nan)), {"dtype": torch.float32}, "logits reach nan, which float32"),
        (signal_of(features=torch.full((3, 2), -1e9)), {"features": True}, r"features reach 1e\+09"),
        (signal_of(), {"features": True}, r"gives \['logits'\] where features are to be kept"),
        (signal_of(logits=None), {}, "gives nothing where logits are to be kept"),
        (signal_of(logits=torch.zeros(5, 2)), {}, "answered for 5 rows of a batch of 3"),
        (lambda batch: TeacherSignal(torch.zeros(3, 2 + int(batch["example_id"][0]))), {}, "changed their shape"),
        (signal_of(features=torch.zeros(3, 4, 2)), {"features": True}, r"shapes \[\(3, 3\), \(3, 4, 2\)\]"),
        (signal_of(), {"top_k": 3}, r"k must be in \[1, 2\] for 3 classes, got 3"),
        (signal_of(), {"top_k": 0}, "top_k=0"),
        (signal_of(), {"top_k": 1, "temperatures": ()}, r"temperatures=\(\)"),
        (signal_of(), {"top_k": 1, "temperatures": (0.0,)}, r"temperatures=\(0.0,\)"),
        (signal_of(), {"dtype": torch.bfloat16}, "dtype=torch.bfloat16: a teacher cache keeps torch.float16 or"),
        (signal_of(), {"world_size": 2}, "several processes need a barrier"),
        (signal_of(), {"rank": 1}, "rank=1, world_size=1"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_kept_are_refused(tmp_path: Path, teacher: Any, options: Any, message: str) -> None:
    batches = [{"example_id": torch.arange(3) + 3 * i} for i in range(2)]
    with pytest.raises(TransferError, match=message):
        write_cache(tmp_path, replace(KEY, views=1), teacher, lambda view: batches, **options)
    with pytest.raises(TransferError):
        TeacherCache.open(tmp_path, replace(KEY, views=1))


def test_every_view_must_have_every_row(tmp_path: Path) -> None:
    teacher = Answers()
    with pytest.raises(TransferError, match=r"View 1 has 5 rows and view 0 7: .*is in one of them only"):
        write_cache(tmp_path, KEY, teacher, lambda view: teacher.batches(view, list(range(2 * view, 7))))
    with pytest.raises(IncompleteCache):
        TeacherCache.open(tmp_path, KEY)
    with pytest.raises(TransferError, match="was given no row"):
        write_cache(tmp_path / "empty", KEY, teacher, lambda view: [])
    with pytest.raises(TransferError, match=r"keyed by 'example_id', and the batch has view"):
        write_cache(tmp_path, KEY, teacher, lambda view: [{"view": torch.zeros(2)}])
    with pytest.raises(TransferError, match="views=0"):
        replace(KEY, views=0)


# ---- as a teacher ---------------------------------------------------------------------------------------------------


def test_a_cached_teacher_answers_as_a_teacher_does(tmp_path: Path) -> None:
    teacher = Answers()
    cache = write_cache(tmp_path / "logits", KEY, teacher, teacher.batches)
    cached = CachedTeacher(cache, list("abcde"))
    batch = {"example_id": teacher.ids[:2]}
    assert torch.equal(cached(batch).logits, teacher.table[0, :2].half())
    cached.view = 1
    assert torch.equal(cached(batch).logits, teacher.table[1, :2].half())
    assert (cached.labels, cached.fingerprint(), cached.views) == (list("abcde"), "a1", 2)
    assert cached.to("cpu") is cached
    cached.watch()
    with pytest.raises(
        TransferError, match=r"compares layers block.1 of the teacher, and a teacher cache keeps logits only"
    ):
        cached.watch(["block.1"])
    with pytest.raises(TransferError, match="keeps none: write it with features=True"):
        cached.watch(features=True)
    CachedTeacher(write_cache(tmp_path / "f", KEY, teacher, teacher.batches, features=True)).watch(features=True)
    with pytest.raises(TransferError, match="2 labels were given for a teacher cache of 5 classes"):
        CachedTeacher(cache, ["a", "b"])
    with pytest.raises(TransferError, match="keyed by 'example_id'"):
        cached({"pixel_values": torch.zeros(1)})


@pytest.mark.slow
def test_reading_a_batch_is_cheap(tmp_path: Path) -> None:
    teacher = Answers(rows=50_000, classes=10)
    cache = write_cache(tmp_path, KEY, teacher, lambda view: teacher.batches(view, size=5000))
    generator, times = np.random.default_rng(0), []
    for _ in range(200):
        ids = teacher.ids[generator.integers(0, 50_000, 64)]
        started = time.perf_counter()
        cache.signal(ids, 1)
        times.append(time.perf_counter() - started)
    assert statistics.median(times) < 200e-6
