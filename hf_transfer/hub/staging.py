"""All or nothing: files are written beside the target and moved into it once the last one is whole."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import TransferError


@contextmanager
def staged(folder: str | os.PathLike[str], stale: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yields an empty folder; what is in it at the end replaces the files of those names in the target.

    Args:
        folder: The target; made where it does not exist. Its other files stay as they are.
        stale: Glob patterns of files that the new ones supersede; those not written anew are removed.

    Raises:
        TransferError: No space is left. The target is as it was before.
    """
    folder = Path(folder).expanduser().resolve()  # a link may lead to another file system
    existed = folder.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, not in the system's temporary folder: a rename must not cross file systems.
    workspace = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    new, old = workspace / "new", workspace / "old"
    new.mkdir()
    try:
        yield new
        _replace(new, old, folder, stale)
    except Exception as error:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        if is_full(error):
            raise TransferError(
                f"No space is left on the disk of {str(folder)!r}. Nothing was saved; what was there is as it was. "
                "Free some space, or choose another folder."
            ) from error
        raise
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def is_full(error: BaseException) -> bool:
    """Whether an error says that no space is left on the disk."""
    # safetensors reports the system's error by its text alone
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def _replace(new: Path, old: Path, folder: Path, stale: tuple[str, ...]) -> None:
    """Moves files into the target one by one, keeping what they replace until all are there."""
    names = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
    superseded = {path.relative_to(folder) for pattern in stale for path in folder.glob(pattern) if path.is_file()}
    moved: list[Path] = []
    try:
        for name in sorted(superseded | set(names)):
            if (folder / name).exists():
                _move(folder / name, old / name)
            moved.append(name)
            if name in names:
                _move(new / name, folder / name)
    except BaseException:
        for name in moved:
            (folder / name).unlink(missing_ok=True)
        for path in [path for path in old.rglob("*") if path.is_file()]:
            _move(path, folder / path.relative_to(old))
        raise


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)
