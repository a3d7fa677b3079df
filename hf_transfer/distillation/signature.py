"""Which rows a network saw, and in which shape: two hashes that a cache of its values is keyed by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..data.audio_transforms import AudioTransform
from ..data.image_transforms import ImageTransform
from ..data.replay import EpochCounter, Replayable
from ..data.row_digests import RowDigests
from ..data.stored_rows import StoredRows
from ..errors import TransferError
from .teacher_inputs import TeacherInputRows

if TYPE_CHECKING:
    from datasets import Dataset

_DRAWN_BY = ("torch", "torchvision", "pillow")  # random augmentation may change with a release of one of these


def data_signature(dataset: Any) -> str:
    """A hash of the rows and what is in them, whatever their order. Labels do not count: no teacher reads them.

    Of an image or sound that is a file beside the data, and larger than 64 KiB, its size and four blocks of 16 KiB
    are read; all else is read whole.

    Args:
        dataset: What `transforms.prepare` returned, also after select() or shuffle(), or its images' store; or a torch
            Subset of these.

    Returns:
        64 hexadecimal digits.

    Raises:
        TransferError: If it is no such dataset, or its rows have no `example_id`.
    """
    return _hash([_digests(rows).together() for rows in _parts(dataset)])


def transform_signature(dataset: Any) -> str:
    """A hash of what is done to a row before a network sees it: preprocessing, size, augmentation and its seed.

    The epoch does not count: it says which view of a row is read. The seed counts where something is drawn with it, as
    do then the libraries that draw. Text is tokenised when it is prepared, which `data_signature` sees. What a
    collator does is not seen: blends (mixup, CutMix) depend on the batch, and no cache of rows holds answers to them.

    Args:
        dataset: As for `data_signature`.

    Returns:
        64 hexadecimal digits.

    Raises:
        TransferError: If a transform cannot be told from another.
    """
    return _hash([_transform_facts(rows.format["format_kwargs"].get("transform")) for rows in _parts(dataset)])


def _hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _digests(rows: Dataset | StoredRows) -> RowDigests:
    return rows.digests if isinstance(rows, StoredRows) else RowDigests.of(rows)


def _parts(dataset: Any) -> list[Dataset | StoredRows]:
    """The datasets that a row is made of: the student's, and the teacher's where it has inputs of its own."""
    from datasets import Dataset

    if isinstance(dataset, TeacherInputRows):
        return [dataset.dataset, dataset.teacher_rows.select(dataset.places)]
    if type(dataset) is torch.utils.data.Subset:  # what a subclass gives is not known
        return [rows.select(list(dataset.indices)) for rows in _parts(dataset.dataset)]
    if not isinstance(dataset, (Dataset, StoredRows)):
        raise TransferError(
            f"A cache needs data whose rows can be told apart: a datasets.Dataset from "
            f"hf_transfer.data.transforms.prepare(), got {type(dataset).__name__}. Use no cache for others."
        )
    return [dataset]


def _transform_facts(transform: Any) -> Any:
    if transform is None:
        return None
    if isinstance(transform, ImageTransform):
        parts: dict[str, Any] = {"size": transform.size, "then": transform.normalise, "first": transform.still}
        if transform.augmentation is not None:
            parts |= {"augmentation": transform.augmentation, "seed": transform.seed, "drawn by": _versions()}
        return _facts(parts)
    if isinstance(transform, Replayable):
        return _facts([transform, _versions()])
    if isinstance(transform, AudioTransform):
        return _facts(transform)
    raise TransferError(
        f"The data carries a transform that cannot be replayed or told from another: {type(transform).__name__}. "
        "Prepare it with hf_transfer.data.transforms.prepare(), derive the transform from "
        "hf_transfer.data.replay.Replayable, or use no cache."
    )


def _versions() -> dict[str, str]:
    return {name: version(name).partition("+")[0] for name in _DRAWN_BY}  # 2.15.0+cpu draws as 2.15.0+cu130 does


def _facts(value: Any) -> Any:
    """A transform's parts as JSON: whatever it keeps in its attributes, and nothing of where it is in memory."""
    from transformers.feature_extraction_utils import FeatureExtractionMixin
    from transformers.image_processing_base import ImageProcessingMixin

    if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, Enum)):
        return value
    if isinstance(value, EpochCounter):
        return "epoch"
    if isinstance(value, Enum):
        return [_name(type(value)), value.name]
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, Mapping):
        return {str(key): _facts(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(str(_facts(item)) for item in value)
    if isinstance(value, (list, tuple)):
        return [_facts(item) for item in value]
    if isinstance(value, (FeatureExtractionMixin, ImageProcessingMixin)):
        return [_name(type(value)), _facts(value.to_dict())]
    if isinstance(value, (type, torch.dtype)) or not hasattr(value, "__dict__"):
        return str(value)
    return _named(value)


def _named(value: Any) -> Any:
    if not hasattr(value, "__qualname__"):
        return [_name(type(value)), _facts(vars(value))]
    if "<" in value.__qualname__:  # <lambda>, <locals>: what it closes over is not seen
        raise TransferError(f"A transform holds the function {value.__qualname__}: give it one of a module.")
    return _name(value)


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
