"""Floating-point numbers as a cache keeps them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import TransferError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Dtypes that a number may be kept in, and what it takes."""


def numbers(values: Tensor, dtype: str, what: str) -> np.ndarray:
    """Values as an array; numpy has no bfloat16, so its bits are kept as int16.

    Args:
        values: (...), on any device.
        dtype: One of BYTES.
        what: What they are, for the error.

    Raises:
        TransferError: If one of them is no finite number in that dtype.
    """
    kept = values.detach().to(getattr(torch, dtype)).cpu()
    if not torch.isfinite(kept).all():
        largest = values.detach().abs().max()
        raise TransferError(
            f"The {what} reach {largest:.4g}, which {dtype} cannot hold as finite numbers. Keep them in float32, if "
            "they are finite there."
        )
    return (kept.view(torch.int16) if dtype == "bfloat16" else kept).numpy()


def restored(kept: Tensor, dtype: str) -> Tensor:
    """What `numbers` kept, as it was read."""
    return kept.view(torch.bfloat16) if dtype == "bfloat16" else kept
