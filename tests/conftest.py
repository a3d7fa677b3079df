"""Tests run offline, with an empty Hugging Face home of their own, and on one thread.

Everything here happens before any library is imported: these read the environment once, at import.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

_HOME = tempfile.mkdtemp(prefix="hf_transfer-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)

for _name in [name for name in os.environ if name.startswith("HF_") or name.endswith("HUGGING_FACE_HUB_TOKEN")]:
    del os.environ[_name]  # a developer's token, endpoint or cache must not reach a test
os.environ |= {
    "HF_HOME": _HOME,
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Tiny models gain nothing from threads, and sums then have one order everywhere. Subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from hf_transfer._torchvision import make_torchvision_importable  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
make_torchvision_importable()  # before timm or transformers import torchvision themselves

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """`shared("data/cifar10")` is that folder of the real data and weights beside the project; skips where absent."""

    def path(relative: str) -> Path:
        found = SHARED / relative
        if not found.exists():
            pytest.skip(f"needs {found}, which is not part of the project")
        return found

    return path
