"""Sounds to what an audio backbone takes: one channel at its sampling rate, through its own feature extractor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import TransferError
from .columns import EXAMPLE_ID
from .decoding import decode_audio, resample, unreadable

if TYPE_CHECKING:
    from datasets import Dataset


def undecoded(dataset: Dataset, column: str) -> Dataset:
    """The dataset with its sounds as stored bytes or paths: datasets would decode them by torchcodec."""
    import datasets

    return dataset.cast_column(column, datasets.Audio(decode=False))


class AudioTransform:
    """A batch of rows with stored sounds -> the same rows with the extractor's features, each of its own length.

    Args:
        extractor: A transformers feature extractor; names its input and its sampling rate.
        column: The sounds.
        max_seconds: Where to cut; None keeps all.

    Raises:
        TransferError: If max_seconds is not positive, or the extractor has no sampling rate.
    """

    def __init__(self, extractor: Any, column: str, *, max_seconds: float | None = None) -> None:
        if max_seconds is not None and max_seconds <= 0:
            raise TransferError(f"max_length={max_seconds}: for audio it is seconds, above 0.")
        rate = getattr(extractor, "sampling_rate", None)
        if rate is None:
            raise TransferError(f"{type(extractor).__name__} is no audio feature extractor: it has no sampling rate.")
        self.extractor, self.column, self.max_seconds = extractor, column, max_seconds
        self.rate: int = rate
        self.input_name: str = extractor.model_input_names[0]  # input_values or input_features

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        sounds = zip(batch[self.column], batch[EXAMPLE_ID], strict=True)
        rest = {name: column for name, column in batch.items() if name != self.column}
        return {self.input_name: [self._features(file, i) for file, i in sounds], **rest}

    def _features(self, file: Any, example_id: int) -> np.ndarray:
        try:
            waveform, rate = decode_audio(file)
        except (OSError, RuntimeError, ValueError) as error:
            if isinstance(error, TransferError):
                raise
            raise unreadable(error, example_id, "audio") from error
        waveform = resample(waveform, rate, self.rate)  # (T,)
        if self.max_seconds is not None:
            waveform = waveform[: max(1, round(self.max_seconds * self.rate))]
        extracted = self.extractor(waveform, sampling_rate=self.rate, return_tensors="np")
        return extracted[self.input_name][0]  # (T,), or (frames, bins)
