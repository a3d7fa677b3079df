"""A teacher cache on disk: arrays that processes append to, and a manifest that is written when all are whole.

manifest.json                 the key, what is kept, the shards; written last
shards/00000.json             what process 0 wrote; written after its arrays
shards/00000-<run>.logits     plain numbers, one array a file
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import TransferError
from ..hub.staging import staged

MANIFEST, SHARDS = "manifest.json", "shards"
PER_ROW = ("ids", "lengths")  # arrays with an entry a row; the others have one a prediction
_FORMAT = "hf_transfer teacher cache 1"


class IncompleteCache(TransferError):
    """A cache that an interrupted run left, or of which a file is gone."""


@dataclass(frozen=True)
class CacheKey:
    """Whose answers a cache holds, and to what. All four must be those of the run that reads it.

    Attributes:
        teacher: `Teacher.fingerprint()`.
        data: `signature.data_signature()`.
        transform: `signature.transform_signature()`.
        views: Number of augmented views of each row, >= 1: view v is what the row is in epoch v.

    Raises:
        TransferError: If there is no view.
    """

    teacher: str
    data: str
    transform: str
    views: int = 1

    def __post_init__(self) -> None:
        if self.views < 1:
            raise TransferError(f"views={self.views}: a teacher cache holds at least 1 view of each row.")

    def check(self, other: CacheKey, folder: Path) -> None:
        """Refuses a cache of another key.

        Args:
            other: The key of the cache that is there.
            folder: Where it is.

        Raises:
            TransferError: Naming what differs.
        """
        named = [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]
        if named:
            lines = "".join(f"\n  {n}: the cache's {getattr(other, n)}, now {getattr(self, n)}" for n in named)
            raise TransferError(
                f"The teacher cache in {str(folder)!r} is of another {', '.join(named)}:{lines}\nIts answers would be "
                "wrong here. Choose another folder, or delete this one."
            )


@dataclass(frozen=True)
class Shard:
    """What one process wrote.

    Attributes:
        rows: Number of rows by view, in the order of the files.
        items: Number of predictions: rows, or tokens of all rows.
        files: Name of an array -> its file in `shards/`.
    """

    rows: tuple[int, ...]
    items: int
    files: Mapping[str, str]


@dataclass(frozen=True)
class Manifest:
    """All that is known of a complete cache.

    Attributes:
        key: Whose answers to what.
        kept: What of them is kept, as `cache_records.Kept` says.
        classes: C; None where no logits are kept.
        arrays: Name of an array -> its numpy dtype, and the shape of an entry.
        shards: What each process wrote.
    """

    key: CacheKey
    kept: Mapping[str, Any]
    classes: int | None
    arrays: Mapping[str, tuple[str, tuple[int, ...]]]
    shards: tuple[Shard, ...]

    def maps(self, folder: Path) -> list[dict[str, np.ndarray]]:
        """The arrays of each shard that has rows, memory-mapped.

        Raises:
            IncompleteCache: If a file is missing or cut short.
        """
        return [
            {name: self._map(folder, shard, name) for name in self.arrays} for shard in self.shards if sum(shard.rows)
        ]

    def _map(self, folder: Path, shard: Shard, name: str) -> np.ndarray:
        dtype, entry = self.arrays[name]
        path = folder / SHARDS / shard.files[name]
        shape = (sum(shard.rows) if name in PER_ROW else shard.items, *entry)
        wanted = int(np.prod(shape)) * np.dtype(dtype).itemsize
        found = path.stat().st_size if path.is_file() else None
        if found != wanted:
            state = "is missing" if found is None else f"has {found} bytes of {wanted}"
            raise IncompleteCache(
                f"The teacher cache in {str(folder)!r} is incomplete: {path.name} {state}. Write it anew."
            )
        mapped = np.memmap(path, dtype=dtype, mode="r", shape=shape) if wanted else np.empty(shape, dtype)
        return np.asarray(mapped)  # indexing the subclass costs more than reading a batch


class ShardWriter:
    """Appends one process's arrays to files; made by `shard_writer`.

    Args:
        workspace: Where the files are until the last is whole.
        rank: Of this process.
    """

    def __init__(self, workspace: Path, rank: int) -> None:
        self._workspace, self._rank = workspace, rank
        self._run = uuid.uuid4().hex[:12]  # should two runs write here at once, no file is half of each
        self._files: dict[str, BinaryIO] = {}
        self._arrays: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._classes: int | None = None
        self._rows: list[int] = []
        self._items = 0

    def begin_view(self) -> None:
        """What is appended from now on is of the next view."""
        self._rows.append(0)

    def append(self, arrays: Mapping[str, np.ndarray], classes: int | None) -> None:
        """Adds a batch.

        Args:
            arrays: `ids` (N,), for tokens `lengths` (N,), and of the others an entry for each item.
            classes: C; None where no logits are kept.

        Raises:
            TransferError: If the arrays are not of the shape of those before.
        """
        layout = {name: (array.dtype.str, array.shape[1:]) for name, array in arrays.items()}
        if not self._arrays:
            self._arrays, self._classes = layout, classes
            self._files = {name: (self._workspace / self._name(name)).open("xb") for name in layout}
        if (layout, classes) != (self._arrays, self._classes):
            raise TransferError(
                f"The teacher's answers changed their shape between batches: first "
                f"{_said(self._arrays, self._classes)}, then {_said(layout, classes)}. A cache holds one shape."
            )
        for name, array in arrays.items():
            self._files[name].write(np.ascontiguousarray(array).data)
        self._rows[-1] += len(arrays["ids"])
        self._items += next(len(array) for name, array in arrays.items() if name not in PER_ROW)

    def finish(self) -> None:
        """Sees the arrays onto the disk, and then says what they are."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        shard = Shard(tuple(self._rows), self._items, {name: self._name(name) for name in self._files})
        part = {"shard": asdict(shard), "arrays": self._arrays, "classes": self._classes}
        _write(self._workspace / _part(self._rank), part)

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()

    def _name(self, array: str) -> str:
        return f"{self._rank:05d}-{self._run}.{array}"


@contextmanager
def shard_writer(folder: Path, rank: int) -> Iterator[ShardWriter]:
    """A writer of one process's shard, which is there once the block has ended well, and else not at all.

    Args:
        folder: The cache's, on a file system that all processes share.
        rank: Of this process.

    Raises:
        TransferError: No space is left.
    """
    with staged(folder / SHARDS) as workspace:
        writer = ShardWriter(workspace, rank)
        try:
            yield writer
            writer.finish()
        finally:
            writer.close()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a complete cache; None where nothing complete is there.

    Raises:
        TransferError: If the folder's manifest.json is something else's.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise TransferError(f"{str(path)!r} is not of a teacher cache ({_FORMAT!r}): choose another folder.")
    return Manifest(
        CacheKey(**found["key"]), found["kept"], found["classes"], _arrays(found["arrays"]),
        tuple(_shard(shard) for shard in found["shards"]),
    )  # fmt: skip


def has_leftovers(folder: Path) -> bool:
    """Whether a cache was begun here."""
    return (folder / MANIFEST).exists() or any(folder.glob(f"{SHARDS}*")) or any(folder.glob(f".{SHARDS}.*"))


def clear(folder: Path) -> None:
    """Removes what an interrupted run left, and makes the folder for a new one. Other files stay."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    for stale in [folder / SHARDS, *folder.glob(f".{SHARDS}.*")]:  # the latter are workspaces of staged()
        shutil.rmtree(stale, ignore_errors=True)
    (folder / SHARDS).mkdir(exist_ok=True)


def missing_shards(folder: Path, world_size: int) -> list[int]:
    """Ranks of the processes that wrote no shard."""
    return [rank for rank in range(world_size) if not (folder / SHARDS / _part(rank)).is_file()]


def assemble(folder: Path, key: CacheKey, kept: Mapping[str, Any], world_size: int) -> Manifest:
    """The manifest of what all processes wrote; not written yet.

    Raises:
        TransferError: If they wrote nothing, or differ in what they wrote.
    """
    parts = [json.loads((folder / SHARDS / _part(rank)).read_text()) for rank in range(world_size)]
    shards = tuple(_shard(part["shard"]) for part in parts)
    written = [part for part, shard in zip(parts, shards, strict=True) if sum(shard.rows)]
    if not written:
        raise TransferError("The teacher was asked about no row: batches(view) gave no batch on any process.")
    layouts = {_said(_arrays(part["arrays"]), part["classes"]) for part in written}
    if len(layouts) > 1:
        raise TransferError(f"Processes wrote answers of different shapes: {'; '.join(sorted(layouts))}.")
    return Manifest(key, kept, written[0]["classes"], _arrays(written[0]["arrays"]), shards)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Makes the cache complete.

    Raises:
        TransferError: No space is left.
    """
    with staged(folder) as workspace:
        _write(workspace / MANIFEST, {"format": _FORMAT, **asdict(manifest)})


def _part(rank: int) -> str:
    return f"{rank:05d}.json"


def _write(path: Path, content: Any) -> None:
    with path.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _shard(found: Mapping[str, Any]) -> Shard:
    return Shard(tuple(found["rows"]), found["items"], found["files"])


def _arrays(found: Mapping[str, Sequence[Any]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (dtype, tuple(entry)) for name, (dtype, entry) in found.items()}


def _said(arrays: Mapping[str, tuple[str, tuple[int, ...]]], classes: int | None) -> str:
    listed = [f"{name} {dtype}{list(entry)}" for name, (dtype, entry) in arrays.items()]
    return f"{', '.join(listed)} of {classes} classes"
