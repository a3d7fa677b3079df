"""Writing a cache by any number of processes at once, from where an earlier run was interrupted."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from ..data.columns import EXAMPLE_ID
from ..errors import TransferError
from .journal import Part, ShardWriter, described, read_parts, recover, shard_writer
from .key import IncompleteCache, Kind
from .manifest import MANIFEST, SHARDS, Contents, Manifest, read_manifest, write_manifest
from .reading import RowCache

logger = logging.getLogger(__name__)

LOCK = ".lock"
T = TypeVar("T")
Cache = TypeVar("Cache", bound=RowCache)
Entries = Iterable[tuple[Mapping[str, np.ndarray], Mapping[str, Any]]]
"""Arrays of some rows, `ids` among them, and the facts that are the same of all rows."""


def write(
    kind: type[Cache],
    folder: str | os.PathLike[str],
    contents: Contents,
    entries: Callable[[int, np.ndarray], Entries],
    *,
    rank: int = 0,
    world_size: int = 1,
    wait: Callable[[], None] | None = None,
) -> Cache:
    """Writes a cache; opens it instead where it is there already.

    Called by all processes at once. Each writes what it was given; the cache counts as complete only once all have
    written all. Of an interrupted writing the whole blocks are kept. A second run that is to write the same cache
    waits for the first, and reads what that wrote.

    Args:
        kind: The class of the cache.
        folder: On a file system that all processes share; made where it does not exist.
        contents: What it is to hold; the same on all processes.
        entries: (view, the example_ids (K,) ascending that are there already) -> this process's rows of that view.
            The processes together must give every other row, and may give some twice.
        rank: Of this process, in [0, world_size).
        world_size: Number of processes.
        wait: Returns once all processes have called it, e.g. `torch.distributed.barrier`; one process needs none.

    Returns:
        The complete cache.

    Raises:
        TransferError: If the folder holds a cache of something else, no space is left, or another process failed. The
            folder then holds no complete cache.
    """
    path, first = Path(folder).expanduser(), rank == 0
    if not 0 <= rank < world_size or (world_size > 1 and wait is None):
        raise TransferError(
            f"rank={rank}, world_size={world_size}, wait={wait}: rank must be in [0, world_size), and several "
            "processes need a barrier to wait at, e.g. wait=torch.distributed.barrier."
        )
    with ExitStack() as held:
        _together(lambda: _hold(kind, path, contents, held) if first else None, wait)
        found = _together(lambda: _existing(kind, path, contents), wait)  # no one changes anything from here on
        if found is not None:
            return found
        _together(lambda: _prepare(kind.kind, path, contents) if first else None, wait)
        earlier = _together(lambda: read_parts(path), wait)
        number = 1 + max((int(part.name.partition("-")[0]) for part in earlier), default=-1)
        _together(lambda: _write_part(kind.kind, path, contents, entries, earlier, f"{number:03d}-{rank:05d}"), wait)
        parts = read_parts(path)
        ended = {part.name for part in parts if part.ended}
        missing = [other for other in range(world_size) if f"{number:03d}-{other:05d}" not in ended]
        if missing:  # seen by all alike, so that none waits
            raise TransferError(
                f"The {kind.kind.name} in {str(path)!r} is incomplete: processes {missing} of {world_size} did not "
                "write all. See their errors; all processes must share the folder."
            )
        _together(lambda: _complete(kind, path, contents, parts) if first else None, wait)
        return kind.open(path, contents.key)


def example_ids(batch: Mapping[str, Tensor], kind: Kind) -> np.ndarray:
    """(N,) int64 the rows of a collated batch.

    Raises:
        TransferError: If it does not say.
    """
    if EXAMPLE_ID not in batch:
        raise TransferError(
            f"A {kind.name} is keyed by {EXAMPLE_ID!r}, and the batch has {', '.join(batch)}. Prepare the data with "
            "hf_transfer.data.transforms.prepare() and collate it with collator_for()."
        )
    return batch[EXAMPLE_ID].cpu().numpy().astype(np.int64)


def _together(work: Callable[[], T], wait: Callable[[], None] | None) -> T:
    """Works, then waits for the other processes, also after a failure: none is left waiting for one that is gone."""
    try:
        result = work()
    except Exception:
        if wait is not None:
            wait()
        raise
    if wait is not None:
        wait()
    return result


def _hold(kind: type[Cache], folder: Path, contents: Contents, held: ExitStack) -> None:
    """Takes the lock of a folder in which there is something to write."""
    from huggingface_hub.utils import WeakFileLock

    try:
        if _existing(kind, folder, contents) is not None:
            return
    except TransferError:  # which all processes will find
        return
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(WeakFileLock(folder / LOCK))


def _existing(kind: type[Cache], folder: Path, contents: Contents) -> Cache | None:
    """The cache that is there; None where there is none or a part of one."""
    if read_manifest(folder, kind.kind) is None:
        return None
    try:
        found = kind.open(folder, contents.key)
    except IncompleteCache:
        return None
    kept = found.manifest.contents.kept
    if kept != contents.kept:
        raise TransferError(
            f"The {kind.kind.name} in {str(folder)!r} keeps {dict(kept)}, and {dict(contents.kept)} is asked for. Ask "
            "for what it keeps, choose another folder, or delete this one."
        )
    return found


def _prepare(kind: Kind, folder: Path, contents: Contents) -> None:
    """Makes the folder ready to be written to. Files that are not the cache's stay."""
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    recover(folder, kind, contents)
    if parts := read_parts(folder):
        rows = sum(sum(part.shard.rows) for part in parts)
        logger.info("The %s in %s was interrupted: goes on from %d rows that are there", kind.name, folder, rows)


def _write_part(
    kind: Kind,
    folder: Path,
    contents: Contents,
    entries: Callable[[int, np.ndarray], Entries],
    earlier: Sequence[Part],
    name: str,
) -> None:
    with shard_writer(folder, kind, contents, name) as writer:
        for view in range(contents.key.views):
            _write_view(writer, view, entries(view, _rows_there(kind, folder, earlier, view)))


def _write_view(writer: ShardWriter, view: int, entries: Entries) -> None:
    for arrays, facts in entries:
        writer.append(view, arrays, facts)


def _rows_there(kind: Kind, folder: Path, parts: Sequence[Part], view: int) -> np.ndarray:
    """(K,) ascending: the rows of a view that earlier writings left."""
    found = [np.empty(0, np.int64)]
    for part in parts:
        if sum(part.shard.rows):
            start = sum(part.shard.rows[:view])
            ids = part.shard.map(folder, {"ids": part.layout["ids"]}, kind)["ids"]
            found.append(ids[start : start + part.shard.rows[view]])
    return np.unique(np.concatenate(found))


def _complete(kind: type[Cache], folder: Path, contents: Contents, parts: Sequence[Part]) -> None:
    written = [part for part in parts if sum(part.shard.rows)]
    if not written:
        raise TransferError("The cache was given no row: batches(view) gave no batch on any process.")
    layouts = {described(part.layout, part.head["facts"]) for part in written}
    if len(layouts) > 1:
        raise TransferError(f"Values of different shapes were written: {'; '.join(sorted(layouts))}.")
    shards = tuple(part.shard for part in written)
    manifest = Manifest(contents, written[0].layout, written[0].head["facts"], shards)
    kind(folder, manifest)  # reads every row's place: views that differ are refused before they count
    write_manifest(folder, kind.kind, manifest)
