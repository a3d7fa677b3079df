"""What is in the rows of a dataset, as hashes: a digest for each row, and one for all of them whatever their order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import TransferError
from .columns import EXAMPLE_ID, LABELS

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 1000  # rows that are hashed at a time
_SIZE = 16  # bytes of a row's digest
_WHOLE, _BLOCK, _BLOCKS = 1 << 16, 1 << 14, 4  # bytes: files up to _WHOLE are read whole, of others _BLOCKS blocks


@dataclass(frozen=True)
class RowDigests:
    """Digests of rows. Labels do not count: no teacher reads them, and no image changes with them.

    Attributes:
        columns: What of a row was hashed, in order.
        example_ids: (N,) int64.
        digests: (N, 16) uint8.
    """

    columns: tuple[str, ...]
    example_ids: np.ndarray
    digests: np.ndarray

    @classmethod
    def of(cls, rows: Dataset) -> RowDigests:
        """Reads every row of a dataset.

        Of an image or sound that is a file beside the data, and larger than 64 KiB, its size and four blocks of
        16 KiB are read; all else is read whole.

        Raises:
            TransferError: If the rows have no `example_id`.
        """
        if EXAMPLE_ID not in rows.column_names:
            raise TransferError(
                f"A cache is keyed by {EXAMPLE_ID!r}, and the data has no such column; it has "
                f"{', '.join(rows.column_names)}. Prepare it with hf_transfer.data.transforms.prepare()."
            )
        names = sorted(set(rows.column_names) - {EXAMPLE_ID, LABELS})
        ids, digests = [np.empty(0, np.int64)], [b""]
        for table in rows.with_format("arrow").iter(_BATCH):
            ids.append(table[EXAMPLE_ID].to_numpy().astype(np.int64))
            digests += _row_digests([_cells(table[name]) for name in names], len(table))
        flat = np.frombuffer(b"".join(digests), np.uint8)
        return cls(tuple(names), np.concatenate(ids), flat.reshape(-1, _SIZE))

    def select(self, places: Sequence[int] | np.ndarray) -> RowDigests:
        """Those of some rows."""
        chosen = np.asarray(places, dtype=np.int64)
        return RowDigests(self.columns, self.example_ids[chosen], self.digests[chosen])

    def together(self) -> str:
        """One hash of all, whatever their order: 64 hexadecimal digits."""
        whole = hashlib.sha256(json.dumps(self.columns).encode())
        for i in np.argsort(self.example_ids, kind="stable"):
            whole.update(int(self.example_ids[i]).to_bytes(8, "little"))
            whole.update(self.digests[i].tobytes())
        return whole.hexdigest()


def _row_digests(columns: list[list[bytes]], rows: int) -> list[bytes]:
    digests = []
    for i in range(rows):
        digest = hashlib.blake2b(digest_size=_SIZE)
        for cells in columns:
            digest.update(len(cells[i]).to_bytes(8, "little"))  # so that no byte can move to the next column
            digest.update(cells[i])
        digests.append(digest.digest())
    return digests


def _cells(column: Any) -> list[bytes]:
    """A column of an Arrow table, each cell as bytes: those of int32 and int64 token ids are the same."""
    import pyarrow as pa  # type: ignore[import-untyped]

    array = column.combine_chunks()
    is_list = pa.types.is_list(array.type) or pa.types.is_large_list(array.type)
    if is_list and pa.types.is_integer(array.type.value_type) and not array.null_count and len(array):
        values = array.flatten()  # of these rows only, whatever the slice
        if not values.null_count:
            ends = np.cumsum(array.value_lengths().to_numpy(zero_copy_only=False))
            cut = np.split(values.to_numpy(zero_copy_only=False).astype(np.int64), ends[:-1])
            return [part.tobytes() for part in cut]
    return [_content(cell) for cell in array.to_pylist()]


def _content(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:  # an image or a sound
        if value["bytes"] is not None:
            return value["bytes"]
        return b"" if value["path"] is None else _file(Path(value["path"]))
    return json.dumps(value, default=lambda x: x.hex() if isinstance(x, bytes) else str(x)).encode()


def _file(path: Path) -> bytes:
    """Size and blocks of a file; never where this machine keeps it."""
    if not path.is_file():
        return path.name.encode()
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE:
            return file.read()
        blocks = [size.to_bytes(8, "little")]
        for i in range(_BLOCKS):
            file.seek(i * (size - _BLOCK) // (_BLOCKS - 1))
            blocks.append(file.read(_BLOCK))
    return b"".join(blocks)
