"""push(): a folder that holds a model becomes, or updates, a repository of the Hub."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TransferError
from .leaks import local_paths, without_paths, without_paths_in
from .usage import THIS_MODEL

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

logger = logging.getLogger(__name__)

# What training needs and a user of the model does not: states of optimizer and random numbers, arguments, logs.
NOT_PUSHED = (
    "checkpoint-*",
    "runs",
    "training_args.bin",
    "trainer_state.json",
    "optimizer*",
    "scheduler*.pt",
    "scaler.pt",
    "rng_state*",
    "events.out.tfevents.*",
    "*.partial",
    "*.lock",
    "__pycache__",
    ".git",
    ".cache",
)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "adapter_model.bin")


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Uploads a folder that holds a model and its card to the Hub, in one commit.

    Optimizer and random state, training arguments and checkpoints stay here. The repository and the branch are created
    where they do not exist. As uploaded, the card names the repository in place of `<this model>`, and of local paths
    in card and JSON files only the last part is left.

    Args:
        folder: A saved model or adapter with README.md.
        repo_id: `user/name`, or `name` for the account that the token belongs to.
        private: Whether a new repository is private; the account's default if None. Does not change an existing one.
        token: A token that may write; the stored login (or HF_TOKEN) if None.
        revision: The branch; `main` if None.
        commit_message: The commit's first line.

    Returns:
        The address of the commit.

    Raises:
        TransferError: No model or card in the folder, an adapter whose base is local, an invalid id, no token or one
            that may not write, or another refusal by the Hub.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    folder = Path(folder)
    _check_folder(folder)
    _check_target(repo_id, token)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="hf_transfer-push-") as staged:
            _stage(folder, Path(staged), repo_id)
            commit = api.upload_folder(
                folder_path=staged,
                repo_id=repo_id,
                revision=revision,
                commit_message=commit_message or "Upload model with hf-transfer-learning",
            )
    except HfHubHTTPError as error:
        raise TransferError(_explain(error, repo_id, api.endpoint)) from error
    except OfflineModeIsEnabled as error:
        raise TransferError(f"Cannot push {folder}: offline mode is on. Unset HF_HUB_OFFLINE.") from error
    logger.info("Pushed %s to %s", folder, commit.commit_url)
    return str(commit.commit_url)


def check_push(repo_id: str, *, token: str | None, model: Any) -> None:
    """Raises TransferError where pushing a model would fail for what is known before it is trained.

    Args:
        repo_id: As for `push`.
        token: As for `push`.
        model: What will be saved and pushed: a model, or a PeftModel, whose base must be one that others can load.
    """
    from huggingface_hub import constants

    from ..adapters import is_adapted

    if constants.HF_HUB_OFFLINE:
        raise TransferError(f"Cannot push to {repo_id}: offline mode is on. Unset HF_HUB_OFFLINE.")
    _check_target(repo_id, token)
    if is_adapted(model):
        base = model.peft_config[model.active_adapter].base_model_name_or_path or model.get_base_model().name_or_path
        _check_base("This adapter", base)


def _check_target(repo_id: str, token: str | None) -> None:
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise TransferError(f"{repo_id!r} is not a repository id such as 'user/name': {error}") from error
    if token is None and get_token() is None:
        raise TransferError("No token for the Hub. Run `hf auth login`, set HF_TOKEN, or pass token=.")


def _check_folder(folder: Path) -> None:
    """Raises TransferError unless the folder can be pushed as it is."""
    from huggingface_hub import ModelCard

    if not folder.is_dir():
        raise TransferError(f"No folder {folder} to push.")
    configured = [name for name in ("adapter_config.json", "config.json") if (folder / name).is_file()]
    if not configured or not any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        raise TransferError(
            f"{folder} holds no model: it needs config.json with model.safetensors, or adapter_config.json with "
            f"adapter_model.safetensors. It has {', '.join(sorted(p.name for p in folder.iterdir())) or 'nothing'}."
        )
    if configured[0] == "adapter_config.json":
        _check_adapter_base(folder)
    card = folder / "README.md"
    if not card.is_file() or not ModelCard.load(card, ignore_metadata_errors=True).data.to_dict():
        raise TransferError(
            f"{folder} has no card: README.md with metadata. Write it with hf_transfer.hub.card.write_card."
        )


def _check_adapter_base(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    _check_base(f"The adapter in {folder}", config.get("base_model_name_or_path"))


def _check_base(adapter: str, base: str | None) -> None:
    if not base or local_paths(base) or base.startswith((".", "~")) or Path(base).exists():
        raise TransferError(
            f"{adapter} is of the local model {base!r}, which nobody else can load. Push the base "
            "first, and name its Hub id as base_model_name_or_path in adapter_config.json; or push the merged model "
            "(hf_transfer.merge)."
        )


def _files(folder: Path) -> list[Path]:
    """The files that are pushed, in order."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(fnmatch(part, pattern) for part in path.relative_to(folder).parts for pattern in NOT_PUSHED)
    ]


def _stage(folder: Path, staged: Path, repo_id: str) -> None:
    """Puts what is pushed into an empty folder: links to the files, and rewritten what is published otherwise."""
    for path in _files(folder):
        target = staged / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = _published_text(path, repo_id)
        if text is not None:
            target.write_text(text, encoding="utf-8")
        else:
            _link(path, target)


def _published_text(path: Path, repo_id: str) -> str | None:
    """A text file as it is published, or None where that is how it is."""
    if path.suffix not in (".json", ".md", ".yaml", ".yml") or path.name in ("tokenizer.json", "vocab.json"):
        return None
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        content = json.loads(text)
        public = without_paths_in(content)
        published = text if public == content else json.dumps(public, indent=2) + "\n"
    else:
        published = without_paths(text.replace(THIS_MODEL, repo_id))
    if published == text:
        return None
    logger.info("Local paths and placeholders in %s are replaced in what is pushed.", path.name)
    return published


def _link(path: Path, target: Path) -> None:
    try:
        os.symlink(path.resolve(), target)
    except OSError:  # Windows without developer mode
        shutil.copyfile(path, target)


def _explain(error: HfHubHTTPError, repo_id: str, endpoint: str) -> str:
    """One sentence on what the Hub refused and what to do."""
    status = error.response.status_code if error.response is not None else None
    if status == 401:
        return f"{endpoint} does not accept the token (401). Log in with `hf auth login`, or pass a valid token=."
    if status == 403:
        return (
            f"The token may not write to {repo_id} (403). Use a token with write permission (huggingface.co/settings/"
            "tokens), and an account or organisation that you may write to."
        )
    return f"{endpoint} refused to take {repo_id} ({status}): {error.server_message or error}"
