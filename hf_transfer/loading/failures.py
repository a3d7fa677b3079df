"""Why a model did not load, in one sentence: missing, gated, offline, unreachable or corrupt; and what to do."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import TransferError


@contextmanager
def explained(name: str, suggestion: str = "") -> Iterator[None]:
    """Turns what huggingface_hub, transformers, safetensors and torch raise while loading `name` into a TransferError.

    Args:
        name: Hub id or folder being loaded.
        suggestion: Appended where the name itself may be wrong, such as names near to it.
    """
    try:
        yield
    except TransferError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, pickle.UnpicklingError) as error:
        raise TransferError(_explanation(error, name, suggestion)) from error
    except Exception as error:
        if (
            type(error).__name__ != "SafetensorError"
        ):  # its class lies in a compiled module, and derives from Exception
            raise
        raise TransferError(_explanation(error, name, suggestion)) from error


def missing_folder(name: str) -> TransferError:
    """The error for a path at which nothing lies, or a file."""
    path = Path(name)
    if path.is_file():
        return TransferError(f"{name!r} is a file. Pass the folder that holds config.json and the weights.")
    near = next((parent for parent in path.absolute().parents if parent.is_dir()), Path("/"))
    found = sorted(child.name for child in near.iterdir() if child.is_dir())[:10]
    return TransferError(
        f"There is no folder {name!r}. {near} is the part of it that exists, with "
        f"{'folders ' + ', '.join(found) if found else 'no folder in it'}. Correct the path, or pass a Hub id."
    )


def is_path(name: str) -> bool:
    """Whether a name can only be meant as a path: a Hub id has at most one slash and starts with a letter or digit."""
    return name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name or Path(name).is_absolute()


def _explanation(error: BaseException, name: str, suggestion: str) -> str:
    chain = list(_chain(error))
    local = Path(name).is_dir()
    explanation = None if local else _of_the_hub(chain, name, suggestion)
    explanation = explanation or _of_the_files(chain, name, local)
    return explanation or f"{name!r} did not load: {_first_line(error)}{suggestion}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _of_the_hub(chain: list[BaseException], name: str, suggestion: str) -> str | None:
    """What the Hub answered, or that it did not."""
    from huggingface_hub import constants, errors

    status = next((e.response.status_code for e in chain if isinstance(e, errors.HfHubHTTPError)), None)
    found = {kind for error in chain for kind in type(error).__mro__}
    where = f"{constants.ENDPOINT}/{name}"
    if errors.GatedRepoError in found or status == 403:
        return (
            f"{name!r} is gated: you may not read it (yet). Accept its terms at {where}, then log in with "
            "`hf auth login` or pass token=."
        )
    if errors.RevisionNotFoundError in found:
        return (
            f"{name!r} has no such revision on the Hub. {where}/commits lists its own; without revision= it is main."
        )
    if errors.RepositoryNotFoundError in found or status in (401, 404):
        return (
            f"{name!r} is neither a folder here nor a model on the Hub that you may read. Check the spelling at "
            f"{where}; if it is private, log in with `hf auth login` or pass token=.{suggestion}"
        )
    if errors.HFValidationError in found:
        return f"{name!r} is neither a folder here nor a valid Hub id (`owner/name`).{suggestion}"
    if errors.OfflineModeIsEnabled in found or (errors.LocalEntryNotFoundError in found and constants.HF_HUB_OFFLINE):
        return (
            f"{name!r} is not in the local cache, and HF_HUB_OFFLINE=1 forbids asking the Hub. Unset it, or run "
            f"`hf download {name}` where there is a network; pretrained=False needs no weights.{suggestion}"
        )
    # errors.HTTPError is that of the HTTP library in use: no answer came, or huggingface_hub would have raised its own
    if {errors.LocalEntryNotFoundError, ConnectionError, errors.HTTPError} & found:
        return (
            f"{name!r} is not in the local cache, and the Hub at {constants.ENDPOINT} cannot be reached "
            f"({_first_line(chain[-1])}). Check the network or HF_ENDPOINT, or pass a local folder.{suggestion}"
        )
    return None


def _of_the_files(chain: list[BaseException], name: str, local: bool) -> str | None:
    """What is wrong with the files themselves."""
    again = "Copy it again" if local else "Fetch it again with force_download=True"
    for error in chain:
        text = str(error)
        broken = isinstance(error, (json.JSONDecodeError, UnicodeDecodeError, pickle.UnpicklingError, EOFError))
        broken = broken or type(error).__name__ == "SafetensorError" or "not a valid JSON file" in text
        if broken or "PytorchStreamReader" in text or "failed finding central directory" in text:
            return f"A file of {name!r} is corrupt or cut short ({_first_line(error)}). {again}."
        if "Error no file named" in text or "does not appear to have a file named" in text:
            return f"{name!r} holds no weights: {_first_line(error)} Pass pretrained=False for random ones."
    return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
