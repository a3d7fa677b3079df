"""Where caches lie, what there is, and how one is removed. Nothing is removed unless it is named."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import pixel_store
from ..errors import TransferError
from .journal import read_parts
from .key import CacheKey
from .manifest import MANIFEST, SHARDS, read_json
from .writing import LOCK

HOMES = ("teachers", "prefixes", "images")  # folders under the Hub's home, one a kind of cache


def cache_folder(root: str | os.PathLike[str] | None, home: str, key: CacheKey, *kept: Any) -> Path:
    """The folder of a cache, in which every run that needs the same one finds it.

    Args:
        root: Where caches lie; by default under the Hub's home (`HF_HOME`).
        home: One of HOMES.
        key: What the cache is of.
        *kept: What else it is named by.
    """
    parts = (key.source[:12], key.data[:12], key.transform[:12], key.views, *kept)
    return (default_home(home) if root is None else Path(root).expanduser()) / "-".join(map(str, parts))


def default_home(home: str) -> Path:
    """Where caches of a kind lie by default."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hf_transfer" / home


@dataclass(frozen=True)
class Form:
    """How a kind of cache lies on a disk; each has a MANIFEST or a journal that names the kind.

    Attributes:
        files: Globs of its own files in its folder, MANIFEST among them.
        last: Which of them is written last: without it a cache is incomplete.
        lock: What the run that writes it holds, seen from where the folder lies; {} is the folder's name.
    """

    files: tuple[str, ...]
    last: str
    lock: str

    def files_in(self, folder: Path) -> list[Path]:
        """A cache's own files."""
        return [path for pattern in self.files for path in folder.glob(pattern) if path.is_file()]

    def lock_of(self, folder: Path) -> Path:
        """A cache's lock."""
        return folder.parent / self.lock.format(folder.name)


_JOURNALLED = Form((MANIFEST, f"{SHARDS}/*"), MANIFEST, f"{{}}/{LOCK}")
_IMAGES = Form(pixel_store.FILES, pixel_store.IMAGES, "{}.lock")


@dataclass(frozen=True)
class Found:
    """A cache that lies somewhere.

    Attributes:
        folder: Where.
        form: How it lies there.
        kind: What it is called.
        about: Of which network and rows.
        size: Bytes.
        used: When it was last opened or written, in seconds since the epoch.
        complete: Whether it was written to the end.
    """

    folder: Path
    form: Form
    kind: str
    about: str
    size: int
    used: float
    complete: bool

    @property
    def days(self) -> float:
        """Days since it was last used."""
        return (time.time() - self.used) / 86400


def caches_in(roots: Sequence[Path]) -> list[Found]:
    """The caches that lie in some folders, whole or in part, the last used first.

    Args:
        roots: The folders; those that do not exist hold none.
    """
    folders = [path for root in roots if root.is_dir() for path in root.iterdir() if path.is_dir()]
    found = [cache for folder in folders if (cache := _looked_at(folder)) is not None]
    return sorted(found, key=lambda cache: -cache.used)


def chosen(caches: Sequence[Found], names: Sequence[str], *, all_of_them: bool) -> list[Found]:
    """The caches that are named.

    Args:
        caches: What there is.
        names: Of their folders.
        all_of_them: Whether no name means all of them.

    Raises:
        TransferError: If there is none of a name, or no name.
    """
    known = {cache.folder.name: cache for cache in caches}
    listed = ", ".join(known) or "none"
    if not names and not all_of_them:
        raise TransferError(f"--remove names no cache. Give names, or --older-than DAYS. There are: {listed}.")
    if unknown := [name for name in names if name not in known]:
        raise TransferError(f"There is no cache named {', '.join(unknown)}. There are: {listed}.")
    return [known[name] for name in names] if names else list(caches)


def remove(cache: Found) -> None:
    """Removes a cache, and its folder if nothing else is in it.

    Raises:
        TransferError: If a run is writing it.
    """
    from huggingface_hub.utils import WeakFileLock

    folder, lock = cache.folder, cache.form.lock_of(cache.folder)
    try:
        with WeakFileLock(lock, timeout=0.1):
            (folder / cache.form.last).unlink(missing_ok=True)  # at once: what is left is incomplete
            for path in cache.form.files_in(folder):
                path.unlink(missing_ok=True)
    except TimeoutError as error:
        raise TransferError(f"A run is writing {str(folder)!r} now: remove it once that has ended.") from error
    lock.unlink(missing_ok=True)
    for emptied in (folder / SHARDS, folder):
        with suppress(OSError):  # something else is in it
            emptied.rmdir()


def _looked_at(folder: Path) -> Found | None:
    """What lies in a folder; None where it is no cache."""
    manifest = read_json(folder / MANIFEST)
    head = manifest if isinstance(manifest, dict) else next((part.head for part in read_parts(folder)), {})
    kind = str(head.get("format", ""))
    if not kind.startswith("hf_transfer "):
        return None
    name = kind.removeprefix("hf_transfer ").rpartition(" ")[0]
    form = _IMAGES if name == "images" else _JOURNALLED
    sizes = [path.stat() for path in form.files_in(folder)]
    complete = isinstance(manifest, dict) and (folder / form.last).is_file()
    about = str(head.get("about", "written by an older version, not read any more"))
    used = max(stat.st_mtime for stat in sizes)
    return Found(folder, form, name, about, sum(stat.st_size for stat in sizes), used, complete)
