"""Processors: tokenizer, image processor or feature extractor, and what an image model's data must look like."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..errors import TransferError
from .image_sizes import own_channels, own_image_size
from .repository import find_file
from .request import Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def load_processor(request: Request, model: PreTrainedModel, task: str, modality: str) -> Any:
    """The processor that lies beside the model; None, with a warning, where there is none."""
    if modality == "text":
        return _tokenizer(request, model, task)
    if modality == "audio":
        return _load("AutoFeatureExtractor", request)
    processor = _load("AutoImageProcessor", request) or _default_image_processor(model)
    if processor is not None:
        fit_to_images(processor, request, model)
    return processor


def adapter_processor(request: Request, base: Any) -> Any:
    """The processor saved with an adapter, or its base's where the adapter came without one."""
    files = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
    if base.model.config.model_type == "timm_wrapper" or not any(find_file(request, name) for name in files):
        return base.processor
    return load_processor(request, base.model, base.task, base.modality)


def _load(auto_class: str, request: Request, **kwargs: Any) -> Any:
    import transformers

    options = {**request.hub_options, **kwargs}
    try:
        return getattr(transformers, auto_class).from_pretrained(
            request.name, trust_remote_code=request.trust_remote_code, **options
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning(
            "%s has no %s: %s", request.name, auto_class.removeprefix("Auto"), str(error).partition("\n")[0]
        )
        return None


def _tokenizer(request: Request, model: PreTrainedModel, task: str) -> Any:
    tokenizer = _load("AutoTokenizer", request)
    if tokenizer is None:
        return None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # transformers 5 makes a tokenizer without a vocabulary where it finds no file: every word would be [UNK].
        logger.warning("%s has no Tokenizer: there is no vocabulary in it", request.name)
        return None
    if task == "token-classification" and getattr(tokenizer, "add_prefix_space", None) is False:
        # Byte-level BPE refuses text that comes split into words unless each begins with a space.
        tokenizer = _load("AutoTokenizer", request, add_prefix_space=True)
    ensure_pad_token(tokenizer, model, request.name)
    return tokenizer


def ensure_pad_token(tokenizer: Any, model: PreTrainedModel, name: str) -> None:
    """Gives a tokenizer without a padding token its end-of-text token, and tells the model.

    The attention mask hides padding either way; sequence classifiers of decoders find the last word by it.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise TransferError(
                f"The tokenizer of {name!r} has neither a padding nor an end-of-text token, so that no batch can be "
                "made. Set `pad_token` in its tokenizer_config.json to one of its special tokens."
            )
        tokenizer.pad_token = tokenizer.eos_token
    for config in (model.config, model.config.get_text_config(), getattr(model, "generation_config", None)):
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id


def _default_image_processor(model: PreTrainedModel) -> Any:
    """The processor class of this kind of model with its own defaults, where the folder holds none."""
    from transformers import IMAGE_PROCESSOR_MAPPING

    if type(model.config) not in IMAGE_PROCESSOR_MAPPING:
        return None
    classes: Any = IMAGE_PROCESSOR_MAPPING[type(model.config)]  # by image library; dummies where it is missing
    processor: Any = next(
        each for each in classes.values() if each is not None and not getattr(each, "is_dummy", False)
    )()
    logger.warning("Using the defaults of %s in its place: check mean and std.", type(processor).__name__)
    _set_size(processor, own_image_size(model.config))
    return processor


def fit_to_images(processor: Any, request: Request, model: PreTrainedModel) -> None:
    """Sets an image processor to the requested size and to the model's channels."""
    _set_size(processor, request.image_size)
    channels = own_channels(model.config)
    for key in ("image_mean", "image_std"):
        value = getattr(processor, key, None)
        if isinstance(value, (list, tuple)) and len(value) != channels:
            setattr(processor, key, [sum(value) / len(value)] * channels)  # as timm does
    if channels == 1 and getattr(processor, "do_convert_rgb", False):
        processor.do_convert_rgb = False


def _set_size(processor: Any, side: int | None) -> None:
    """Sets the side of the square that the processor puts out, in pixels, keeping its share of the whole image."""
    if side is None:
        return
    size, crop = _plain(processor.size), _plain(getattr(processor, "crop_size", None))
    cropped = bool(getattr(processor, "do_center_crop", False) and crop)
    if "shortest_edge" in size:
        before = crop["height"] if cropped else size["shortest_edge"]
        processor.size = {**size, "shortest_edge": round(size["shortest_edge"] * side / before)}
    else:
        before = crop["height"] if cropped else size["height"]
        resized = round(size["height"] * side / before)
        processor.size = {"height": resized, "width": resized}
    if crop:
        processor.crop_size = {"height": side, "width": side}


def _plain(size: Any) -> dict[str, int]:
    """A processor's size as a dict without empty entries, empty where it has none."""
    return {key: value for key, value in dict(size or {}).items() if value is not None}


def data_config(processor: Any, model: PreTrainedModel) -> dict[str, Any] | None:
    """What an image model's data must look like, in timm's names; None without a processor.

    Returns:
        input_size (C, H, W), mean and std (one value a channel, of pixels in [0, 1]), interpolation, crop_pct (side of
        the crop as a share of the resized image), crop_mode ("center", or "squash" where the whole image is resized to
        a square), and channel_order="bgr" for the few networks that want it.
    """
    if processor is None:
        return None
    size, crop = _plain(processor.size), _plain(getattr(processor, "crop_size", None))
    cropped = bool(getattr(processor, "do_center_crop", False) and crop)
    resized = size["shortest_edge"] if "shortest_edge" in size else size["height"]
    side = crop["height"] if cropped else resized
    crop_pct = getattr(processor, "crop_pct", None) if not cropped else None  # ConvNeXt's way to say it
    channels = own_channels(model.config)
    normalized = getattr(processor, "do_normalize", True)
    config: dict[str, Any] = {
        "input_size": (channels, side, side),
        "mean": tuple(processor.image_mean) if normalized else (0.0,) * channels,
        "std": tuple(processor.image_std) if normalized else (1.0,) * channels,
        "interpolation": _interpolation(getattr(processor, "resample", None)),
        "crop_pct": crop_pct or side / resized,
        "crop_mode": "center" if cropped or "shortest_edge" in size else "squash",
    }
    if getattr(processor, "do_flip_channel_order", False):
        config["channel_order"] = "bgr"
    return config


def _interpolation(resample: Any) -> str:
    from PIL.Image import Resampling

    return Resampling(int(resample)).name.lower() if resample is not None else "bilinear"
