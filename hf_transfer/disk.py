"""How much of a disk may be written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

SPARE = 0.9  # of the free disk that a cache may take


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk where a folder lies or will lie."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def is_writable(folder: Path) -> bool:
    """Whether a folder may be written to, or made."""
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK)
