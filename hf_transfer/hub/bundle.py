"""Saves a model and its processor as an ordinary checkpoint, which loads without this package.

A full model loads by `AutoModelFor*.from_pretrained(folder)` and, where it is timm's, by
`timm.create_model("local-dir:FOLDER", pretrained=True)`; torchvision's needs `trust_remote_code=True`.

An adapter loads by peft on its base, or in one line with its label names:

    config = AutoConfig.from_pretrained(folder, subfolder="model_config")
    AutoModelFor*.from_pretrained(folder, config=config, ignore_mismatched_sizes=True)

Beside the adapter's own weights its file holds whatever else the base's checkpoint does not give: a new head, buffers
(BatchNorm statistics move in training), parameters that train by themselves, and layers rebuilt for other images. peft
and transformers load these by their names. No config.json lies beside the adapter: transformers would take the folder
for a full model.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import TransferError
from ..loading.adapters import CONFIG_FOLDER
from .staging import staged

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# What an earlier save may have left: a shard, pickle or adapter beside new weights would be loaded in their place.
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    f"{CONFIG_FOLDER}/config.json",
)
# What makes a model another one, beside its labels. These are transformers' names; configurations may have others.
_IDENTITY = (
    "model_type",
    "architectures",  # the class, and with it the task
    "architecture",  # timm's and torchvision's
    "hidden_size",
    "num_hidden_layers",
    "hidden_sizes",
    "depths",
    "vocab_size",
)
_WAYS_OUT = (
    "Choose another folder (output_dir=, or --output_dir on the command line), delete that one, or, where you save it "
    "yourself, pass overwrite=True."
)


def save(
    model: Any,
    folder: str | os.PathLike[str],
    processor: Any = None,
    *,
    overwrite: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Saves a model, whole or not at all.

    Args:
        model: A model of transformers (timm's and torchvision's networks come as such from `load_backbone`), or a
            PeftModel of one; wrapped for parallel training or compiled, too.
        folder: Where to. Files of other names stay.
        processor: Tokenizer, image processor or feature extractor to save beside it.
        overwrite: Whether to replace a model of another architecture, other labels or another kind there.
        state_dict: The model's weights, where it holds parts of them only (FSDP).

    Returns:
        The folder.

    Raises:
        TransferError: Another model is there, the disk is full, or the model is none of those kinds.
    """
    from peft import PeftModel

    model = _unwrapped(model)
    if not overwrite:
        check_output_folder(folder, model)
    with staged(folder, _MODEL_FILES) as staging:
        if isinstance(model, PeftModel):
            _write_adapter(model, staging, model.state_dict() if state_dict is None else state_dict)
        else:
            _write_model(model, staging, state_dict)
        if processor is not None:
            _write_processor(processor, staging)
    return Path(folder)


def check_output_folder(folder: str | os.PathLike[str], model: Any) -> None:
    """Raises TransferError where saving the model would replace another one; call it before any work.

    Another model is one of a different class, architecture or size, with different labels, or an adapter where this is
    a full model and the reverse. A folder without a model, or none at all, is fine.
    """
    from peft import PeftModel

    folder = Path(folder).expanduser()
    if folder.is_file():
        raise TransferError(
            f"The output folder {str(folder)!r} is a file. Choose another (output_dir=, or --output_dir on the command"
            " line)."
        )
    model = _unwrapped(model)
    adapter = (folder / "adapter_config.json").is_file()
    path = folder / (f"{CONFIG_FOLDER}/config.json" if adapter else "config.json")
    if not adapter and not path.is_file():
        return
    there = _read(path) if path.is_file() else {}
    mine, names = _config_of(model), type(_plain(model).config).attribute_map
    reasons = []
    if adapter != isinstance(model, PeftModel):
        reasons.append(f"it is {'an adapter' if adapter else 'a full model'}")
    keys = [names.get(key, key) for key in _IDENTITY]
    reasons.extend(
        f"its {key} is {_short(there[key])}" for key in keys if there.get(key, mine.get(key)) != mine.get(key)
    )
    if there and _label_names(there) != _label_names(mine):
        reasons.append(f"its labels are {_short(_label_names(there))}")
    if reasons:
        raise TransferError(
            f"The output folder {str(folder)!r} holds another model: {'; '.join(reasons)}. {_WAYS_OUT}"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TransferError(
            f"{path} in the output folder is corrupt ({error}): what model it holds cannot be told. {_WAYS_OUT}"
        ) from error


def _config_of(model: Any) -> dict[str, Any]:
    config = {**_plain(model).config.to_dict(), "architectures": [type(_plain(model)).__name__]}  # as when it is saved
    return json.loads(json.dumps(config, default=str))


def _label_names(config: dict[str, Any]) -> list[str]:
    names = config.get("label_names")
    by_id = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # transformers does not save its default
    return list(names) if names else [by_id[key] for key in sorted(by_id, key=int)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:76]} ..."


def _unwrapped(model: Any) -> Any:
    from accelerate.utils import extract_model_from_parallel
    from peft import PeftModel
    from transformers import PreTrainedModel

    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if not isinstance(_plain(model), PreTrainedModel):
        raise TransferError(
            f"A {type(model).__name__} cannot be saved here: pass a model of transformers or a PeftModel of one. "
            "load_backbone() gives timm's and torchvision's networks as such."
        )
    return model if isinstance(model, (PeftModel, PreTrainedModel)) else _plain(model)


def _plain(model: Any) -> Any:
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


# ---- full models ----------------------------------------------------------------------------------------------------


def _write_model(model: PreTrainedModel, folder: Path, state_dict: Mapping[str, torch.Tensor] | None) -> None:
    if model.config.model_type != "timm_wrapper":
        model.save_pretrained(folder, state_dict=cast(Any, state_dict))
        return
    from ..loading.timm_models import PREFIX

    weights: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, weight in (model.state_dict() if state_dict is None else state_dict).items():
        place = (weight.data_ptr(), weight.shape)
        # Some families hold one layer by several names, and timm wants them all; safetensors refuses shared memory.
        weights[name.removeprefix(PREFIX)] = weight.clone() if place in seen else weight
        seen.add(place)
    model.save_pretrained(folder, state_dict=weights)
    _write_config(model, folder)


def _write_config(model: PreTrainedModel, folder: Path) -> None:
    """Writes config.json so that both libraries read it, where the model is timm's."""
    if model.config.model_type == "timm_wrapper":
        _repair_timm_config(model)
    model.config.architectures = [type(model).__name__]  # an adapter's base may come from a checkpoint of another
    model.config.save_pretrained(folder)


def _repair_timm_config(model: Any) -> None:
    """Makes the configuration of a wrapped timm model one that timm reads too.

    transformers writes `model_args: null`, which timm trips over, and keeps `label_names` of the model before. Needed
    until timm reads null as empty, and TimmWrapperConfig.to_dict assigns label_names rather than sets their default.
    """
    from ..loading.timm_models import describe_images

    config = model.config
    config.model_args = {key: value for key, value in (config.model_args or {}).items() if key != "num_classes"}
    config.label_names = list(config.id2label.values())
    describe_images(model)


# ---- adapters -------------------------------------------------------------------------------------------------------


def _write_adapter(model: Any, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import load_file, save_file

    name = model.active_adapter
    text = getattr(model.config, "vocab_size", None) is not None
    # "auto" asks the Hub whether the vocabulary has grown since; without a vocabulary there is nothing to ask
    model.save_pretrained(
        folder, selected_adapters=[name], save_embedding_layers="auto" if text else False, state_dict=state
    )
    (folder / "README.md").unlink(missing_ok=True)  # peft's card names the base by its local path; ours is of its own
    if name != "default":
        for path in list((folder / name).iterdir()):
            path.replace(folder / path.name)
        (folder / name).rmdir()
    weights = load_file(folder / "adapter_model.safetensors")
    extra = {key: value for key, value in _beyond_adapter(model, name, state).items() if key not in weights}
    save_file({**weights, **extra}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _name_base(folder / "adapter_config.json", model)
    _write_config(model.get_base_model(), folder / CONFIG_FOLDER)


def _beyond_adapter(model: Any, adapter: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the adapter's base does not give and peft does not save, by the names that peft and transformers load."""
    fresh = set(getattr(model.get_base_model(), "fresh_parameters", ()))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    buffers = {name for name, _ in model.named_buffers()}
    extra = {}
    for name, value in state.items():
        parts = name.split(".")
        if adapter in parts or "original_module" in parts:
            continue  # peft's own, or the copy that the trained one replaces
        plain = name.removeprefix("base_model.").removeprefix("model.").replace(".base_layer.", ".")
        if name in trained or name in buffers or plain in fresh:
            extra[name] = value.detach().cpu().clone().contiguous()  # clone: tied tensors share memory
    return extra


def _name_base(path: Path, model: Any) -> None:
    """Makes sure that the saved adapter says where its base is: an absolute path, or a Hub id.

    A folder stays a path, so that the adapter loads again here; `scrub_local_paths` is for what leaves the machine.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path") or model.get_base_model().name_or_path
    if not base:
        logger.warning(
            "The base of this adapter has no name, so that the adapter cannot be loaded by itself. Save the base, "
            "load it from there, and adapt that; or merge the adapter into it."
        )
    elif Path(base).expanduser().is_dir():
        base = str(Path(base).expanduser().resolve())
    config["base_model_name_or_path"] = base or None
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ---- processors -----------------------------------------------------------------------------------------------------


def _write_processor(processor: Any, folder: Path) -> None:
    """Saves a processor. timm's has no file of its own: it is made from the configuration."""
    from transformers import TimmWrapperImageProcessor

    if not isinstance(processor, TimmWrapperImageProcessor):
        processor.save_pretrained(folder)
    elif (folder / CONFIG_FOLDER).is_dir():
        # An adapter folder has no config.json for AutoImageProcessor to read; it reads this file before.
        config = json.loads((folder / CONFIG_FOLDER / "config.json").read_text(encoding="utf-8"))
        nested = {
            "image_processor_type": type(processor).__name__,
            "architecture": config["architecture"],
            "pretrained_cfg": config["pretrained_cfg"],
        }
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": nested}, indent=2) + "\n")
