"""New image sizes and channel counts for pretrained vision models of transformers.

Learned position embeddings are resampled (bicubic, as in ViT, Dosovitskiy et al. 2020, arXiv:2010.11929, section 3.2)
and the first convolution is adapted as timm does: one channel sums the pretrained three, more repeat them.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from ..errors import TransferError
from .request import Request

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def vision_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a configuration that describes the image encoder: CLIP and its like nest it."""
    return getattr(config, "vision_config", None) or config


def own_image_size(config: PretrainedConfig) -> int | None:
    """Side of the images a configuration is built for, in pixels; None where any size goes."""
    size = getattr(vision_config(config), "image_size", None)
    return size[0] if isinstance(size, (list, tuple)) else size


def own_channels(config: PretrainedConfig) -> int:
    """Channels of the images a configuration is built for."""
    return getattr(vision_config(config), "num_channels", 3)


def image_shape(config: PretrainedConfig) -> tuple[int, int | None]:
    """Channels, and side in pixels where it is known, of the images that a configuration of any library is for."""
    if config.model_type == "timm_wrapper":
        channels, side, _ = config.pretrained_cfg["input_size"]
        return channels, side
    return own_channels(config), own_image_size(config)


def resize_transformers(model: PreTrainedModel, request: Request) -> PreTrainedModel:
    """Returns the model rebuilt for the requested image size and channels, or the model itself where they are its own.

    Raises:
        TransferError: A tensor depends on the size in a way that cannot be resampled.
    """
    config = copy.deepcopy(model.config)
    vision = vision_config(config)
    size = own_image_size(config)
    if request.image_size is not None and size is not None and request.image_size != size:
        vision.image_size = request.image_size
    if request.in_chans is not None and request.in_chans != own_channels(config):
        if getattr(vision, "num_channels", None) is None:
            raise TransferError(f"in_chans={request.in_chans}: {config.model_type!r} networks have fixed channels.")
        vision.num_channels = request.in_chans
    if config.to_dict() == model.config.to_dict():
        return model
    try:
        resized = type(model)._from_config(config, dtype=model.dtype)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise TransferError(
            f"A {config.model_type!r} network cannot be built for {request.image_size} px images with "
            f"{own_channels(config)} channels: {error}"
        ) from error
    changed = _copy_weights(model, resized)
    resized.config._name_or_path = model.config._name_or_path
    resized.name_or_path = model.name_or_path
    resized.fresh_parameters = tuple(sorted({*getattr(model, "fresh_parameters", ()), *changed}))
    return resized.to(model.device).eval()


def _copy_weights(source: PreTrainedModel, target: PreTrainedModel) -> list[str]:
    """Copies all weights, adapting those whose shape differs; returns the names of these."""
    wanted = target.state_dict()
    weights, changed = source.state_dict(), []
    for name, weight in list(weights.items()):
        if name not in wanted:
            del weights[name]  # made from the size alone, such as a mask
        elif wanted[name].shape != weight.shape:
            weights[name] = _adapted(name, weight, wanted[name].shape, source.config, target.config)
            changed.append(name)
    target.load_state_dict(weights, strict=False)
    return changed


def _adapted(
    name: str, weight: torch.Tensor, shape: torch.Size, source: PretrainedConfig, target: PretrainedConfig
) -> torch.Tensor:
    from timm.layers import resample_abs_pos_embed
    from timm.models import adapt_input_conv

    if weight.ndim == 4 and (weight.shape[0], *weight.shape[2:]) == (shape[0], *shape[2:]):
        return adapt_input_conv(own_channels(target), weight, base_chans=own_channels(source))
    patch = getattr(vision_config(source), "patch_size", None)
    if "position_embedding" in name and isinstance(patch, int) and weight.shape[-1] == shape[-1]:
        old, new = ((own_image_size(config) or 0) // patch for config in (source, target))
        prefix = weight.shape[-2] - old * old  # class and distillation tokens
        if 0 <= prefix == shape[-2] - new * new:
            grid = weight.reshape(1, *weight.shape[-2:])  # (1, T, D)
            grid = resample_abs_pos_embed(grid, new_size=[new, new], old_size=[old, old], num_prefix_tokens=prefix)
            return grid.reshape(shape)
    raise TransferError(
        f"{name} of a {source.model_type!r} network is {tuple(weight.shape)}; for {own_image_size(target)} px images "
        f"with {own_channels(target)} channels it would be {tuple(shape)}, which cannot be resampled from it. Keep "
        f"{own_image_size(source)} px and {own_channels(source)} channels, or take the timm backbone of that name."
    )
