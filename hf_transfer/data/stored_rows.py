"""Prepared images that are read from a PixelStore: an epoch touches neither files nor Arrow tables.

A row carries its place, and the collator makes the pixels of the whole batch at once; they are those of the rows that
are decoded anew, bit for bit.

    rows = store_images(prepare(train, backbone, data.columns, train=True), "stores/train")
    TransferTrainer(..., train_dataset=rows)
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ..disk import free_bytes
from ..errors import TransferError
from .columns import EPOCH, EXAMPLE_ID
from .draws import Draws
from .image_transforms import ImageTransform
from .pixel_store import Images, PixelStore, StoreKey, write_store
from .replay import Replayable
from .row_digests import RowDigests
from .stills import Shrunk

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

MAX_BYTES = 16 * 2**30
"""The most that a store takes by default."""
PIXEL_VALUES = "pixel_values"
_LOOKED_AT = 64  # images whose sizes tell that of a store
_BATCH = 64


class StoredRows(TorchDataset[Mapping[str, Any]], Replayable):
    """A prepared dataset whose images are in a store. Made by `store_images`.

    The parts of a `datasets.Dataset` that prepared rows are asked for are here under the same names.

    Args:
        transform: Of the prepared dataset, whose epoch is this one's.
        store: Of its images.
        columns: Its other columns, of N values each.
        digests: Of its N rows.
    """

    def __init__(
        self, transform: ImageTransform, store: PixelStore, columns: Mapping[str, list[Any]], digests: RowDigests
    ) -> None:
        Replayable.__init__(self, transform.seed)
        self.epoch = transform.epoch
        self.transform, self.store, self.columns, self.digests = transform, store, dict(columns), digests
        self.ids = torch.tensor(self.columns[EXAMPLE_ID])  # (N,)
        self.places = store.places(self.ids.numpy())  # (N,)

    @property
    def random(self) -> bool:
        return self.transform.random

    @property
    def column_names(self) -> list[str]:
        """Of the rows; `pixel_values` comes from the store."""
        return [PIXEL_VALUES, *self.columns]

    @property
    def format(self) -> dict[str, Any]:
        """As a dataset with a transform says it."""
        return {"type": "custom", "format_kwargs": {"transform": self.transform}}

    def select(self, rows: Sequence[int]) -> StoredRows:
        """Some of the rows."""
        chosen = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return StoredRows(self.transform, self.store, chosen, self.digests.select(rows))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> StoredRow:
        return StoredRow(self, range(len(self))[row], self.epoch.value)

    def __getitems__(self, rows: Sequence[int]) -> list[StoredRow]:
        epoch = self.epoch.value
        return [StoredRow(self, row, epoch) for row in rows]

    def pixels(self, rows: Sequence[int], epoch: int) -> Tensor:
        """(N, C, H, W) float32, what these rows are in an epoch."""
        draws = Draws(self.seed, epoch, self.ids[rows])
        return self.transform.on_device(self.host_pixels(rows, draws), draws)

    def host_pixels(self, rows: Sequence[int], draws: Draws) -> Tensor:
        """(N, C, H, W) uint8, of which `transform.on_device` makes `pixels`."""
        return self.transform.on_host(self.store.images(self.places[rows]), draws)


class StoredRow(Mapping[str, Any]):
    """A row: its columns, and `pixel_values`, made when they are asked for.

    Attributes:
        rows: Of which it is one.
        place: Its number there.
        epoch: In which it was taken.
    """

    __slots__ = ("epoch", "place", "rows")

    def __init__(self, rows: StoredRows, place: int, epoch: int) -> None:
        self.rows, self.place, self.epoch = rows, place, epoch

    def __getitem__(self, name: str) -> Any:
        if name == PIXEL_VALUES:
            return self.rows.pixels([self.place], self.epoch)[0]
        if name == EPOCH and self.rows.transform.train:
            return self.epoch
        return self.rows.columns[name][self.place]

    def __iter__(self) -> Iterator[str]:
        yield from self.rows.column_names
        if self.rows.transform.train:
            yield EPOCH

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self.rows.columns or name == PIXEL_VALUES or (name == EPOCH and self.rows.transform.train)


def are_of_one_batch(rows: Sequence[Any]) -> bool:
    """Whether all are rows of one StoredRows in one epoch, so that their pixels can be made together."""
    first = rows[0]
    return isinstance(first, StoredRow) and all(
        isinstance(row, StoredRow) and row.rows is first.rows and row.epoch == first.epoch for row in rows
    )


def batch_pixels(rows: Sequence[Any]) -> Tensor:
    """(N, C, H, W) float32, the pixels of rows of one batch."""
    return rows[0].rows.pixels([row.place for row in rows], rows[0].epoch)


def store_images(
    prepared: Dataset, folder: str | Path, *, max_bytes: int = MAX_BYTES, num_workers: int = 0
) -> StoredRows:
    """Decodes the images of a prepared split once, and reads them from there from now on.

    Images that are augmented by "light" are kept whole, those larger than twice the crop shrunk to that; others are
    kept as evaluation crops them. What a row is in an epoch is the same with and without a store, bit for bit.

    Args:
        prepared: What `transforms.prepare` returned for images.
        folder: Where the store is, or will be written; any number of processes may share it.
        max_bytes: The most that it may take.
        num_workers: Processes that decode, 0 being this one.

    Returns:
        The same rows, for a Trainer or DataLoader with `collate.collator_for`.

    Raises:
        TransferError: If the rows are no images that were prepared, their processor does not work on 8-bit images,
            the folder holds other rows, there is no space for them, or a row does not decode.
    """
    plan = StorePlan.of(prepared)
    logger.info("Image store in %s: %s, %.0f MiB free", folder, plan, free_bytes(Path(folder).absolute()) / 2**20)
    return plan.carried_out(Path(folder), max_bytes, num_workers)


@dataclass(frozen=True)
class StorePlan:
    """What a store of some rows would be.

    Attributes:
        prepared: The rows.
        transform: What is done to them.
        bytes: Of all images, near enough.
    """

    prepared: Dataset
    transform: ImageTransform
    bytes: int

    @classmethod
    def of(cls, prepared: Any) -> StorePlan:
        """Looks at some rows, and decodes none.

        Raises:
            TransferError: As `store_images`.
        """
        transform = _image_transform(prepared)
        if transform is None:
            raise TransferError(
                f"Only images that hf_transfer.data.transforms.prepare() has prepared are stored, not "
                f"{type(prepared).__name__}."
            )
        transform.still.facts()  # refuses what is not of 8 bits
        return cls(prepared, transform, _bytes(prepared, transform))

    def __str__(self) -> str:
        return f"{len(self.prepared):,} images, about {self.bytes / 2**20:,.1f} MiB"

    def carried_out(self, folder: Path, max_bytes: int, num_workers: int) -> StoredRows:
        """Writes the store, or opens it."""
        began = time.monotonic()
        store = write_store(
            folder,
            self.key,
            lambda: decoded(self.prepared, self.transform, num_workers),
            max_bytes=max_bytes,
            about=f"{len(self.prepared):,} images, {self.transform.still}",
        )
        logger.info("Images stored in %s: %.1f MiB, %.1f s", folder, store.bytes / 2**20, time.monotonic() - began)
        plain = self.prepared.with_format(None)
        rest = plain.select_columns([name for name in plain.column_names if name != self.transform.column])
        columns = {name: list(rest[:][name]) for name in rest.column_names}
        return StoredRows(self.transform, store, columns, self.digests)

    @cached_property
    def digests(self) -> RowDigests:
        """Of the rows, which are read for it as they are stored."""
        return RowDigests.of(self.prepared)

    @cached_property
    def key(self) -> StoreKey:
        """Of the store."""
        done = json.dumps(self.transform.still.facts(), sort_keys=True, default=str)
        return StoreKey(self.digests.together(), done, self.transform.size[0])


def has_images(prepared: Any) -> bool:
    """Whether these are images that `transforms.prepare` has prepared."""
    return _image_transform(prepared) is not None


def _image_transform(prepared: Any) -> ImageTransform | None:
    from datasets import Dataset

    if not isinstance(prepared, Dataset) or prepared.format["type"] != "custom":
        return None
    transform = prepared.format["format_kwargs"].get("transform")
    return transform if isinstance(transform, ImageTransform) else None


def decoded(prepared: Dataset, transform: ImageTransform, num_workers: int = 0) -> Images:
    """Every row's image as it is before anything random."""
    rows: Any = _Decoding(prepared.with_format(None), transform)
    for batch in DataLoader(rows, batch_size=_BATCH, collate_fn=list, num_workers=num_workers):
        yield from batch


class _Decoding(TorchDataset[tuple[int, np.ndarray]]):
    """Rows as stored -> example_id and image."""

    def __init__(self, rows: Dataset, transform: ImageTransform) -> None:
        import datasets

        self.rows = rows.cast_column(transform.column, datasets.Image(decode=False))
        self.transform = transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, places: list[int]) -> list[tuple[int, np.ndarray]]:
        batch = self.rows[places]
        ids, files = batch[EXAMPLE_ID], batch[self.transform.column]
        return list(zip(ids, self.transform.stills(files, ids), strict=True))


def _bytes(prepared: Dataset, transform: ImageTransform) -> int:
    channels, still = transform.size[0], transform.still
    if not isinstance(still, Shrunk):
        return len(prepared) * int(np.prod(still.shape or 0))
    from PIL import Image

    places = np.unique(np.linspace(0, len(prepared) - 1, _LOOKED_AT).astype(int))
    sizes = []
    for file in prepared.with_format(None)[places.tolist()][transform.column]:
        try:
            with Image.open(BytesIO(file["bytes"]) if file["bytes"] is not None else file["path"]) as image:
                sizes.append(math.prod(still.size_of(*image.size)))
        except (OSError, SyntaxError, ValueError, TypeError):  # decoding it will name the row
            continue
    return round(len(prepared) * channels * float(np.mean(sizes) if sizes else 0))


def store_name(key: StoreKey) -> str:
    """What the folder of a store is called where nobody names one."""
    return f"{key.rows[:12]}-{hashlib.sha256(key.done.encode()).hexdigest()[:12]}-{key.channels}"
