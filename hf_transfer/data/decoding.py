"""Files of images and sounds to pixels and waveforms, and a check of them all before any work."""

from __future__ import annotations

import logging
from io import BytesIO
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import TransferError
from .columns import EXAMPLE_ID
from .fast_jpeg import fast_jpeg
from .identity import describe

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

logger = logging.getLogger(__name__)

OnBadExample = Literal["raise", "skip"]
File = dict[str, Any]  # {"bytes": bytes | None, "path": str | None}: how datasets stores an image or a sound


def decode_image(file: File | None, channels: int = 3) -> Image:
    """A stored image, upright, as 8-bit grey or RGB.

    Args:
        file: What `datasets.Image(decode=False)` gives.
        channels: 1 for grey, 3 for RGB.

    Raises:
        OSError, SyntaxError, ValueError: Whatever Pillow raises for what it cannot read.
    """
    import datasets
    from PIL import Image

    if file is None:
        raise ValueError("the row has no image")
    if channels == 3 and (fast := fast_jpeg(file)) is not None:
        return fast
    image = datasets.Image().decode_example(file)
    if image.mode.startswith("I;16"):  # as X-rays and depth maps have; Pillow's own convert() clips these to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers of unknown range: store them as 8 or 16 bits")
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def decode_audio(file: File | None) -> tuple[np.ndarray, int]:
    """A stored sound as one channel.

    datasets' own decoding needs torchcodec, and with it ffmpeg; libsndfile reads wav, flac, ogg and mp3 without.

    Returns:
        (T,) float32 in [-1, 1], and its sampling rate in Hz.

    Raises:
        RuntimeError, OSError, ValueError: Whatever soundfile raises for what it cannot read.
    """
    if file is None or (file["bytes"] is None and file["path"] is None):
        raise ValueError("the row has no audio")
    content = BytesIO(file["bytes"]) if file["bytes"] is not None else file["path"]
    waveform, rate = soundfile().read(content, dtype="float32", always_2d=True)  # (T, channels)
    if not len(waveform):
        raise ValueError("it is 0 samples long")
    return waveform.mean(axis=1), rate


def resample(waveform: np.ndarray, rate: int, target: int) -> np.ndarray:
    """A waveform at another sampling rate, by a polyphase filter.

    Args:
        waveform: (T,) float32.
        rate: Its sampling rate in Hz.
        target: The wanted one in Hz.

    Returns:
        (ceil(T * target / rate),) float32.
    """
    if rate == target:
        return waveform
    from scipy.signal import resample_poly

    divisor = int(np.gcd(rate, target))
    return resample_poly(waveform, target // divisor, rate // divisor).astype(np.float32)


def soundfile() -> ModuleType:
    """The soundfile library.

    Raises:
        TransferError: If it is not installed.
    """
    try:
        import soundfile
    except ImportError as error:
        raise TransferError("Audio files need soundfile: pip install 'hf-transfer-learning[audio]'.") from error
    return soundfile


def unreadable(error: Exception, example_id: int, kind: str) -> TransferError:
    """The error for a row that does not decode."""
    return TransferError(
        f"Unreadable {kind} in {describe(example_id)}: {error}. Repair or remove that row, or pass "
        'on_bad_example="skip" to leave out such rows.'
    )


def readable_rows(dataset: Dataset, column: str, kind: Literal["image", "audio"], on_bad: OnBadExample) -> Dataset:
    """Checks every row's file before any work.

    "raise" reads the headers only, which is cheap; a file that breaks off later raises when it is loaded, with the
    row's name. "skip" decodes every file once, and decides here, once, which rows there are.

    Args:
        dataset: Rows with `column` stored undecoded, and `example_id`.
        column: The column of files.
        kind: What they are.
        on_bad: What to do with a row that does not decode.

    Returns:
        The dataset, without the bad rows.

    Raises:
        TransferError: If a row is bad and `on_bad` is "raise", or if no row is left.
    """
    if on_bad not in ("raise", "skip"):
        raise TransferError(f'on_bad_example={on_bad!r}: valid are "raise" and "skip".')
    plain = dataset.with_format(None).select_columns([column, EXAMPLE_ID])
    bad: dict[int, int] = {}  # position -> example_id
    position = 0
    for batch in plain.iter(batch_size=256):
        for file, example_id in zip(batch[column], batch[EXAMPLE_ID], strict=True):
            try:
                _check(file, kind, whole=on_bad == "skip")
            except (OSError, RuntimeError, SyntaxError, ValueError) as error:
                if isinstance(error, TransferError):
                    raise
                if on_bad == "raise":
                    raise unreadable(error, example_id, kind) from error
                bad[position] = example_id
            position += 1
    if not bad:
        return dataset
    logger.warning("left out %d unreadable %s rows: %s", len(bad), kind, ", ".join(map(describe, bad.values())))
    if len(bad) == position:
        raise TransferError(f"None of the {position} rows of column {column!r} is a readable {kind}.")
    return dataset.select([i for i in range(position) if i not in bad])


def _check(file: File | None, kind: str, *, whole: bool) -> None:
    if kind == "audio":
        if whole:
            decode_audio(file)
        elif file is None or (file["bytes"] is None and file["path"] is None):
            raise ValueError("the row has no audio")
        else:
            soundfile().info(BytesIO(file["bytes"]) if file["bytes"] is not None else file["path"])
        return
    if whole:
        decode_image(file)
    elif file is None or (file["bytes"] is None and file["path"] is None):
        raise ValueError("the row has no image")
    else:
        from PIL import Image

        Image.open(BytesIO(file["bytes"]) if file["bytes"] is not None else file["path"]).close()
