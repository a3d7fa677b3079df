"""The last layer of a language model, taken apart from its body: hidden states in, logits out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import plain_model
from ..dissection.wrapping import is_instance
from ..errors import TransferError


@dataclass
class Held:
    """What was kept of one run of a model: its last layer's inputs, and its outputs for the last token."""

    hidden: list[Tensor] = field(default_factory=list)  # one (N, T, D)
    raw: list[Tensor] = field(default_factory=list)  # one (N, 1, V)


@dataclass(frozen=True)
class Finish:
    """What a model does to the output of its last layer: scales it, then caps it softly, or nothing."""

    scale: Callable[[Tensor], Tensor] | None = None
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits if self.scale is None else self.scale(logits)
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


class LanguageHead:
    """The last layer of a language model with what the model does to its output: hidden states in, logits out.

    Which scale and soft cap a model applies is read off its config, where every architecture names them otherwise, and
    decided by the model's own logits at its first run: what does not reproduce them is not used.

    Args:
        model: A transformers language model, plain or with adapters.

    Raises:
        TransferError: If it has no last layer that gives logits of each token.
    """

    def __init__(self, model: nn.Module) -> None:
        plain: Any = plain_model(model)
        layer = plain.get_output_embeddings() if is_instance(plain, "transformers", "PreTrainedModel") else None
        if layer is None:
            raise TransferError(
                f"{type(plain).__name__} gives no logits of each word of a vocabulary: chunks of tokens are for "
                "language models (AutoModelForCausalLM). Leave chunk_tokens out."
            )
        self.model_name = type(plain).__name__
        self.layer: nn.Module = layer
        self.classes: int = layer.weight.shape[0]
        self._candidates = _finishes(plain.config.get_text_config().to_dict())
        self._finish: Finish | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of a stretch of tokens: (N, t, D) -> (N, t, V)."""
        assert self._finish is not None, "settle() comes first"
        return self._finish(self.layer(hidden))

    @contextmanager
    def held(self) -> Iterator[Held]:
        """While the model runs, its hidden states are kept, and only the last token's go on to the last layer."""
        held = Held()

        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            held.hidden.append(args[0])
            return (args[0][..., -1:, :], *args[1:])

        handles = [
            self.layer.register_forward_pre_hook(keep),
            self.layer.register_forward_hook(lambda module, args, output: held.raw.append(output)),
        ]
        try:
            yield held
        finally:
            for handle in handles:
                handle.remove()

    def settle(self, held: Held, logits: Tensor) -> Tensor:
        """Takes the hidden states of a run; at the first, finds what the model does to its last layer's output.

        Args:
            held: What was kept of the run.
            logits: (N, 1, W), the model's logits of the last token, of the first W words.

        Returns:
            (N, T, D).

        Raises:
            TransferError: If the logits cannot be made again from the hidden states.
        """
        if len(held.hidden) != 1 or held.hidden[0].dim() != 3:
            raise TransferError(
                f"{self.model_name} ran its last layer on {[tuple(x.shape) for x in held.hidden]}, not once on the "
                "hidden states (N, T, D) of all tokens: it cannot be chunked. Leave chunk_tokens out."
            )
        if self._finish is None:
            raw = held.raw[0].detach()[..., : logits.shape[-1]].to(logits.device)
            self._finish = next((finish for finish in self._candidates if _same(finish(raw), logits)), None)
        if self._finish is None:
            raise TransferError(
                f"{self.model_name} does something to the output of its last layer that is no scale or soft cap named "
                "in its config: its logits cannot be made in chunks. Leave chunk_tokens out."
            )
        return held.hidden[0]


def _finishes(config: Mapping[str, Any]) -> list[Finish]:
    """What a model may do to the output of its last layer by its config, the most particular first."""
    numbers = {name: value for name, value in config.items() if type(value) in (int, float) and value}
    scales: list[Any] = [
        partial(operation, other=value)
        for name, value in numbers.items()
        if re.search(r"logits?_.*(scal|mult)|(lm_head|output)_multiplier", name) and value != 1
        for operation in (torch.mul, torch.div)
    ]
    caps = [value for name, value in numbers.items() if re.search(r"soft_?cap", name) and "att" not in name]
    return [Finish(scale, cap) for cap in (*caps, None) for scale in (*scales, None)]


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether logits agree up to rounding in the coarser of their types."""
    rounding = 16 * max(torch.finfo(x.dtype).eps for x in (found, expected))
    size = expected.abs().amax().item()
    return torch.allclose(found.double(), expected.double(), rtol=0, atol=rounding * size, equal_nan=True)
