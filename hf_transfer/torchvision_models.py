"""AlexNet, VGG and Inception v3 of torchvision as models of transformers: they save, load and push like any other.

A saved folder holds a copy of this file, so that it loads without this package, given torchvision:
`AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)`. Nothing here may therefore import
anything of this package at module level. Where `hf_transfer` is imported, no `trust_remote_code` is needed.

Krizhevsky 2014, arXiv:1404.5997 (AlexNet, one tower); Simonyan & Zisserman 2014, arXiv:1409.1556 (VGG); Szegedy et al.
2015, arXiv:1512.00567 (Inception v3).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

_FIRST_CONVOLUTION = {"alexnet": "features.0", "vgg": "features.0", "inception": "Conv2d_1a_3x3.conv"}
ARCHITECTURES = (
    "alexnet",
    *(f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")),
    "inception_v3",
)


class TorchvisionConfig(PreTrainedConfig):
    """Configuration of a torchvision network.

    Args:
        architecture: One of `ARCHITECTURES`.
        num_channels: Channels of the images, at least 1.
        image_size: Side of the images in pixels that the processor makes; the network takes others too.
        dropout: Dropout in the head, in [0, 1].
    """

    model_type = "torchvision_classifier"

    architecture: str = "alexnet"
    num_channels: int = 3
    image_size: int = 224
    dropout: float = 0.5


class TorchvisionForImageClassification(PreTrainedModel):
    """A torchvision network with transformers' interface. Its module is `network`, with torchvision's own names."""

    config_class = TorchvisionConfig
    base_model_prefix = "network"
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False

    def __init__(self, config: TorchvisionConfig):
        super().__init__(config)
        self.network = _build(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """New layers start as torch starts them; all others come from torchvision or the checkpoint."""
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.BatchNorm2d)):
            module.reset_parameters()

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple[torch.Tensor, ...]:
        """Classifies images.

        Args:
            pixel_values: Normalised images, (B, C, H, W).
            labels: Class indices, (B,), or float targets for regression.
            return_dict: False for a tuple.
            **kwargs: Ignored.

        Returns:
            logits (B, num_labels), and the loss where labels are given.
        """
        logits = self.network(pixel_values)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutput(loss=loss, logits=logits)


def _build(config: TorchvisionConfig) -> nn.Module:
    """The torchvision network, with another first convolution where the images do not have three channels."""
    # By name: transformers imports every module that it finds imported in a file like this before it runs it, and
    # torchvision's own import fails beside a CPU build of torch (see hf_transfer/_torchvision.py).
    models = importlib.import_module("torchvision.models")
    options: dict[str, Any] = {"num_classes": config.num_labels, "dropout": config.dropout}
    if config.architecture == "inception_v3":
        # Without the auxiliary classifier, which only helps from scratch and needs images of 299 px in training.
        options |= {"aux_logits": False, "init_weights": False}
    network = getattr(models, config.architecture)(weights=None, **options)
    if config.num_channels != 3:
        name = first_convolution(config.architecture)
        old = network.get_submodule(name)
        new = nn.Conv2d(
            config.num_channels,
            old.out_channels,
            old.kernel_size,
            old.stride,
            old.padding,
            bias=old.bias is not None,
        )
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, new)
    return network


def first_convolution(architecture: str) -> str:
    """Module path of the layer that sees the image."""
    return next(path for family, path in _FIRST_CONVOLUTION.items() if architecture.startswith(family))


AutoConfig.register(TorchvisionConfig.model_type, TorchvisionConfig, exist_ok=True)
AutoModelForImageClassification.register(TorchvisionConfig, TorchvisionForImageClassification, exist_ok=True)
TorchvisionConfig.register_for_auto_class()
TorchvisionForImageClassification.register_for_auto_class("AutoModelForImageClassification")
