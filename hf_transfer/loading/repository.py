"""Small files of a local folder or a Hub repository, read before anything heavy is loaded."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from ..errors import TransferError
from .request import Request

_OURS = {"torchvision_classifier": "torchvision_models", "bilstm_classifier": "bilstm"}  # model type -> our module
_MARKS = ("config.json", "adapter_config.json")  # one of them lies in every folder that holds a model


def find_file(request: Request, filename: str) -> Path | None:
    """Path of a file of the folder or repository that a request names; None where it has no such file.

    Raises:
        OSError: The Hub cannot be asked, or refuses, as huggingface_hub says it.
    """
    if request.folder is not None:
        path = request.folder / filename
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    try:
        return Path(hf_hub_download(request.name, filename, **request.hub_options))
    except RemoteEntryNotFoundError:
        return None
    except LocalEntryNotFoundError:
        if _is_cached(request):
            return None  # the repository was loaded before, and had no such file to fetch
        raise


def _is_cached(request: Request) -> bool:
    from huggingface_hub import try_to_load_from_cache

    options = {key: value for key, value in request.hub_options.items() if key in ("cache_dir", "revision")}
    return any(isinstance(try_to_load_from_cache(request.name, mark, **options), str) for mark in _MARKS)


def read_json(request: Request, filename: str) -> dict[str, Any] | None:
    """The content of a configuration of the folder or repository; None where it has no such file.

    Raises:
        TransferError: A folder holds neither a model nor an adapter, or the file is not JSON.
    """
    path = find_file(request, filename)
    if path is None:
        if request.folder is not None and not (request.folder / "adapter_config.json").is_file():
            raise _no_model(request.folder)
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    if (ours := _OURS.get(config.get("model_type", ""))) is not None:
        importlib.import_module(f"hf_transfer.{ours}")  # registers its classes, so that no code need be trusted
    return config


def _no_model(folder: Path) -> TransferError:
    inside = sorted(child.name for child in folder.iterdir())
    models = [child for child in inside if any((folder / child / f).is_file() for f in _MARKS)]
    hint = (
        f"These folders in it hold one: {', '.join(models)}."
        if models
        else f"It holds: {', '.join(inside[:10]) or 'nothing'}."
    )
    return TransferError(f"{str(folder)!r} holds no model: neither config.json nor adapter_config.json. {hint}")
