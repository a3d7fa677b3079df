"""Where caches lie, what there is, and how one is removed. Nothing is removed unless it is named."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TransferError
from .journal import read_parts
from .key import CacheKey
from .manifest import MANIFEST, SHARDS, read_json
from .writing import LOCK

HOMES = ("teachers", "prefixes")  # folders under the Hub's home, one a kind of cache


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
class Found:
    """A cache that lies somewhere.

    Attributes:
        folder: Where.
        kind: What it is called.
        about: Of which network and rows.
        size: Bytes.
        used: When it was last opened or written, in seconds since the epoch.
        complete: Whether it was written to the end.
    """

    folder: Path
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

    try:
        with WeakFileLock(cache.folder / LOCK, timeout=0.1):
            (cache.folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(cache.folder / SHARDS, ignore_errors=True)
    except TimeoutError as error:
        raise TransferError(f"A run is writing {str(cache.folder)!r} now: remove it once that has ended.") from error
    (cache.folder / LOCK).unlink(missing_ok=True)
    if not any(cache.folder.iterdir()):
        cache.folder.rmdir()


def _looked_at(folder: Path) -> Found | None:
    """What lies in a folder; None where it is no cache."""
    manifest = read_json(folder / MANIFEST)
    head = manifest if isinstance(manifest, dict) else next((part.head for part in read_parts(folder)), {})
    kind = str(head.get("format", ""))
    if not kind.startswith("hf_transfer "):
        return None
    files = list(_files(folder))
    sizes = [path.stat() for path in files]
    name = kind.removeprefix("hf_transfer ").rpartition(" ")[0]
    about = str(head.get("about", "written by an older version, not read any more"))
    used = max(stat.st_mtime for stat in sizes)
    return Found(folder, name, about, sum(stat.st_size for stat in sizes), used, isinstance(manifest, dict))


def _files(folder: Path) -> Iterator[Path]:
    """The cache's own files."""
    for path in (folder / MANIFEST, *(folder / SHARDS).glob("*")):
        if path.is_file():
            yield path
