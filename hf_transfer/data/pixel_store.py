"""Images decoded once, as 8-bit pixels in one memory-mapped file, found by example_id.

<folder>/manifest.json      which rows, and what was done to them
<folder>/pixels.u8          the images one after another, each (H, W, C)
<folder>/images.npy         (R, 3) int64 by image: example_id, height, width; written last
<folder>.lock               held by the one process that writes
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TransferError
from ..hub.staging import staged
from .resampling import Arrays

MANIFEST, PIXELS, IMAGES = FILES = "manifest.json", "pixels.u8", "images.npy"
_GATHERED = 1 << 14  # bytes of an image, up to which copying a batch at once is faster than N views of the file
_FORMAT = "hf_transfer images 1"

Images = Iterable[tuple[int, np.ndarray]]
"""example_id and (H, W, C) uint8, once for each row."""


@dataclass(frozen=True)
class StoreKey:
    """Of which rows a store is.

    Attributes:
        rows: `RowDigests.together()`.
        done: What was done to the images, `Still.facts()` as JSON.
        channels: 1 or 3.
    """

    rows: str
    done: str
    channels: int

    def check(self, other: StoreKey, folder: Path) -> None:
        """Refuses a store of another key.

        Raises:
            TransferError: Naming what differs.
        """
        named = [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]
        if named:
            lines = "".join(f"\n  {n}: the store's {getattr(other, n)}, now {getattr(self, n)}" for n in named)
            raise TransferError(
                f"The image store in {str(folder)!r} is of other {', '.join(named)}:{lines}\nIts images would be "
                "wrong here. Choose another folder, or delete this one."
            )


class StoreTooLarge(TransferError):
    """The images take more than was allowed; nothing was kept."""


class PixelStore:
    """A complete store, memory-mapped. Made by `open` and `write_store`.

    Args:
        folder: Where it is.
        key: Of which rows.

    Attributes:
        bytes: Of the pixels.
    """

    def __init__(self, folder: Path, key: StoreKey) -> None:
        self.folder, self.key = folder, key
        images = np.load(folder / IMAGES)  # (R, 3)
        order = np.argsort(images[:, 0], kind="stable")
        self._sizes = images[:, 1:]
        lengths = images[:, 1] * images[:, 2] * key.channels
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._ids, self._order = images[order, 0], order
        self.bytes = int(self._starts[-1])
        # Copy-on-write: torch warns of memory that is read-only. Nothing is written.
        self._pixels = np.asarray(np.memmap(folder / PIXELS, np.uint8, mode="c", shape=(self.bytes,)))
        same = bool((self._sizes == self._sizes[0]).all())
        shape = (*self._sizes[0].tolist(), key.channels)
        is_small = same and math.prod(shape) <= _GATHERED
        self._stack = self._pixels.reshape(-1, *shape) if is_small else None  # (R, H, W, C)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], key: StoreKey) -> PixelStore:
        """Opens a store.

        Args:
            folder: Where it is.
            key: Of which rows it has to be.

        Raises:
            TransferError: If there is none that is complete, or it is of other rows.
        """
        path = Path(folder)
        found = _complete(path)
        if found is None:
            raise TransferError(f"There is no complete image store in {str(path)!r}. Write it anew.")
        key.check(found, path)
        with suppress(OSError):  # where it may only be read
            os.utime(path / MANIFEST)  # when it was last used
        return cls(path, key)

    def __len__(self) -> int:
        return len(self._ids)

    def places(self, example_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """(N,) int64, where the images of these rows are.

        Raises:
            TransferError: If one of them is not in the store.
        """
        wanted = np.asarray(example_ids, dtype=np.int64)
        found = np.searchsorted(self._ids, wanted).clip(max=len(self._ids) - 1)
        missing = wanted[self._ids[found] != wanted]
        if len(missing):
            raise TransferError(f"The image store in {str(self.folder)!r} has no example_id {missing[0]}.")
        return self._order[found]

    def images(self, places: np.ndarray) -> Arrays:
        """N arrays (H, W, C) uint8, not to be written to; one (N, H, W, C) where all images are of one small size."""
        if self._stack is not None:
            return self._stack[places]
        return [
            self._pixels[start:end].reshape(*size, -1)
            for start, end, size in zip(
                self._starts[places].tolist(), self._starts[places + 1].tolist(), self._sizes[places].tolist(),
                strict=True,
            )
        ]  # fmt: skip

    def __reduce__(self) -> Any:
        return type(self).open, (self.folder, self.key)  # a worker maps the file, rather than receive what is in it


def write_store(
    folder: str | os.PathLike[str], key: StoreKey, images: Callable[[], Images], *, max_bytes: int, about: str = ""
) -> PixelStore:
    """Writes a store, whole or not at all; opens it instead where it is there already.

    Any number of processes may call it at once: one writes, the others wait for it.

    Args:
        folder: Where it is to be; made where it does not exist. On a file system that keeps locks.
        key: Of which rows.
        images: Called once, if there is something to write, for all of them.
        max_bytes: The most that the pixels may take.
        about: For people: of which images.

    Raises:
        TransferError: If the folder holds a store of other rows, or no space is left.
        StoreTooLarge: If the pixels take more than max_bytes.
    """
    from filelock import FileLock

    path = Path(folder).expanduser().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if _complete(path) is None:
            for stale in path.parent.glob(f".{path.name}.*"):  # of writers that were killed: they held the lock
                shutil.rmtree(stale, ignore_errors=True)
            _discard(path)
            try:
                with staged(path) as workspace:
                    path.mkdir(exist_ok=True)
                    head = {"format": _FORMAT, "about": about, **asdict(key)}
                    (path / MANIFEST).write_text(json.dumps(head, indent=1))
                    entries = _write_pixels(path / PIXELS, images(), key.channels, max_bytes)
                    with (workspace / IMAGES).open("xb") as file:
                        np.save(file, entries)
                        file.flush()
                        os.fsync(file.fileno())
            except BaseException:
                _discard(path)
                raise
    return PixelStore.open(path, key)


def _write_pixels(path: Path, images: Images, channels: int, max_bytes: int) -> np.ndarray:
    """(R, 3) int64, what IMAGES holds, once the pixels are on the disk."""
    entries: list[tuple[int, int, int]] = []
    written = 0
    with path.open("xb") as file:
        for example_id, image in images:
            height, width, depth = image.shape
            if image.dtype != np.uint8 or depth != channels:
                raise TransferError(f"An image store holds 8-bit images of {channels} channels, not {image.dtype}.")
            written += image.size
            if written > max_bytes:
                raise StoreTooLarge(
                    f"The images take more than image_store_max_bytes={max_bytes:,}, after {len(entries):,} rows."
                )
            file.write(np.ascontiguousarray(image).data)
            entries.append((example_id, height, width))
        file.flush()
        os.fsync(file.fileno())
    return np.array(entries, dtype=np.int64)


def _discard(folder: Path) -> None:
    """Removes what there is of a store, and its folder if nothing else is in it."""
    for name in reversed(FILES):  # without the last it is no store
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _complete(folder: Path) -> StoreKey | None:
    """Of which rows the store in a folder is; None where there is none, or a part of one.

    Raises:
        TransferError: If the folder's manifest.json is something else's.
    """
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(found, dict) or found.pop("format", None) != _FORMAT:
        raise TransferError(f"{str(folder / MANIFEST)!r} is not of an image store: choose another folder.")
    found.pop("about", None)
    key = StoreKey(**found)
    if not (folder / IMAGES).is_file() or not (folder / PIXELS).is_file():
        return None
    images = np.load(folder / IMAGES)
    whole = int((images[:, 1] * images[:, 2]).sum()) * key.channels
    return key if (folder / PIXELS).stat().st_size == whole else None
