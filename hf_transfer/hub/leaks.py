"""What of this machine must not reach a card or the Hub: paths. Names of models and data without them."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

_COMMON_ROOTS = (
    *("home", "Users", "Volumes", "root", "tmp", "var", "private", "opt", "srv", "mnt", "media", "data", "scratch"),
    *("work", "workspace", "workspaces", "content", "kaggle", "gpfs", "lustre", "dbfs"),
)
_IN_A_NAME = r"[^\s/\"'`<>|,;:)\]}\\]"
_WINDOWS_PATH = r"(?<!\w)[A-Za-z]:\\{1,2}[^\s\"'`<>|]+"


def _path_pattern() -> re.Pattern[str]:
    here = (str(Path.home()), os.getcwd(), tempfile.gettempdir())
    roots = {*_COMMON_ROOTS, *(part for place in here for part in Path(place).parts[1:2])}
    start = rf"(?:file://)?(?:~|/(?:{'|'.join(map(re.escape, sorted(roots)))}))"
    posix = rf"(?<![\w.:/-]){start}(?:/{_IN_A_NAME}+)+/?"
    return re.compile(f"{posix}|{_WINDOWS_PATH}")


def local_paths(text: str) -> list[str]:
    """The absolute paths of this or another machine in a text (`/home/...`, `~/...`, `C:\\...`), in order.

    Args:
        text: Any text. Addresses (`https://...`) and relative paths do not count.
    """
    return list(dict.fromkeys(_path_pattern().findall(text)))


def without_paths(text: str) -> str:
    """The text with every absolute path cut to its last part: `/home/me/models/resnet` becomes `resnet`."""
    return _path_pattern().sub(lambda match: re.split(r"[\\/]", match.group().rstrip("\\/"))[-1], text)


def without_paths_in(value: Any) -> Any:
    """What JSON can hold, with `without_paths` of every text in it.

    Args:
        value: Dicts and lists of texts, numbers and None.
    """
    if isinstance(value, dict):
        return {key: without_paths_in(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths_in(item) for item in value]
    return without_paths(value) if isinstance(value, str) else value


def hub_id(name: str | None) -> str | None:
    """The Hub repository that a name of a model or data set stands for, or None.

    Args:
        name: As the user gave it: a Hub id, `hf-hub:user/name`, a path, a bare timm name.

    Returns:
        `user/name`; None for a path that exists or looks like one, a bare name and `torchvision/...`.
    """
    if name is None:
        return None
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    name = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    if name.count("/") != 1 or name[0] in ".~" or name.startswith("torchvision/") or Path(name).exists():
        return None
    return name


def shown_name(name: str) -> str:
    """A model's or data set's name as a card may show it: a Hub id or bare name whole, of a path the last part."""
    local = name.removeprefix("local-dir:")
    return hub_id(local) or re.split(r"[\\/]", local.rstrip("\\/"))[-1] or "local"
