"""Backbones of transformers: task, class and new head, and a check that all else came from the checkpoint."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..errors import TransferError
from .heads import follow_names, label_names, set_labels
from .image_sizes import resize_transformers
from .request import Request

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

MODALITIES = {  # task -> modality; regression is of its backbone's own
    "image-classification": "image",
    "text-classification": "text",
    "token-classification": "text",
    "audio-classification": "audio",
    "causal-lm": "text",
}
_AUTO_CLASSES = {  # in the order in which a task is inferred for a body without a head
    "image-classification": ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"),
    "audio-classification": ("AutoModelForAudioClassification", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING"),
    "text-classification": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
    "token-classification": ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING"),
    "causal-lm": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
}


def load(request: Request) -> tuple[PreTrainedModel, str, str]:
    """Loads a transformers model with a head for the task.

    Args:
        request: What was asked for; its name is a folder or Hub id with a configuration of transformers.

    Returns:
        The model, its task, and its modality ("image", "text" or "audio").

    Raises:
        TransferError: The model cannot do the task, an option is unknown, or the checkpoint is not of this network.
    """
    config = _load_config(request)
    task, modality = resolve_task(config, request)
    saved = label_names(config)
    set_labels(config, request, task)
    auto_class = _auto_class(task, modality)
    if request.pretrained:
        model, info = auto_class.from_pretrained(
            request.name,
            config=config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=request.trust_remote_code,
            **request.hub_options,
            **request.loading_options,
        )
        heads = set() if task == "causal-lm" else _head_names(model, info)
        model.fresh_parameters = check_loaded(model, info, heads, request.name)
    else:
        model = auto_class.from_config(config, trust_remote_code=request.trust_remote_code, **request.loading_options)
        model.config._name_or_path = ""  # nothing can be loaded from there that gives these weights
    if modality == "image":
        model = resize_transformers(model, request)
    elif request.image_size is not None or request.in_chans is not None:
        raise TransferError(f"image_size and in_chans do not apply to {request.name!r}: it takes {modality}.")
    if request.pretrained and task != "causal-lm":
        follow_names(model, saved)
    return model, task, modality


def _load_config(request: Request) -> PretrainedConfig:
    from transformers import AutoConfig

    config, unknown = AutoConfig.from_pretrained(
        request.name,
        return_unused_kwargs=True,
        trust_remote_code=request.trust_remote_code,
        **request.hub_options,
        **request.overrides,
    )
    unknown = sorted(set(unknown) & set(request.overrides))
    if unknown:
        known = sorted(key for key in config.to_dict() if not key.startswith("_"))
        raise TransferError(
            f"{', '.join(unknown)}: unknown option of {request.name!r} ({config.model_type}). Its configuration has: "
            f"{', '.join(known)}."
        )
    return config


def _mapping(task: str) -> Any:
    import transformers

    return getattr(transformers, _AUTO_CLASSES[task][1])


def _auto_class(task: str, modality: str) -> Any:
    import transformers

    if task == "regression":
        task = f"{modality}-classification"
    return getattr(transformers, _AUTO_CLASSES[task][0])


def resolve_task(config: PretrainedConfig, request: Request) -> tuple[str, str]:
    """Returns task and modality: as asked for, or as the configuration says; TransferError where it cannot be."""
    able = [task for task in _AUTO_CLASSES if _can(config, task)]
    if not able:
        raise TransferError(
            f"{request.name!r} is a {config.model_type!r} network, which transformers offers for none of: "
            f"{', '.join(_AUTO_CLASSES)}. Use another backbone."
        )
    heads = [task for task in able if task != "causal-lm" and task != "token-classification"]
    task = request.task or _infer_task(config, request, able)
    if task == "regression":
        if not heads:
            raise TransferError(
                f"{request.name!r} ({config.model_type}) has no head for regression; it can do {able}."
            )
        own = _own_task(config, heads) or heads[0]
        return task, MODALITIES[own]
    if task not in able:
        raise TransferError(
            f"{request.name!r} is a {config.model_type!r} network and cannot do task={task!r}. It can do: "
            f"{', '.join([*able, *(['regression'] if heads else [])])}."
        )
    return task, MODALITIES[task]


def _can(config: PretrainedConfig, task: str) -> bool:
    auto_map = getattr(config, "auto_map", None) or {}  # code that comes with the model
    return type(config) in _mapping(task) or _AUTO_CLASSES[task][0] in auto_map


def _infer_task(config: PretrainedConfig, request: Request, able: list[str]) -> str:
    if request.labels == 1 or (request.labels is None and getattr(config, "problem_type", None) == "regression"):
        return "regression"
    if request.labels is not None and able != ["causal-lm"]:
        able = [task for task in able if task != "causal-lm"]  # names of classes ask for a classifier
    return _own_task(config, able) or able[0]


def _own_task(config: PretrainedConfig, able: list[str]) -> str | None:
    """The task of the head that the checkpoint was saved with, among those given."""
    saved = set(config.architectures or ())
    for task in able:
        if type(config) not in _mapping(task):
            continue
        classes = _mapping(task)[type(config)]
        if saved & {each.__name__ for each in (classes if isinstance(classes, tuple) else (classes,))}:
            return task
    return None


def _head_names(model: PreTrainedModel, info: dict[str, Any]) -> set[str]:
    """Names of new tensors that make up the head: outside the body, or with one row an output where it was another."""
    outside = {key for key in _fresh_names(info) if not key.startswith(f"{model.base_model_prefix}.")}
    outputs = model.config.num_labels
    rows = {key for key, old, new in info["mismatched_keys"] if new[0] == outputs and old[1:] == new[1:]}
    return outside | rows


def _fresh_names(info: dict[str, Any]) -> set[str]:
    return set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}


def check_loaded(model: PreTrainedModel, info: dict[str, Any], heads: set[str], name: str) -> tuple[str, ...]:
    """Checks that all but a new head came from the checkpoint.

    Args:
        model: The loaded model.
        info: transformers' loading info.
        heads: Names of tensors that may be new.
        name: What was loaded, for the messages.

    Returns:
        Names of the tensors that the checkpoint does not hold, so that an adapter can save them.

    Raises:
        TransferError: A tensor of the body has another shape, or most of the body is missing.
    """
    wrong = sorted((key, *shapes) for key, *shapes in info["mismatched_keys"] if key not in heads)
    if wrong:
        key, saved, built = wrong[0]
        raise TransferError(
            f"{name!r}: {len(wrong)} tensors do not have the shapes of its config.json, first {key}: {tuple(saved)} "
            f"in the weights, {tuple(built)} by it. Correct config.json, or leave out options that change it."
        )
    missing = sorted(set(info["missing_keys"]) - heads)
    body = {key for key, _ in model.named_parameters()} - heads
    if len(missing) > len(body) / 2:
        raise TransferError(
            f"The weights of {name!r} are not those of a {type(model).__name__}: {len(missing)} of {len(body)} "
            f"tensors are missing, such as {missing[0]}. Check config.json, or pass pretrained=False for random ones."
        )
    if missing:
        logger.warning("%s lacks %d tensors, which start at random: %s", name, len(missing), ", ".join(missing[:8]))
    return tuple(sorted(_fresh_names(info)))
