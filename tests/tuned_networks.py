"""Tiny networks of each kind for the tests of tuning, and what can be read off them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    WavLMConfig,
    WavLMForSequenceClassification,
)

from hf_transfer.anatomy import Anatomy, plain_model
from hf_transfer.tuning import plan

IMAGE = (4, 3, 32, 32)


def seeded(build: Callable[..., Any]) -> Callable[..., Any]:
    """The same weights at every call, and the global random state as it was."""

    @functools.wraps(build)
    def built(*args: Any, **options: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build(*args, **options)

    return built


@seeded
def resnet() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=5)


@seeded
def vit(**options) -> nn.Module:
    return timm.create_model("test_vit", num_classes=5, img_size=32, **options)


@seeded
def mobilenet() -> nn.Module:
    return timm.create_model("mobilenetv2_035", num_classes=5)


@seeded
def wrapped(architecture: str = "test_resnet") -> TimmWrapperForImageClassification:
    names = dict(enumerate(("cat", "dog", "owl")))
    config = TimmWrapperConfig(architecture=architecture, num_labels=3, id2label=names)
    return TimmWrapperForImageClassification(config)


@seeded
def bert(**options) -> nn.Module:
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **size, **options))


@seeded
def gpt2(kind: type = GPT2ForSequenceClassification) -> nn.Module:
    return kind(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, pad_token_id=0, num_labels=3))


@seeded
def speech(kind: type = Wav2Vec2ForSequenceClassification, config: type = Wav2Vec2Config) -> nn.Module:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (10, 4), "conv_stride": (5, 4)}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0}
    return kind(config(num_labels=3, classifier_proj_size=8, **size, **convolutions, **positions))


@seeded
def ast() -> nn.Module:
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ASTForAudioClassification(ASTConfig(max_length=32, num_mel_bins=16, num_labels=3, **size))


INPUTS = {
    "pixel_values": lambda: torch.randn(IMAGE),
    "input_ids": lambda: torch.randint(1, 50, (4, 6)),
    "input_values": lambda: torch.randn(4, 400),
}


@seeded
def beit() -> nn.Module:
    size = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2}
    return timm.create_model("beit_base_patch16_224", num_classes=5, **size)


@seeded
def davit() -> nn.Module:
    size = {"embed_dims": (8,) * 4, "depths": (1,) * 4, "num_heads": (1,) * 4}
    return timm.create_model("davit_tiny", num_classes=5, **size)


@seeded
def wavlm() -> nn.Module:
    return speech(WavLMForSequenceClassification, WavLMConfig)


def run(model: nn.Module) -> torch.Tensor:
    """Logits of a seeded input that fits the network."""
    plain = plain_model(model)
    name = getattr(plain, "main_input_name", None)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        inputs = (
            torch.randn(4, 32, 16)
            if isinstance(plain, ASTForAudioClassification)
            else INPUTS[name or "pixel_values"]()
        )
    return model(**{name: inputs}).logits if name else model(inputs)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def groups_trained(model: nn.Module) -> list[bool]:
    """Of stem, blocks, neck, head: whether anything trains."""
    return [row.trained for row in plan(model).rows]


NETWORKS = {f.__name__: f for f in (resnet, vit, mobilenet, wrapped, bert, gpt2, speech, ast)}


each_network = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)


def parameters_of(model: nn.Module, lowest: int) -> set[str]:
    anatomy = Anatomy.of(model)
    return {name for name, _ in model.named_parameters() if anatomy.group(name) >= lowest}


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every BatchNorm statistic in use: peft keeps the one from before beside what it saves."""
    used = {name: value for name, value in model.named_buffers() if "original_module" not in name}
    return {name: value.clone() for name, value in used.items() if "running" in name or "num_batches" in name}


def adapted(model: nn.Module) -> set[str]:
    """Plain paths of the layers that carry a LoRA adapter."""
    marker = ".lora_A.default.weight"
    return {n.removeprefix("base_model.model.").removesuffix(marker) for n in trained(model) if n.endswith(marker)}


def shake(model: nn.Module) -> nn.Module:
    """Moves what trains (LoRA's B starts at 0) and every BatchNorm statistic that training may move."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
