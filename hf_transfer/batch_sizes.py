"""Batches that suit the machine, for a frozen network that runs over many rows: how many are loaded, how many run.

On a CPU the C library maps tensors over 32 MiB anew each time, and the system's work for fresh pages is then most of
the time. Measured on one core with mobilenetv2 at 224 px: 53 ms of CPU time a row in batches of 32, of which 33 ms are
the system's; 17 ms in batches of 3, and 14 ms with channels last. Texts run from long to short, so that a batch holds
little padding.

A batch of another size rounds otherwise: who runs a network so sees to it that this does no harm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from .data.columns import list_lengths

_ROWS, _ROWS_ON_ACCELERATOR = 64, 256  # that are loaded at a time, at least
_LARGEST, _LARGEST_ON_ACCELERATOR = 16 << 20, 512 << 20  # bytes that the output of one module may take
_TEXTS = "input_ids"
_SAMPLE, _LOOKED_AT = 4, 64  # rows of a sample; of texts, those of the first that differ most in length


def rows_loaded(device: torch.device, least: int) -> int:
    """How many rows to load at a time.

    Args:
        device: Where the network is.
        least: The size of batches that was asked for.
    """
    return max(least, _ROWS if device.type == "cpu" else _ROWS_ON_ACCELERATOR)


def rows_at_once(device: torch.device, largest: int) -> int:
    """How many rows to run at a time.

    Args:
        device: Where the network is.
        largest: Bytes a row of the largest output of a module.
    """
    return max(1, (_LARGEST if device.type == "cpu" else _LARGEST_ON_ACCELERATOR) // max(largest, 1))


def in_parts(batch: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """A collated batch, so many rows at a time.

    Args:
        batch: Tensors of N rows; what else is in it goes with every part.
        size: Rows a part, from 1.
    """
    rows = len(next(value for value in batch.values() if torch.is_tensor(value)))
    for start in range(0, rows, size):
        yield {
            name: value[start : start + size]
            if torch.is_tensor(value) and value.dim() and len(value) == rows
            else value
            for name, value in batch.items()
        }


def longest_first(rows: Any) -> np.ndarray:
    """(N,) positions of all rows: texts from long to short, all others as they stand.

    Args:
        rows: A prepared dataset.
    """
    if _TEXTS not in rows.column_names:
        return np.arange(len(rows))
    return np.argsort(-list_lengths(rows, _TEXTS), kind="stable")


def a_few(rows: Any) -> list[int]:
    """Positions of a few rows to try a network on; texts of unequal length.

    Args:
        rows: A prepared dataset.
    """
    looked_at = list(range(min(_LOOKED_AT, len(rows))))
    if _TEXTS in rows.column_names:
        lengths = list_lengths(rows.select(looked_at), _TEXTS)
        looked_at.sort(key=lambda row: lengths[row])
        looked_at = [*looked_at[:1], *looked_at[-_SAMPLE + 1 :]]
    return list(dict.fromkeys(looked_at[:_SAMPLE]))


@dataclass
class LargestOutput:
    """What `largest_output` has seen.

    Attributes:
        bytes: Of the largest output of a module, all rows of its batch together.
    """

    bytes: int = 0

    def see(self, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook."""
        given = output if isinstance(output, (tuple, list)) else [output]
        self.bytes = max([self.bytes, *(value.nbytes for value in given if torch.is_tensor(value))])


@contextmanager
def largest_output(networks: Sequence[nn.Module]) -> Iterator[LargestOutput]:
    """Watches the modules of some networks: how large the largest output of one is."""
    seen = LargestOutput()
    handles = [module.register_forward_hook(seen.see) for network in networks for module in network.modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
