"""What a cache is of, and what it is called."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from ..errors import TransferError

_VERSION = 2  # of the files; those of another are written anew


class IncompleteCache(TransferError):
    """A cache that an interrupted run left, or of which a file is gone."""


@dataclass(frozen=True)
class Kind:
    """A kind of cache, in the words of its errors.

    Attributes:
        name: What it is called, for example "teacher cache".
        source: What its values were computed by, for example "teacher".
        instead: What to do without it.
    """

    name: str
    source: str
    instead: str

    @property
    def format(self) -> str:
        """By which its files are known."""
        return f"hf_transfer {self.name} {_VERSION}"


@dataclass(frozen=True)
class CacheKey:
    """What a cache holds the values of. All four must be those of the run that reads it.

    Attributes:
        source: A fingerprint of what computed them: a teacher, or the layers below a cut.
        data: `signature.data_signature()` of the rows.
        transform: `signature.transform_signature()` of the rows.
        views: Number of augmented views of each row, >= 1: view v is what the row is in epoch v.

    Raises:
        TransferError: If there is no view.
    """

    source: str
    data: str
    transform: str
    views: int = 1

    def __post_init__(self) -> None:
        if self.views < 1:
            raise TransferError(f"views={self.views}: a cache holds at least 1 view of each row.")

    def check(self, other: CacheKey, folder: Path, kind: Kind) -> None:
        """Refuses a cache of another key.

        Args:
            other: The key of the cache that is there.
            folder: Where it is.
            kind: What is asked for.

        Raises:
            TransferError: Naming what differs.
        """
        differ = {
            kind.source if f.name == "source" else f.name: (getattr(other, f.name), getattr(self, f.name))
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        }
        if differ:
            lines = "".join(f"\n  {name}: the cache's {there}, now {here}" for name, (there, here) in differ.items())
            raise TransferError(
                f"The {kind.name} in {str(folder)!r} is of another {', '.join(differ)}:{lines}\nWhat it holds would "
                "be wrong here. Choose another folder, or delete this one."
            )
