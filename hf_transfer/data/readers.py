"""Where data comes from: the Hub, folders, files, scikit-learn's digits. Each reader gives splits by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TransferError

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
_SPLIT = "(train|training|validation|valid|val|dev|test)"
_SPLIT_FOLDER = re.compile(_SPLIT, re.IGNORECASE)
_SPLIT_FILE = re.compile(_SPLIT + r"([-_.]\d.*)?", re.IGNORECASE)  # train, train-00000-of-00002
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.+-]+)?")
_DIGITS_TEST_ROWS = 360


def read(source: Any) -> tuple[str, Mapping[str, Dataset]]:
    """Opens a source of data.

    Args:
        source: See `sources.load_data`.

    Returns:
        A name for it, without local paths, and its splits.

    Raises:
        TransferError: If there is no such source, or it cannot be read.
    """
    from datasets import Dataset

    if isinstance(source, Dataset):
        return source.info.dataset_name or "dataset", {"train": source}
    if isinstance(source, Mapping):
        return next((d.info.dataset_name for d in source.values() if d.info.dataset_name), "dataset"), source
    if not isinstance(source, (str, Path)):
        raise TransferError(
            f"Data cannot be a {type(source).__name__}: pass a Hub id, a folder, a file, 'digits', a datasets.Dataset "
            "or a mapping of splits."
        )
    if source == "digits":
        return "digits", digits()
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve().name, _folder(path)
    if path.is_file():
        return path.stem, {"train": _file(path)}
    return str(source), _hub(str(source))


def digits() -> dict[str, Dataset]:
    """scikit-learn's 1,797 handwritten digits as 8 x 8 grey images, without network.

    The rows are ordered by writer: test is the last 360, so that it holds other hands than train.
    """
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    pixels = (bunch.images * (255 / 16)).round().astype(np.uint8)  # (1797, 8, 8), 16 is black ink

    def rows(part: slice) -> Dataset:
        columns = {"image": list(pixels[part]), "label": bunch.target[part].tolist()}
        return Dataset.from_dict(columns, features=features)

    return {"train": rows(slice(-_DIGITS_TEST_ROWS)), "test": rows(slice(-_DIGITS_TEST_ROWS, None))}


def images_by_class(folder: Path) -> dict[str, Dataset]:
    """Images whose folder is their class: `class/*.png`, or `train|validation|test/class/*.png`.

    datasets' own "imagefolder" gives null labels to a split that holds one class only.

    Returns:
        Splits whose classes are the folders' names, sorted over all splits; nothing if there are no images.
    """
    from datasets import ClassLabel, Dataset, Features, Image

    roots = {path.name.lower(): path for path in _subfolders(folder) if _SPLIT_FOLDER.fullmatch(path.name)}
    roots = roots or {"train": folder}
    classes = sorted({place.name for root in roots.values() for place in _subfolders(root)})
    features = Features({"image": Image(), "label": ClassLabel(names=classes)})
    splits = {}
    for split, root in roots.items():
        files = [
            (str(path.resolve()), label)
            for label, name in enumerate(classes)
            for path in sorted((root / name).rglob("*"))
            if path.suffix.lower() in _IMAGES and not path.name.startswith(".")
        ]
        if files:
            paths, labels = zip(*files, strict=True)
            splits[split] = Dataset.from_dict({"image": paths, "label": labels}, features=features)
    return splits


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _folder(folder: Path) -> dict[str, Dataset]:
    files: dict[str, list[Path]] = {}
    for path in sorted([*folder.glob("*.*"), *folder.glob("data/*.*")]):
        named = _SPLIT_FILE.fullmatch(path.stem)
        if path.suffix.lower() in FORMATS and named:
            files.setdefault(named[1].lower(), []).append(path)
    if files:
        return {split: _file(*paths) for split, paths in files.items()}
    if images := images_by_class(folder):
        return images
    seen = sorted(path.name for path in folder.iterdir())[:10]
    raise TransferError(
        f"No data in the folder {str(folder)!r}, which holds {', '.join(seen) or 'nothing'}. A folder has "
        "train.parquet (or .csv, .json, .jsonl; also validation and test), or images in one folder a class. A single "
        "file of another name is passed by its own path."
    )


def _file(*paths: Path) -> Dataset:
    kinds = {FORMATS.get(path.suffix.lower(), "") for path in paths}
    if len(kinds) > 1 or "" in kinds:
        raise TransferError(
            f"Data files {', '.join(path.name for path in paths)}: a split is of one format, among "
            f"{', '.join(FORMATS)}."
        )
    return _load(kinds.pop(), str(paths[0]), data_files=[str(path) for path in paths])["train"]


def _hub(source: str) -> dict[str, Dataset]:
    if not _HUB_ID.fullmatch(source) or Path(source).suffix.lower() in FORMATS:
        raise TransferError(
            f"No file or folder {source!r}, and it is no Hub id (`name`, `owner/name` or `owner/name:config`)."
        )
    name, _, config = source.partition(":")
    return _load(name, source, name=config or None)


def _load(builder: str, source: str, **arguments: Any) -> dict[str, Dataset]:
    """datasets.load_dataset, with one error for all that can go wrong."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        return load_dataset(builder, **arguments)
    except DatasetNotFoundError as error:
        raise TransferError(
            f"No data set {source!r}: it is neither a local path nor a data set of the Hub that you may read "
            f"({error}). Check the spelling; for a private or gated one accept its terms on its page and log in "
            "(`hf auth login`)."
        ) from error
    except ConnectionError as error:
        raise TransferError(
            f"Data set {source!r} is not in the local cache, and the Hub cannot be reached ({error}). Connect, unset "
            "HF_HUB_OFFLINE, or pass a local folder."
        ) from error
    except (DatasetsError, ValueError, OSError, RuntimeError) as error:
        if "Dataset scripts are no longer supported" in str(error):
            raise TransferError(
                f"Data set {source!r} is a script, and datasets no longer runs any. Pass a copy without one; or the "
                "parquet files that the Hub has made of most, by datasets.load_dataset("
                f"{builder!r}, revision='refs/convert/parquet', data_dir='the configuration'). For the command line, "
                "save its splits as train.parquet, ... in a folder."
            ) from error
        cause = error.__cause__ or error
        raise TransferError(f"Data set {source!r} cannot be read: {type(cause).__name__}: {cause}") from error
