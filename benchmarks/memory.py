"""The memory that some work needs beyond what the process held before it, at its peak. Linux tells it."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PROCESS = Path("/proc/self")


def peak(work: Callable[[], Any]) -> float:
    """Runs something, and gives the MiB by which the resident memory rose at most while it ran.

    Memory that Python and the C library have freed is given back to the system before. What the C library keeps of
    what the work frees counts as held, and how much that is depends on what the process did before: figures that
    are compared are measured in a process that did little else.

    Raises:
        FileNotFoundError: Elsewhere than on Linux.
    """
    if not (_PROCESS / "clear_refs").exists():
        raise FileNotFoundError("peak memory is read from /proc/self, which Linux has")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    (_PROCESS / "clear_refs").write_text("5")  # the peak starts anew: man 5 proc
    before = _kib("VmRSS")
    work()
    return (_kib("VmHWM") - before) / 1024


def _kib(name: str) -> int:
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
