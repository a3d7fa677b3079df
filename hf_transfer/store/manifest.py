"""What a complete cache says of itself.

manifest.json               the key, what is kept, the shards; written last
shards/000-00000.features   plain numbers, one array a file; by writing and process
shards/000-00000.journal    which blocks of these files are whole (journal.py)
.lock                       held by the run that writes
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TransferError
from ..hub.staging import staged
from .key import CacheKey, IncompleteCache, Kind

MANIFEST, SHARDS = "manifest.json", "shards"
PER_ROW = ("ids", "lengths")  # arrays with an entry a row; the others have one an item
Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name of an array -> its numpy dtype, and the shape of an entry."""


@dataclass(frozen=True)
class Shard:
    """What one process wrote at one time.

    Attributes:
        rows: Number of rows by view, in the order of the files.
        items: Number of entries of what is not one a row: rows, or tokens of all rows.
        files: Name of an array -> its file in `shards/`.
    """

    rows: tuple[int, ...]
    items: int
    files: Mapping[str, str]

    def map(self, folder: Path, layout: Layout, kind: Kind) -> dict[str, np.ndarray]:
        """The arrays, memory-mapped.

        Raises:
            IncompleteCache: If a file is missing or cut short.
        """
        return {name: self._map(folder, name, *layout[name], kind) for name in layout}

    def _map(self, folder: Path, name: str, dtype: str, entry: tuple[int, ...], kind: Kind) -> np.ndarray:
        path = folder / SHARDS / self.files[name]
        shape = (sum(self.rows) if name in PER_ROW else self.items, *entry)
        wanted = int(np.prod(shape)) * np.dtype(dtype).itemsize
        found = path.stat().st_size if path.is_file() else None
        if found != wanted:
            state = "is missing" if found is None else f"has {found} bytes of {wanted}"
            raise IncompleteCache(
                f"The {kind.name} in {str(folder)!r} is incomplete: {path.name} {state}. Write it again; what is "
                "whole is kept."
            )
        mapped = np.memmap(path, dtype=dtype, mode="r", shape=shape) if wanted else np.empty(shape, dtype)
        return np.asarray(mapped)  # indexing the subclass costs more than reading a batch


@dataclass(frozen=True)
class Contents:
    """What a cache holds, whoever wrote which part of it.

    Attributes:
        key: The values of what.
        kept: What of them is kept, in the words of the kind of cache.
        about: For people: of which network and rows.
    """

    key: CacheKey
    kept: Mapping[str, Any]
    about: str = ""


@dataclass(frozen=True)
class Manifest:
    """All that is known of a complete cache.

    Attributes:
        contents: What it holds.
        layout: Its arrays.
        facts: What is the same of all rows and known only once they are computed, such as the number of classes.
        shards: Where the rows are.
    """

    contents: Contents
    layout: Layout
    facts: Mapping[str, Any]
    shards: tuple[Shard, ...]


def read_manifest(folder: Path, kind: Kind) -> Manifest | None:
    """The manifest of a complete cache; None where nothing complete is there, or one of an older version.

    Raises:
        TransferError: If the folder's manifest.json is something else's.
    """
    found = read_json(folder / MANIFEST)
    if found is None:
        return None
    version = found.get("format") if isinstance(found, dict) else None
    if not str(version).startswith("hf_transfer "):
        raise TransferError(f"{str(folder / MANIFEST)!r} is not of a {kind.name}: choose another folder.")
    if str(version).rpartition(" ")[2] != kind.format.rpartition(" ")[2]:
        return None
    if version != kind.format:
        raise TransferError(
            f"The cache in {str(folder)!r} is not a {kind.name} but a {str(version).split(' ', 1)[1][:-2]}: choose "
            "another folder."
        )
    shards = tuple(Shard(tuple(shard["rows"]), shard["items"], shard["files"]) for shard in found["shards"])
    return Manifest(read_contents(found), read_layout(found["layout"]), found["facts"], shards)


def write_manifest(folder: Path, kind: Kind, manifest: Manifest) -> None:
    """Makes a cache complete.

    Raises:
        TransferError: No space is left.
    """
    with staged(folder) as workspace, (workspace / MANIFEST).open("w") as file:
        rest = {name: value for name, value in asdict(manifest).items() if name != "contents"}
        json.dump({"format": kind.format, **asdict(manifest.contents), **rest}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """What a file says; None where there is none, or half of one."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def read_contents(found: Mapping[str, Any]) -> Contents:
    """Contents as they were written."""
    return Contents(CacheKey(**found["key"]), found["kept"], found["about"])


def read_layout(found: Mapping[str, Sequence[Any]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A layout as it was written."""
    return {name: (dtype, tuple(entry)) for name, (dtype, entry) in found.items()}
