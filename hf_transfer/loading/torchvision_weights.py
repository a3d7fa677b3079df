"""`torchvision/...` names: the network at random, or with torchvision's ImageNet weights fetched through torch.hub."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any
from urllib.error import URLError

from ..errors import TransferError
from .heads import follow_names, set_labels
from .processors import fit_to_images
from .request import Request
from .transformers_models import resolve_task

PREFIX = "torchvision/"


def load_by_name(request: Request) -> tuple[Any, str, Any]:
    """Builds `torchvision/<architecture>`.

    Args:
        request: What was asked for.

    Returns:
        The model, its task, and its image processor.

    Raises:
        TransferError: No such architecture, an unknown option, or the weights could not be fetched.
    """
    from transformers import AutoConfig

    from ..torchvision_models import ARCHITECTURES, TorchvisionConfig, TorchvisionForImageClassification

    architecture = request.name.removeprefix(PREFIX)
    if architecture not in ARCHITECTURES:
        near = difflib.get_close_matches(architecture, ARCHITECTURES)
        raise TransferError(
            f"{request.name!r} is not offered{'; near it: ' + ', '.join(near) if near else ''}. Use torchvision/ and "
            f"one of: {', '.join(ARCHITECTURES)}. timm has most others, under the same name without torchvision/."
        )
    unknown = sorted(request.overrides.keys() - {"dropout"})
    if unknown:
        raise TransferError(f"{', '.join(unknown)}: unknown option of {request.name!r}, which takes dropout= alone.")
    inception = architecture == "inception_v3"
    config: Any = AutoConfig.for_model(
        TorchvisionConfig.model_type,
        architecture=architecture,
        num_channels=request.in_chans or 3,
        image_size=request.image_size or (299 if inception else 224),
        num_labels=1000,
        **request.overrides,
    )
    weights = _weights(architecture) if request.pretrained else None
    own = None if weights is None else _with_labels(request, weights)
    task, _ = resolve_task(config, request)
    set_labels(config, request if own is None or request.labels is not None else own, task)
    model: Any = TorchvisionForImageClassification(config)
    if weights is not None and own is not None:
        _load_weights(model, weights, request.name)
        follow_names(model, own.label_names)
    model.to(request.dtype or model.dtype)
    return model.eval(), task, _processor(request, model, inception)


def _weights(architecture: str) -> Any:
    import torchvision

    return torchvision.models.get_model_weights(architecture).IMAGENET1K_V1


def _with_labels(request: Request, weights: Any) -> Request:
    names = weights.meta["categories"]  # some ImageNet classes share a name: crane, maillot
    return replace(
        request, labels=tuple(f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names))
    )


def _load_weights(model: Any, weights: Any, name: str) -> None:
    """Loads torchvision's weights, adapting the first layer and leaving a new head as it started."""
    from timm.models import adapt_input_conv

    from ..torchvision_models import first_convolution

    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise TransferError(
            f"The weights of {name!r} could not be fetched from {weights.url}: {error}. Put that file into "
            "$TORCH_HOME/hub/checkpoints where there is no network, or pass pretrained=False for random ones."
        ) from error
    first = f"{first_convolution(model.config.architecture)}.weight"
    wanted = model.network.state_dict()
    changed = []
    for key, weight in list(state.items()):
        if key not in wanted:
            del state[key]  # Inception's auxiliary classifier
        elif wanted[key].shape != weight.shape:
            changed.append(key)
            state[key] = adapt_input_conv(wanted[key].shape[1], weight) if key == first else wanted[key]
    model.network.load_state_dict(state)
    model.config._name_or_path = model.name_or_path = name
    model.fresh_parameters = tuple(f"network.{key}" for key in changed)


def _processor(request: Request, model: Any, inception: bool) -> Any:
    """Resize, centre crop, normalise, as torchvision's own presets for these weights do."""
    from PIL.Image import Resampling
    from transformers import CLIPImageProcessor

    # Inception's weights were trained on [-1, 1]. torchvision turns ImageNet's normalisation into that inside the
    # network (`transform_input`); the processor does it at once.
    statistics = ([0.5] * 3, [0.5] * 3) if inception else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    resized, side = (342, 299) if inception else (256, 224)
    processor = CLIPImageProcessor(
        size={"shortest_edge": resized},
        crop_size={"height": side, "width": side},
        resample=Resampling.BILINEAR,
        image_mean=statistics[0],
        image_std=statistics[1],
    )
    fit_to_images(processor, request, model)
    return processor
