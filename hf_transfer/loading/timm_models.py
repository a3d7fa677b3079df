"""Backbones of timm, in transformers' wrapper: every way of naming and saving them, any image size and channel count.

Whatever the source, the result is a `TimmWrapperForImageClassification` whose configuration both libraries can read
back: `model_args` without `num_classes` (which transformers passes itself), the label names in `label_names` (which
transformers otherwise keeps from the model before), and `pretrained_cfg` describing the images it takes now.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import TransferError
from .heads import follow_names, label_names, set_labels
from .request import Request
from .transformers_models import check_loaded, resolve_task

if TYPE_CHECKING:
    from torch import nn

PREFIX = "timm_model."  # where transformers' wrapper keeps the timm model
# Where weights came from and what held for their first task: no longer true of the model that we make.
_SOURCE_KEYS = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "label_offset", "num_classes")
_LABEL_KEYS = ("label_names", "label_descriptions")


def is_name(name: str) -> bool:
    """Whether timm has an architecture of this name; a tag after a dot is not looked at."""
    import timm

    return "/" not in name and timm.is_model(name.partition(".")[0])


def near_names(name: str) -> str:
    """A sentence with timm's names nearest to one that does not exist, or nothing."""
    import timm

    name = name.removeprefix("timm/").lower()
    near = difflib.get_close_matches(name, timm.list_pretrained() if "." in name else timm.list_models(), n=5)
    return f" Near it in timm: {', '.join(near)}." if near else ""


def hub_id(name: str) -> str | None:
    """The Hub id that holds the weights of a timm name in timm's own format; None where they lie elsewhere.

    Raises:
        TransferError: The name has no such tag, or no pretrained weights at all.
    """
    import timm

    cfg = _registered(name)
    if cfg is None or not cfg.has_weights:
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise TransferError(
            f"timm has no pretrained weights named {name!r}. "
            f"{'It has: ' + ', '.join(tags) + '.' if tags else 'It has none of this architecture.'} "
            "pretrained=False starts at random."
        )
    native = cfg.hf_hub_id and cfg.hf_hub_id.startswith("timm/") and not cfg.hf_hub_filename
    return cfg.hf_hub_id if native else None


def _registered(name: str) -> Any:
    """timm's record of a name; None where the architecture has none, or none with this tag."""
    from timm.models import get_pretrained_cfg

    try:
        return get_pretrained_cfg(name)
    except RuntimeError:  # timm's answer to a wrong tag
        return None


def load(request: Request) -> tuple[Any, str]:
    """Loads a folder or Hub id that holds a timm model, saved by timm or by transformers.

    Args:
        request: What was asked for.

    Returns:
        The wrapped model and its task.

    Raises:
        TransferError: It has no classifier and no labels were given, or the weights are not of this network.
    """
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    config: Any = TimmWrapperConfig.from_pretrained(request.name, **request.hub_options)
    config.pretrained_cfg = getattr(config, "pretrained_cfg", None) or {}  # absent where transformers made the model
    saved = {key: value for key, value in (config.model_args or {}).items() if key != "num_classes"}
    config.model_args = {**saved, **_overrides(request)}
    names = label_names(config)
    task = _label(config, request)
    if not request.pretrained:
        return _wrapped(_create(config.architecture, config, request), config, request), task
    with _building(config.architecture, config.model_args, (TypeError, AssertionError)):
        loaded: Any = TimmWrapperForImageClassification.from_pretrained(
            request.name,
            config=config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **request.hub_options,
            **request.loading_options,
        )
    model, info = loaded
    model.fresh_parameters = check_loaded(model, info, _classifier(model), request.name)
    model = _resized(model, request)
    follow_names(model, names)
    return model, task


def load_by_name(request: Request) -> tuple[Any, str]:
    """Builds a bare timm name: at random, or with weights that timm itself fetches from where it knows them to be."""
    from timm.models import PretrainedCfg
    from transformers import AutoConfig

    architecture = request.name.partition(".")[0]
    cfg = _registered(request.name)
    name = architecture if cfg is None else request.name  # without weights a tag only chooses mean, std and size
    cfg = cfg or _registered(architecture) or PretrainedCfg()
    config: Any = AutoConfig.for_model(
        "timm_wrapper",
        architecture=architecture,
        pretrained_cfg={key: value for key, value in cfg.to_dict().items() if value is not None},
        model_args=_overrides(request),
        num_labels=cfg.num_classes,
    )
    task = _label(config, request)
    weights = {"pretrained": True} if request.pretrained else {}
    model = _wrapped(_create(name, config, request, **weights), config, request)
    if request.pretrained:
        model.config._name_or_path = model.name_or_path = request.name
    return model, task


def _overrides(request: Request) -> dict[str, Any]:
    """The user's own arguments of the network."""
    for key, ours in {"img_size": "image_size", "num_classes": "labels"}.items():
        if key in request.overrides:
            raise TransferError(f"Say {ours}= in place of {key}=.")
    return request.overrides


def _label(config: Any, request: Request) -> str:
    """Writes labels into a configuration where both libraries look for them; returns the task."""
    task, _ = resolve_task(config, request)
    set_labels(config, request, task)
    if config.num_labels == 0:
        raise TransferError(f"{request.name!r} has no classifier. Name the classes of yours with labels=.")
    config.label_names = list(config.id2label.values())
    if request.labels is not None:
        for key in _LABEL_KEYS:
            config.pretrained_cfg.pop(key, None)
        if getattr(config, "label_descriptions", None) is not None:
            del config.label_descriptions
    return task


@contextmanager
def _building(name: str, arguments: dict[str, Any], kinds: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turns what timm raises while building a network into a TransferError."""
    try:
        yield
    except kinds as error:
        said = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "its defaults"
        why = " ".join(str(error).split())[:300]
        raise TransferError(f"timm cannot build {name!r} with {said}: {why}") from error


def _arguments(config: Any, request: Request) -> dict[str, Any]:
    """Arguments of the network for the images asked for; only networks of fixed size take a size."""
    arguments = dict(config.model_args)
    if request.in_chans is not None:
        arguments["in_chans"] = request.in_chans
    registered = _registered(config.architecture)
    fixed = config.pretrained_cfg.get("fixed_input_size") or (registered and registered.fixed_input_size)
    if request.image_size is not None and (fixed or "img_size" in arguments):
        arguments["img_size"] = [request.image_size, request.image_size]
    return arguments


def _create(name: str, config: Any, request: Request, **source: Any) -> nn.Module:
    """Builds the timm network that a configuration and a request describe, and notes its arguments in the former."""
    import timm

    config.model_args = _arguments(config, request)
    with _building(name, config.model_args, (AssertionError, TypeError, ValueError, RuntimeError, KeyError)):
        return timm.create_model(name, num_classes=config.num_labels, **source, **config.model_args)


def _wrapped(network: nn.Module, config: Any, request: Request) -> Any:
    """Puts a timm network into transformers' wrapper, which by itself would start it with its own initial values."""
    from transformers import TimmWrapperForImageClassification

    model: Any = TimmWrapperForImageClassification(config)
    model.timm_model = network
    model.to(request.dtype or model.dtype)
    describe_images(model, request.image_size)
    return model.eval()


def _classifier(model: Any) -> set[str]:
    """Names of the classifier's tensors."""
    names = model.timm_model.pretrained_cfg["classifier"]
    prefixes = tuple(f"{PREFIX}{each}." for each in ((names,) if isinstance(names, str) else names))
    return {name for name in model.state_dict() if name.startswith(prefixes)}


def _resized(model: Any, request: Request) -> Any:
    """Rebuilds the network for other images where asked to; timm resamples positions and adapts the first layer."""
    config, old = model.config, model.timm_model
    built = {**config.model_args}
    if _arguments(config, request) != built and not _fits(model, request):
        weights = old.state_dict()
        shapes = {name: weight.shape for name, weight in weights.items()}
        new = _create(
            config.architecture,
            config,
            request,
            pretrained=True,
            pretrained_cfg=_source(model, weights),
            pretrained_model_args=built,
        )
        model.timm_model = new.to(model.dtype)
        changed = [PREFIX + name for name, weight in new.state_dict().items() if shapes.get(name) != weight.shape]
        model.fresh_parameters = tuple(sorted({*model.fresh_parameters, *changed}))
    describe_images(model, request.image_size)
    return model.eval()


def _fits(model: Any, request: Request) -> bool:
    """Whether the network already takes the images asked for."""
    from timm.models import get_model_input_config

    channels, *size = get_model_input_config(model.timm_model)["input_size"]
    side = request.image_size or size[0]
    return (request.in_chans or channels) == channels and size == [side, side]


def _source(model: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """The loaded weights as a source that timm can load from."""
    from dataclasses import fields

    from timm.models import PretrainedCfg, get_model_input_config

    network = model.timm_model
    known = {field.name for field in fields(PretrainedCfg)} - set(_SOURCE_KEYS)
    cfg = {**network.pretrained_cfg, **model.config.pretrained_cfg}
    return {
        **{key: value for key, value in cfg.items() if key in known and value is not None},
        "state_dict": weights,
        "num_classes": model.config.num_labels,
        "input_size": get_model_input_config(network)["input_size"],
        "custom_load": False,
    }


def describe_images(model: Any, image_size: int | None = None) -> None:
    """Writes the images that the network takes now into the configuration; the processor is made from that.

    Args:
        model: A wrapped timm model.
        image_size: New side of the images in pixels, or None for what the configuration or the network says.
    """
    from timm.data.model_config import resolve_input_data_config
    from timm.models import get_model_input_config

    config = model.config
    own = getattr(config, "pretrained_cfg", None) or model.timm_model.pretrained_cfg
    gone = {*_SOURCE_KEYS, "architecture"}
    cfg = {key: value for key, value in own.items() if key not in gone and value is not None}
    asked = {} if image_size is None else {"img_size": image_size}
    resolved = resolve_input_data_config(model.timm_model, args=asked, pretrained_cfg=cfg)
    network = get_model_input_config(model.timm_model)
    if asked or network["fixed_input_size"]:
        cfg.pop("test_input_size", None)
        cfg.pop("test_crop_pct", None)
    if list(resolved["input_size"]) != list(cfg.get("input_size", ())):
        cfg.pop("pool_size", None)
    cfg.update({key: list(value) if isinstance(value, tuple) else value for key, value in resolved.items()})
    cfg.update({key: network[key] for key in ("fixed_input_size", "first_conv")}, custom_load=False)
    cfg.setdefault("classifier", model.timm_model.pretrained_cfg.get("classifier"))
    config.pretrained_cfg = cfg


def image_processor(config: Any) -> Any:
    """transformers' processor for a timm model, as `AutoImageProcessor` makes it from the saved folder."""
    from transformers import TimmWrapperImageProcessor

    return TimmWrapperImageProcessor(pretrained_cfg=config.pretrained_cfg, architecture=config.architecture)


def data_config(config: Any) -> dict[str, Any]:
    """What the data of a timm model must look like, in timm's names."""
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    values = {key: config.pretrained_cfg[key] for key in keys}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
