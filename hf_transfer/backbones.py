"""load_backbone(): any image, text or audio network of transformers, timm or torchvision, with a head for the task.

backbone = load_backbone("timm/resnet18.a1_in1k", labels=["cat", "dog"])
backbone = load_backbone("resnet18", labels=2, pretrained=False, in_chans=1)         # offline
backbone = load_backbone("FacebookAI/roberta-base", task="regression", labels=1)
backbone = load_backbone("runs/cifar10-lora")                                        # an adapter folder, or any other
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ._torchvision import make_torchvision_importable
from .errors import TransferError
from .loading.failures import explained, is_path, missing_folder
from .loading.request import TASKS, Request

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from .anatomy import Anatomy

__all__ = ["TASKS", "Backbone", "load_backbone"]


@dataclass
class Backbone:
    """A network with everything that belongs to it.

    Attributes:
        model: The network with a head for the task, in eval mode.
        processor: Tokenizer, image processor or feature extractor; None where the checkpoint came without one.
        modality: What it takes: "image", "text" or "audio".
        task: One of `TASKS`.
        name: Hub id or folder that the weights came from, or the name they were asked for by.
        labels: Label names in id order; None for placeholders, regression without names, and causal-lm.
        data_config: For images: input_size (C, H, W), mean, std, interpolation, crop_pct, crop_mode, in timm's names.
        renamed_from: Names that the head's classes had in the checkpoint, where `labels` are other ones for its rows.
    """

    model: PreTrainedModel | PeftModel
    processor: Any
    modality: Literal["image", "text", "audio"]
    task: str
    name: str
    labels: list[str] | None
    data_config: dict[str, Any] | None
    renamed_from: list[str] | None = None

    @cached_property
    def anatomy(self) -> Anatomy:
        """Stem, ordered blocks, neck and head of the network."""
        from .anatomy import Anatomy

        return Anatomy.of(self.model)

    @property
    def outputs(self) -> int:
        """Number of outputs: classes, regression targets, or words of the vocabulary."""
        config: Any = self.model.config
        return config.get_text_config().vocab_size if self.task == "causal-lm" else config.num_labels

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Saves the network and its processor; see `hf_transfer.hub.bundle.save`."""
        from .hub import bundle

        bundle.save(self.model, folder, self.processor, overwrite=overwrite)


def load_backbone(
    name_or_path: str | os.PathLike[str],
    *,
    labels: Sequence[str] | int | None = None,
    task: str | None = None,
    pretrained: bool = True,
    image_size: int | None = None,
    in_chans: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    **model_kwargs: Any,
) -> Backbone:
    """Loads a network and puts a head for the task on it.

    Args:
        name_or_path: A Hub id or local folder of transformers or timm (saved by either), a timm name (`resnet18`,
            `resnet18.a1_in1k`), the id or folder of an adapter, or `torchvision/` and alexnet, vgg11 to vgg19_bn or
            inception_v3.
        labels: Names of the classes in id order: the checkpoint's own names in another order reorder the head, as
            many other names rename it, more or fewer replace it by a new one. Or a number of outputs; or None to keep
            the model's own.
        task: One of `TASKS`, or None for what the checkpoint was made for (labels=1 means regression).
        pretrained: False starts all weights at random. A timm or torchvision name then needs no network.
        image_size: Side of the square images in pixels; learned positions are resampled. None keeps the model's own.
        in_chans: Channels of the images; the pretrained first layer is adapted. None keeps the model's own.
        revision: Branch, tag or commit on the Hub.
        token: Access token of the Hub, or True for the stored one.
        **model_kwargs: Passed on: `dtype`, `device_map`, `attn_implementation`, `cache_dir`, `trust_remote_code`, ...
            to transformers, any other to the configuration (transformers) or the network (timm: `drop_path_rate`).

    Returns:
        The model in eval mode with processor, labels and task.

    Raises:
        TransferError: Bad arguments, or a missing, gated, unreachable or corrupt checkpoint: which, and what to do.
    """
    make_torchvision_importable()
    options = {"revision": revision, "token": token, **model_kwargs}
    name = os.fspath(name_or_path)
    request = Request.checked(
        os.path.expanduser(name) if name.startswith("~") else name,
        labels,
        task,
        pretrained=pretrained,
        image_size=image_size,
        in_chans=in_chans,
        options={key: value for key, value in options.items() if value is not None},
    )
    return _load(request)


def _load(request: Request) -> Backbone:
    """Finds out where the name leads."""
    from .loading import timm_models, torchvision_weights

    name = request.name
    if request.folder is None:
        if is_path(name) or Path(name).is_file():
            raise missing_folder(name)
        if name.startswith(torchvision_weights.PREFIX):
            model, task, processor = torchvision_weights.load_by_name(request)
            return _backbone(request, model, task, "image", processor)
        if name.startswith("timm/") and not request.pretrained and timm_models.is_name(name.removeprefix("timm/")):
            return _load(replace(request, name=name.removeprefix("timm/")))
        if timm_models.is_name(name):
            return _load_timm_name(request)
        bare = "/" not in name or name.startswith("timm/")
        with explained(name, timm_models.near_names(name) if bare else ""):
            return _load_repository(request)
    with explained(name):
        return _load_repository(request)


def _load_timm_name(request: Request) -> Backbone:
    from .loading import timm_models

    if request.pretrained and (hub_id := timm_models.hub_id(request.name)):
        return _load(replace(request, name=hub_id))
    with explained(request.name):
        model, task = timm_models.load_by_name(request)
    return _backbone(request, model, task, "image", timm_models.image_processor(model.config))


def _load_repository(request: Request) -> Backbone:
    """A folder or Hub repository: an adapter, or a model of timm or transformers."""
    from .loading import processors, timm_models, transformers_models
    from .loading.repository import read_json

    model: Any
    adapter = request.folder is not None and (request.folder / "adapter_config.json").is_file()
    config = None if adapter else read_json(request, "config.json")
    if config is None:
        from .loading import adapters

        model, base = adapters.load(request, _load)
        return _backbone(request, model, base.task, base.modality, processors.adapter_processor(request, base))
    if "pretrained_cfg" in config or config.get("model_type") == "timm_wrapper":
        model, task = timm_models.load(request)
        return _backbone(request, model, task, "image", timm_models.image_processor(model.config))
    model, task, modality = transformers_models.load(request)
    return _backbone(request, model, task, modality, processors.load_processor(request, model, task, modality))


def _backbone(request: Request, model: Any, task: str, modality: Any, processor: Any) -> Backbone:
    from .loading import processors, timm_models
    from .loading.heads import label_names

    data_config = None
    if modality == "image":
        timm = model.config.model_type == "timm_wrapper"
        data_config = timm_models.data_config(model.config) if timm else processors.data_config(processor, model)
        if request.image_size is not None or request.in_chans is not None:
            _try_one_image(model.eval(), request)
    labels = None if task == "causal-lm" else label_names(model.config)
    former = getattr(model, "renamed_from", None)  # of a head that starts at random there is none
    return Backbone(model.eval(), processor, modality, task, request.name, labels, data_config, former)


def _try_one_image(model: Any, request: Request) -> None:
    """Runs one image of the size asked for: some networks take another at construction and fail in their forward."""
    import torch

    from .loading.image_sizes import image_shape

    channels, side = image_shape(model.config)
    side = request.image_size or side or 224
    try:
        with torch.no_grad():
            model(torch.zeros(1, channels, side, side, device=model.device, dtype=model.dtype))  # (1, C, H, W)
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        why = " ".join(str(error).split())[:300]
        raise TransferError(
            f"{request.name!r} cannot take images of {channels} x {side} x {side}: {why}. Try another image_size=, or "
            "leave image_size= and in_chans= out for its own."
        ) from error
