"""One process's part of a cache while it is written: arrays that grow, and a journal of the blocks that are whole.

A journal is lines of JSON: what the files are to hold, then for each block its view, size and checksums, written once
the block is on the disk, and at last that this was all. After a crash the blocks of the journal are kept, and what
lies behind them is cut off.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import TransferError
from ..hub.staging import is_full
from .key import Kind
from .manifest import PER_ROW, SHARDS, Contents, Layout, Shard, read_contents, read_layout

BLOCK_SECONDS = 10.0  # of work that a crash may lose
_END = {"end": True}


@dataclass(frozen=True)
class Part:
    """A journal that was read.

    Attributes:
        name: Of its files, without what follows the dot.
        head: Its first line.
        blocks: The whole blocks.
        ended: Whether its process wrote all that it had to.
    """

    name: str
    head: Mapping[str, Any]
    blocks: tuple[Mapping[str, Any], ...]
    ended: bool

    @property
    def contents(self) -> Contents:
        """What it is a part of."""
        return read_contents(self.head)

    @property
    def layout(self) -> Layout:
        """Its arrays; empty where it has no rows."""
        return read_layout(self.head["layout"])

    @property
    def shard(self) -> Shard:
        """Its rows."""
        views = self.contents.key.views
        rows = tuple(sum(block["rows"] for block in self.blocks if block["view"] == view) for view in range(views))
        files = {name: f"{self.name}.{name}" for name in self.head["layout"]}
        return Shard(rows, sum(block["items"] for block in self.blocks), files)


class ShardWriter:
    """Appends arrays to files, block by block; made by `shard_writer`.

    Args:
        folder: The cache's.
        kind: Of the cache.
        contents: What it is to hold.
        name: Of the files, without what follows the dot.
    """

    def __init__(self, folder: Path, kind: Kind, contents: Contents, name: str) -> None:
        self._base = folder / SHARDS / name
        self._head = {"format": kind.format, **asdict(contents)}
        self._what = kind
        self._files: dict[str, BinaryIO] = {}
        self._layout: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._facts: dict[str, Any] = {}
        self._block: dict[str, Any] | None = None
        self._began = 0.0

    def append(self, view: int, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Adds some rows.

        Args:
            view: Of which they are; views come one after the other.
            arrays: `ids` (N,), for tokens `lengths` (N,), and of the others an entry for each item.
            facts: What is the same of all rows.

        Raises:
            TransferError: If the arrays are not of the shape of those before.
        """
        layout = {name: (array.dtype.str, array.shape[1:]) for name, array in arrays.items()}
        if not self._files:
            self._begin(layout, dict(facts))
        if (layout, dict(facts)) != (self._layout, self._facts):
            raise TransferError(
                f"The values for a {self._what.name} changed their shape between batches: first "
                f"{described(self._layout, self._facts)}, then {described(layout, facts)}. It holds one shape."
            )
        block = self._block
        if block is not None and (block["view"] != view or time.monotonic() - self._began > BLOCK_SECONDS):
            self.end_block()
        if self._block is None:
            self._block = {"view": view, "rows": 0, "items": 0, "crc32": dict.fromkeys(layout, 0)}
            self._began = time.monotonic()
        for name, array in arrays.items():
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            self._files[name].write(content)
            self._block["crc32"][name] = zlib.crc32(content, self._block["crc32"][name])
        self._block["rows"] += len(arrays["ids"])
        self._block["items"] += next(len(array) for name, array in arrays.items() if name not in PER_ROW)

    def finish(self) -> None:
        """Sees everything onto the disk, and says that this was all."""
        if not self._files:
            self._begin({}, {})
        self.end_block()
        self._say(_END)

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()

    def _begin(self, layout: dict[str, tuple[str, tuple[int, ...]]], facts: dict[str, Any]) -> None:
        self._layout, self._facts = layout, facts
        self._files = {name: self._path(name).open("xb") for name in (*layout, "journal")}
        self._say({**self._head, "layout": layout, "facts": facts})

    def end_block(self) -> None:
        """Sees what was appended onto the disk, and says so."""
        if self._block is None:
            return
        for name in self._layout:
            self._files[name].flush()
            os.fsync(self._files[name].fileno())
        self._say(self._block)
        self._block = None

    def _say(self, line: Any) -> None:
        journal = self._files["journal"]
        journal.write(json.dumps(line).encode() + b"\n")
        journal.flush()
        os.fsync(journal.fileno())

    def _path(self, array: str) -> Path:
        return self._base.with_name(f"{self._base.name}.{array}")


@contextmanager
def shard_writer(folder: Path, kind: Kind, contents: Contents, name: str) -> Iterator[ShardWriter]:
    """A writer of one process's part, which is ended once the block has ended well; else its whole blocks stay.

    Args:
        folder: The cache's, on a file system that all processes share.
        kind: Of the cache.
        contents: What it is to hold.
        name: Of the files, without what follows the dot.

    Raises:
        TransferError: No space is left.
    """
    writer = ShardWriter(folder, kind, contents, name)
    with _full_disk_told(folder), closing(writer):
        try:
            yield writer
        except BaseException:
            with suppress(OSError):  # the first error is the one to tell
                writer.end_block()  # what was computed is kept
            raise
        writer.finish()


@contextmanager
def _full_disk_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise TransferError(
            f"No space is left on the disk of {str(folder)!r}. The cache there is incomplete; what is whole of it is "
            "kept. Free some space and start again, or choose another folder."
        ) from error


def read_parts(folder: Path) -> list[Part]:
    """All journals of a cache, whoever wrote them."""
    found = [_read(path) for path in sorted((folder / SHARDS).glob("*.journal"))]
    return [part for part in found if part is not None]


def recover(folder: Path, kind: Kind, contents: Contents) -> None:
    """Keeps the whole blocks of a cache that was not written to the end, and removes the rest of its files.

    Args:
        folder: The cache's; nobody else writes there.
        kind: Of the cache.
        contents: What it is to hold; parts of anything else are removed.
    """
    kept: set[str] = set()
    for part in read_parts(folder):
        same = part.head["format"] == kind.format and (part.contents.key, part.contents.kept) == (
            contents.key,
            contents.kept,
        )
        if same and (blocks := _whole_blocks(folder, part)):
            _cut(folder, part, blocks)
            kept |= {*part.shard.files.values(), f"{part.name}.journal"}
    for path in (folder / SHARDS).iterdir():
        if path.name not in kept:
            path.unlink()


def described(layout: Layout, facts: Mapping[str, Any]) -> str:
    """A layout for messages."""
    listed = [f"{name} {dtype}{list(entry)}" for name, (dtype, entry) in layout.items()]
    return ", ".join([*listed, *(f"{value} {name}" for name, value in facts.items())])


def _read(path: Path) -> Part | None:
    lines = []
    for line in path.read_bytes().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # the last one, half written
            break
    if not lines or "layout" not in lines[0]:
        return None
    return Part(path.stem, lines[0], tuple(line for line in lines[1:] if line != _END), lines[-1] == _END)


def _sizes(part: Part, block: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of each array in a block."""
    return {
        name: block["rows" if name in PER_ROW else "items"] * int(np.prod(entry)) * np.dtype(dtype).itemsize
        for name, (dtype, entry) in part.layout.items()
    }


def _whole_blocks(folder: Path, part: Part) -> list[Mapping[str, Any]]:
    """The blocks up to the first that is not as its journal says."""
    whole: list[Mapping[str, Any]] = []
    paths = {name: folder / SHARDS / file for name, file in part.shard.files.items()}
    if not all(path.is_file() for path in paths.values()):
        return whole
    files = {name: path.open("rb") for name, path in paths.items()}
    try:
        for block in part.blocks:
            read = {name: files[name].read(size) for name, size in _sizes(part, block).items()}
            if any(zlib.crc32(content) != block["crc32"][name] for name, content in read.items()):
                break
            whole.append(block)
    finally:
        for file in files.values():
            file.close()
    return whole


def _cut(folder: Path, part: Part, blocks: list[Mapping[str, Any]]) -> None:
    """Cuts off what lies behind some blocks."""
    sizes = [_sizes(part, block) for block in blocks]
    for name, file in part.shard.files.items():
        os.truncate(folder / SHARDS / file, sum(size[name] for size in sizes))
    lines = "".join(json.dumps(line) + "\n" for line in [part.head, *blocks, _END])
    (folder / SHARDS / f"{part.name}.journal").write_text(lines)
