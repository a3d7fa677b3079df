"""Adapters: the base they were trained on, rebuilt with the adapter's labels and image size, and the adapter on it."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TransferError
from .heads import follow_names, label_names, write_names
from .image_sizes import image_shape
from .repository import find_file, read_json
from .request import Request
from .transformers_models import resolve_task

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

CONFIG_FOLDER = "model_config"  # subfolder of an adapter folder that holds the configuration of base and head


def load(request: Request, load_base: Callable[[Request], Any]) -> tuple[PeftModel, Any]:
    """Loads an adapter folder or repository.

    Args:
        request: What was asked for; labels, task and image size that it leaves open are those saved with the adapter.
        load_base: Loads the base's backbone from a request.

    Returns:
        The adapter on its base, ready to train on, and the base's backbone.

    Raises:
        TransferError: The base is not named or not found, or does not fit the adapter.
    """
    from peft import PeftModel

    if not request.pretrained:
        raise TransferError(
            f"{request.name!r} is an adapter; pretrained=False would leave nothing of it. Load its base."
        )
    base = load_base(_base_request(request))
    try:
        with warnings.catch_warnings():
            # peft 0.21 asks transformers >= 5.20 by a name that it renames; goes when PeftModel.__init__ asks for
            # `is_activation_checkpointing`.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            model = PeftModel.from_pretrained(
                base.model,
                str(request.folder or request.name),
                is_trainable=True,
                ignore_mismatched_sizes=request.labels is not None,
                **request.hub_options,
            )
    except RuntimeError as error:
        raise TransferError(
            f"The adapter {request.name!r} does not fit its base {base.name!r}: {str(error).strip()}. "
            "Give the labels= it was trained with, or correct base_model_name_or_path in adapter_config.json."
        ) from error
    if request.label_names is not None:
        write_names(base.model.config, request.label_names)
    follow_names(model, base.labels)
    return model, base


def _base_request(request: Request) -> Request:
    """The request for the base: its name, and the saved labels, task and image size where none were asked for.

    The base also has the saved labels where as many were asked for: so are the rows of the adapter's head ordered.
    """
    name = _base_name(request)
    options = {key: value for key, value in request.options.items() if key not in ("revision", "subfolder")}
    wanted = replace(request, name=name, options=options)
    config = _saved_config(request)
    if config is None:
        return wanted if request.labels is not None else replace(wanted, labels=_outputs_of_weights(request))
    task, modality = resolve_task(config, request)
    names = label_names(config)
    if task != "causal-lm" and request.labels is None:
        wanted = replace(wanted, labels=tuple(names) if names else config.num_labels)
    elif names and request.label_names and len(names) == len(request.label_names):
        wanted = replace(wanted, labels=tuple(names))
    if modality == "image":
        channels, size = image_shape(config)
        wanted = replace(wanted, image_size=request.image_size or size, in_chans=request.in_chans or channels)
    return replace(wanted, task=task)


def _base_name(request: Request) -> str:
    """Name or folder of the base, from adapter_config.json; a relative folder may be relative to the adapter's."""
    path = find_file(request, "adapter_config.json")
    if path is None:
        raise TransferError(f"{request.name!r} holds no model: neither config.json nor adapter_config.json.")
    name = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not name:
        raise TransferError(
            f"The adapter {request.name!r} does not name its base. Write the base's Hub id or folder into "
            "base_model_name_or_path of its adapter_config.json."
        )
    beside = path.parent / name
    if not Path(name).is_dir() and beside.is_dir():
        return str(beside)
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise TransferError(
            f"The base of the adapter {request.name!r} was in {name!r}, where it is no longer. Put it back, or write "
            f"where it is now into base_model_name_or_path of {path}."
        )
    return os.fspath(name)


def _saved_config(request: Request) -> Any:
    """The configuration that we save with an adapter; None for adapters that peft saved by itself."""
    from transformers import AutoConfig

    if read_json(request, f"{CONFIG_FOLDER}/config.json") is None:
        return None
    path = find_file(request, f"{CONFIG_FOLDER}/config.json")
    return AutoConfig.from_pretrained(str(path.parent)) if path else None


def _outputs_of_weights(request: Request) -> int | None:
    """Number of outputs of the head that peft saved in full beside the adapter; None where it saved none."""
    from safetensors import safe_open

    path = find_file(request, "adapter_model.safetensors")
    if path is None:
        return None
    with safe_open(path, "pt") as weights:
        heads = [key for key in weights.keys() if key.endswith(_HEADS)]  # noqa: SIM118 (safe_open is no mapping)
        outputs = {weights.get_slice(key).get_shape()[0] for key in heads}
    return outputs.pop() if len(outputs) == 1 else None


# The last layer of the heads of transformers and timm; only needed for adapters that were not saved by us.
_HEADS = tuple(
    f".{name}.weight"
    for name in ("classifier", "score", "head", "fc", "head.fc", "classifier.out_proj", "classification_head.out_proj")
)
