"""The losses since the optimizer's last step, looked at before their gradients are used."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, cuda


class PendingLosses:
    """Losses of training batches that nobody has looked at yet.

    A GPU's loss sets out for the CPU when it is added, before the backward pass: looking at it waits for the forward
    pass alone, and the GPU goes on with the other.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, Any, Any]] = []

    def add(self, loss: Tensor, rows: Any) -> None:
        """Takes a loss.

        Args:
            loss: 0-d, without graph.
            rows: What to name its batch by.
        """
        arrived = None
        if loss.is_cuda:
            loss = loss.to("cpu", non_blocking=True)  # into pinned memory
            arrived = cuda.current_stream().record_event()
        self._pending.append((loss, rows, arrived))

    def first_bad(self) -> tuple[float, Any] | None:
        """The first loss that is NaN or infinite, with its `rows`; None if all are finite. Forgets all of them."""
        pending, self._pending = self._pending, []
        for loss, rows, arrived in pending:
            if arrived is not None:
                arrived.synchronize()
            value = loss.item()
            if not math.isfinite(value):
                return value, rows
        return None
