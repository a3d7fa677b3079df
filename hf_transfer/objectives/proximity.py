"""Staying near the start: the distance of the weights from the pretrained ones is part of the loss."""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import TransferError
from ..objective import Objective, Schedule, Step, wide
from ..shards import cut_like, is_sharded, over_parts, whole

if TYPE_CHECKING:
    from ..anatomy import Anatomy

_MOVES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # initialisations that subtract B A from the base


def squared_distance(weights: Sequence[Tensor], start: Sequence[Tensor] | None = None) -> Tensor:
    """sum ||w - w0||^2 over pairs of tensors, in float32 at least; w0 = 0 without `start`. 0-d."""
    if not weights:
        return torch.zeros(())
    moved = [wide(w) for w in weights]
    if start is not None:
        moved = list(torch._foreach_sub(moved, [w0.to(w.dtype) for w, w0 in zip(moved, start, strict=True)]))
    return torch.stack([norm.to(moved[0].device) for norm in torch._foreach_norm(moved)]).square().sum()


def squared_product(b: Tensor, a: Tensor) -> Tensor:
    """||B A||^2 (Frobenius) without forming B A: the trace of (B' B)(A A'), both only (r, r).

    A step of LoRA on a large network must not make a full-sized matrix a layer, only to sum its squares.

    Args:
        b: (m, r).
        a: (r, n).

    Returns:
        0-d, float32 at least.
    """
    a, b = wide(a), wide(b)
    return ((b.T @ b) * (a @ a.T)).sum()


class L2SP(Objective):
    """alpha/2 ||w - w0||^2 over pretrained parameters + beta/2 ||w||^2 over the new head.

    It takes the place of weight decay, which pulls pretrained weights to 0: train with `weight_decay=0`. Only what
    trains is counted. With LoRA the start is the model with the adapter switched off: the deviation of a layer is its
    B A, and that of a module in `modules_to_save` its distance from the original (unless it is the head).

    The starting weights live on the parameters' device, and travel with the term's state (not as buffers: DDP would
    broadcast them at every step), so that a resumed run has the same start. A run in phases on one model (gradual
    unfreezing) has one start.

    Source: Li et al. 2018, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
    arXiv:1802.01483, equation 3.

    Args:
        alpha: Strength for pretrained parameters, >= 0.
        beta: Strength for the head, >= 0.
        weight: A number or a schedule of training progress, times both.
        name: The name it is logged under.

    Raises:
        TransferError: If alpha or beta is negative; before training, if the head is unknown, or the adapters are such
            that the deviation is not B A (DoRA, or not LoRA).
    """

    def __init__(
        self, alpha: float = 0.1, beta: float = 0.01, weight: float | Schedule = 1.0, name: str | None = None
    ) -> None:
        super().__init__(weight, name)
        if not (0 <= alpha < float("inf") and 0 <= beta < float("inf")):
            raise TransferError(f"alpha and beta must be >= 0 and finite, got alpha={alpha!r}, beta={beta!r}.")
        self.alpha, self.beta = alpha, beta
        self._model: weakref.ref[nn.Module] | None = None
        self._head: set[str] = set()
        self._start: dict[str, Tensor] = {}  # parameter name -> w0

    def prepare(self, model: nn.Module, anatomy: Anatomy | None) -> None:
        if anatomy is None:
            raise TransferError(
                f"The term '{self.name}' needs to know which parameters of {type(model).__name__} are the new head: "
                "load the model with load_backbone(), or give the Learner an Anatomy."
            )
        if self._model is not None and self._model() is not model:
            self._start = {}
        self._model = weakref.ref(model)
        adapters = _adapter_parameters(model, self.name)
        trained = [name for name, p in model.named_parameters() if p.requires_grad and name not in adapters]
        self._head = {name for name in trained if anatomy.group(name) == anatomy.depth + 2}
        for name in trained:
            if name not in self._head and name not in self._start:
                # PEFT trains a copy of a module in modules_to_save; the original beside it is the start.
                original = re.sub(r"\.modules_to_save\.[^.]+\.", ".original_module.", name)
                self._start[name] = model.get_parameter(original).detach().clone()

    def get_extra_state(self) -> dict[str, Tensor]:
        """The starting weights by parameter name, which `state_dict()` then holds."""
        return dict(self._start)

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Takes the starting weights of a state dict.

        Raises:
            TransferError: If they are not those of this model.
        """
        wrong = sorted(name for name, w0 in self._start.items() if name not in state or state[name].shape != w0.shape)
        if wrong:
            raise TransferError(
                f"The saved starting weights of the term '{self.name}' are not this model's: {wrong[:5]} are missing "
                "or have another shape. Resume with the model, the tuning and the terms that the run began with."
            )
        self._start = dict(state)

    def forward(self, step: Step) -> Tensor:
        trained = {name: p for name, p in step.model.named_parameters() if p.requires_grad}
        pretrained = {name: p for name, p in trained.items() if name in self._start}
        head = [p for name, p in trained.items() if name in self._head]
        device = step.logits.device
        with torch.autocast(device.type, enabled=False):  # sums of squares in float32
            start = [self._start_at(name, p) for name, p in pretrained.items()]
            near = over_parts(squared_distance, list(pretrained.values()), start)
            parts = [self.alpha * near, self.beta * over_parts(squared_distance, head)]
            parts += [self.alpha * _squared_delta(layer) for layer in _lora_layers(step.model)]
            return torch.stack([part.to(device) for part in parts]).sum() / 2

    def _start_at(self, name: str, parameter: Tensor) -> Tensor:
        """w0, moved once to where the parameter is, and cut as it is."""
        if self._start[name].device != parameter.device or is_sharded(parameter):
            self._start[name] = cut_like(self._start[name], parameter)
        return self._start[name]


def _adapter_parameters(model: nn.Module, term: str) -> set[str]:
    """Names of the parameters that adapters add.

    Raises:
        TransferError: If the deviation from the start is not the B A of LoRA layers.
    """
    configs: Mapping[str, Any] | None = getattr(model, "peft_config", None)
    if configs is None:  # importing PEFT takes seconds
        return set()
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    for adapter in configs.values():
        start = str(getattr(adapter, "init_lora_weights", True)).lower()
        if start.startswith(_MOVES_BASE):
            raise TransferError(
                f"The term '{term}' cannot be used with init_lora_weights={start!r}, which moves the frozen weights "
                "too: the model without its adapter is not the pretrained one. Use init_lora_weights=True."
            )
    names: set[str] = set()
    layers: list[tuple[str, Any]] = [(path, m) for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for path, module in layers:
        if not isinstance(module, LoraLayer) or module.lora_variant or any(module.lora_bias.values()):
            raise TransferError(
                f"The term '{term}' knows the deviation from the start of plain LoRA, B A, and the {_kind(module)} "
                f"'{path}' deviates by more than that (DoRA, for one, also rescales the frozen weight). Use LoRA with "
                "use_dora=False and lora_bias=False, or full fine-tuning, or drop the term."
            )
        for attribute in module.adapter_layer_names:
            names |= {f"{path}.{attribute}.{name}" for name, _ in getattr(module, attribute).named_parameters()}
    return names


def _kind(module: nn.Module) -> str:
    variants = getattr(module, "lora_variant", {}).values()
    return ", ".join([type(module).__name__, *(type(variant).__name__ for variant in variants)])


def _lora_layers(model: nn.Module) -> list[nn.Module]:
    if getattr(model, "peft_config", None) is None:
        return []
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _squared_delta(layer: Any) -> Tensor:
    """||delta W||^2 of a LoRA layer: of what its active adapters, scaled, add to its weight."""
    from peft.tuners import lora

    active = [name for name in layer.active_adapters if name in layer.scaling]
    if not active:
        return torch.zeros(())
    kind = type(layer)
    if issubclass(kind, lora.Embedding):
        b = [whole(layer.lora_embedding_B[name]) for name in active]  # each (m, r)
        a = [whole(layer.lora_embedding_A[name]) for name in active]  # each (r, n)
    elif issubclass(kind, (lora.Linear, lora.Conv2d, lora.Conv3d)):
        b = [whole(layer.lora_B[name].weight).flatten(1) for name in active]
        a = [whole(layer.lora_A[name].weight).flatten(1) for name in active]
    else:  # rarer layers (experts, AdaLoRA, quantised ones) have a structure that only PEFT knows
        return squared_distance([torch.stack([layer.get_delta_weight(name) for name in active]).sum(dim=0)])
    b = [factor * layer.scaling[name] for factor, name in zip(b, active, strict=True)]
    # A grouped convolution has rows of B and A for each group of its outputs.
    groups = getattr(layer.get_base_layer(), "groups", 1)
    squares = [
        squared_product(torch.cat([x.chunk(groups)[g] for x in b], dim=1), torch.cat([x.chunk(groups)[g] for x in a]))
        for g in range(groups)
    ]
    return torch.stack(squares).sum()
