"""Makes torchvision importable where its compiled operators cannot load.

PyPI's torchvision wheels for Linux are built against CUDA. Beside a CPU build of torch their shared library does not
load, which torchvision tolerates, except that it then registers fake kernels for `nms` and `qnms` without asking
whether those operators exist (https://github.com/pytorch/vision/issues/9085). Everything timm and transformers use of
torchvision is Python and works; only the import fails. Declaring the operators' schemas first is enough.

Delete this file when `torchvision/_meta_registrations.py` guards those registrations by `_has_ops()`.
"""

from __future__ import annotations

import sys
from typing import Any

_declared: Any = None  # the Library must outlive the import: its declarations die with it


def make_torchvision_importable() -> None:
    """Declares `torchvision::nms` and `qnms` where torchvision cannot load its own; elsewhere does nothing."""
    global _declared
    if _declared is not None or "torchvision" in sys.modules:
        return
    import importlib.util

    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return  # a CUDA build of torch: the wheel's library loads
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return
    if _compiled_operators_load(spec.submodule_search_locations[0]):
        return
    _declared = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _compiled_operators_load(folder: str) -> bool:
    """Whether one of torchvision's operator libraries (`_C*.so`) loads beside this torch."""
    from pathlib import Path

    import torch

    for library in sorted(Path(folder).glob("_C*.so")):
        try:
            torch.ops.load_library(str(library))
        except (ImportError, OSError):
            continue
        return True
    return False
