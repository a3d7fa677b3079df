"""Stand-ins for backbones, small enough to build in every test, and a writer of sounds."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "a", "the", "new", "##york", "lon", "##don", "##s"]
GREY = {"input_size": (1, 24, 24), "mean": (0.5,), "std": (0.25,), "interpolation": "bilinear", "crop_pct": 0.875}
COLOUR = {
    "input_size": (3, 32, 32),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
}


@dataclass
class FakeBackbone:
    modality: str = "image"
    processor: Any = None
    data_config: dict[str, Any] | None = field(default_factory=lambda: dict(COLOUR))
    labels: list[str] | None = None
    task: str = "image-classification"
    name: str = "fake"
    model: Any = None

    @property
    def outputs(self) -> int:
        return 3 if self.labels is None else len(self.labels)


def wav(samples: Sequence[float] | np.ndarray, rate: int = 8000, channels: int = 1) -> bytes:
    """16-bit wav bytes of samples in [-1, 1]; (T,) or (T, channels)."""
    buffer = BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.asarray(samples) * 32767).round().astype("<i2").tobytes())
    return buffer.getvalue()
