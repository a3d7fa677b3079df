"""A teacher's signal as flat arrays, one entry a prediction, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..errors import TransferError
from ..store.numbers import numbers
from ..store.reading import padded
from .signal import TeacherSignal, TopLogits

_DTYPES = {torch.float16: "float16", torch.float32: "float32"}
_INT16 = 32767  # classes up to which indices fit
_AT_ONCE = 1 << 25  # logits, of which taking the largest makes copies in float32: 128 MiB each


@dataclass(frozen=True)
class Kept:
    """What of a signal a cache keeps.

    Attributes:
        top_k: How many of the largest logits; None keeps all.
        temperatures: With top_k, those at which the mass of all others is kept.
        dtype: "float16" or "float32", of logits and features.
        features: Whether the input of the teacher's classifier is kept.
    """

    top_k: int | None
    temperatures: tuple[float, ...]
    dtype: str
    features: bool

    @classmethod
    def of(
        cls, top_k: int | None, temperatures: tuple[float, ...] | list[float], dtype: torch.dtype, features: bool
    ) -> Kept:
        """Checks the arguments of `write_cache`.

        Raises:
            TransferError: If a number is out of range or the dtype is none of those kept.
        """
        if dtype not in _DTYPES:
            raise TransferError(f"dtype={dtype}: a teacher cache keeps {' or '.join(map(str, _DTYPES))}.")
        if top_k is not None and top_k < 1:
            raise TransferError(f"top_k={top_k}: it is how many of the largest logits to keep, at least 1, or None.")
        if top_k is not None and (not temperatures or min(temperatures) <= 0):
            raise TransferError(f"temperatures={tuple(temperatures)}: those of the terms, at least one, each above 0.")
        used = tuple(sorted({float(t) for t in temperatures})) if top_k is not None else ()
        return cls(top_k, used, _DTYPES[dtype], features)

    def arrays(self, signal: TeacherSignal, attention_mask: Tensor | None) -> tuple[dict[str, np.ndarray], int | None]:
        """A signal as arrays.

        Args:
            signal: Of N rows, with logits (all, or those to be kept of them), features or both.
            attention_mask: (N, T); only attended tokens are kept. None where a row has no padding.

        Returns:
            By name the arrays of M items (rows, or the tokens of all rows in order), with `lengths` (N,) for tokens;
            and C, or None where no logits are kept.

        Raises:
            TransferError: If the signal lacks what is to be kept, or holds what the dtype cannot.
        """
        signal = replace(signal, hidden={}, features=signal.features if self.features else None)
        answers = signal.logits if signal.top is None else signal.top.values
        if (self.features and signal.features is None) or (answers is None and not self.features):
            wanted = "features" if self.features else "logits"
            raise TransferError(f"The teacher gives {signal.contents() or 'nothing'} where {wanted} are to be kept.")
        values = [value for value in (answers, signal.features) if value is not None]
        if len({value.dim() for value in values}) > 1:
            raise TransferError(f"The teacher gives logits and features of shapes {[tuple(v.shape) for v in values]}.")
        result = {}
        if values[0].dim() == 3:  # (N, T, ...)
            mask = torch.ones(values[0].shape[:2]) if attention_mask is None else attention_mask
            mask = mask.to(values[0].device, torch.bool)
            result["lengths"] = mask.sum(1).to(torch.int32).cpu().numpy()
            signal = signal.rows(mask)
        if signal.features is not None:
            result["features"] = numbers(signal.features, self.dtype, "teacher's features")
        if signal.top is not None:
            return result | self._largest(signal.top), signal.top.classes
        if signal.logits is None:
            return result, None
        return result | self._logits(signal.logits), signal.logits.shape[-1]

    def signal(self, arrays: Mapping[str, Tensor], mask: Tensor | None, classes: int | None) -> TeacherSignal:
        """The signal that `arrays` made flat.

        Args:
            arrays: Of M items.
            mask: (N, T) bool with M tokens, which say where the items go; None for rows.
            classes: C.

        Returns:
            It, on the CPU; 0 at tokens that are not attended.
        """
        found = dict(arrays)
        if mask is not None:
            found = {name: padded(values, mask) for name, values in found.items()}
        if "values" not in found:
            return TeacherSignal(logits=found.get("logits"), features=found.get("features"))
        assert classes is not None
        tails = {t: found["tails"][..., i] for i, t in enumerate(self.temperatures)}
        return TeacherSignal(
            top=TopLogits(found["values"], found["indices"], tails, classes), features=found.get("features")
        )

    def _logits(self, logits: Tensor) -> dict[str, np.ndarray]:
        """logits (M, C)."""
        if self.top_k is None:
            return {"logits": numbers(logits, self.dtype, "teacher's logits")}
        tops = [
            TopLogits.of(part, self.top_k, self.temperatures)
            for part in logits.split(max(1, _AT_ONCE // logits.shape[-1]))
        ]
        parts = [self._largest(top) for top in tops]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _largest(self, top: TopLogits) -> dict[str, np.ndarray]:
        tails = torch.stack([top.tails[t] for t in self.temperatures], dim=-1)  # (M, temperatures)
        index_type = np.int16 if top.classes <= _INT16 else np.int32
        return {
            "values": numbers(top.values, self.dtype, "teacher's logits"),
            "indices": top.indices.cpu().numpy().astype(index_type),
            "tails": tails.float().cpu().numpy(),
        }
