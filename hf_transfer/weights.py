"""Averages of weights: soups, WiSE-FT, SWA and FedAvg are `average`; `ExponentialAverage` follows a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .errors import TransferError
from .shards import cut_like, gathered, is_sharded, own_part


def average(state_dicts: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The weighted mean of state dicts of one architecture.

    A model soup (Wortsman et al. 2022, arXiv:2203.05482) and SWA (Izmailov et al. 2018, arXiv:1803.05407) weigh all
    equally, WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903) pretrained and fine-tuned by `(1 - a, a)`, FedAvg
    (McMahan et al. 2017, arXiv:1602.05629) clients by their numbers of examples. BatchNorm's statistics are averaged
    like weights: where the models differ much, estimate them again.

    Args:
        state_dicts: One or more, with the same keys and shapes.
        weights: A finite number each, of positive sum, which they are divided by. Equal by default.

    Returns:
        New tensors of the first one's dtypes, on its devices. Floating tensors are summed in float32 at least. Others
        must be equal in all; but of counters (0-d integers, as BatchNorm's), the largest is taken.

    Raises:
        TransferError: If there is no state dict, the weights do not fit, or keys, shapes or integer tensors differ.
    """
    weights = [1.0] * len(state_dicts) if weights is None else weights
    if not state_dicts or len(weights) != len(state_dicts) or not 0 < sum(weights) < float("inf"):
        raise TransferError(
            f"Got weights {list(weights)} for {len(state_dicts)} state dicts. Valid: at least one state dict, and a "
            "finite number for each, of positive sum."
        )
    first = state_dicts[0]
    for number, other in enumerate(state_dicts[1:], start=2):
        _check_same(first, other, f"State dict {number} and the first")
    return {
        name: _mean([state[name] for state in state_dicts], weights)
        if first[name].is_floating_point()
        else _common(name, [state[name] for state in state_dicts])
        for name in first
    }


class ExponentialAverage:
    """The exponential moving average of a model's trainable parameters and floating buffers, in float32 at least.

    Source: Polyak & Juditsky 1992; Tarvainen & Valpola 2017 (mean teacher), arXiv:1703.01780.

    Args:
        model: The model as it starts.
        decay: In (0, 1): each update keeps this share of the average, which so covers about 1 / (1 - decay) updates.

    Raises:
        TransferError: If decay is not in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise TransferError(f"decay must be in (0, 1), got {decay!r}: 0.999 averages about 1000 updates.")
        self.decay = decay
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        names += [name for name, buffer in model.named_buffers() if buffer.is_floating_point()]
        tensors = _tensors(model)
        self._average = {name: _wide(tensors[name]) for name in names}
        self._own: dict[str, Tensor] | None = None  # the model's own values, while it holds the average

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the model's present values: after each optimizer step.

        Raises:
            TransferError: If the model holds the average at the moment.
        """
        if self._own is not None:
            raise TransferError("The model holds the average: swap(model) back before it trains on.")
        values = self._follow(model)
        averages = [own_part(average) for average in self._average.values()]
        wide = [value.detach().to(average.dtype) for value, average in zip(values, averages, strict=True)]
        torch._foreach_lerp_(averages, wide, 1 - self.decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Puts the average into the model in place; called again, the model's own values, exactly."""
        values = self._follow(model)
        if self._own is None:
            self._own = {name: value.clone() for name, value in zip(self._average, values, strict=True)}
            torch._foreach_copy_(values, [own_part(average) for average in self._average.values()])
        else:
            torch._foreach_copy_(values, list(self._own.values()))
            self._own = None

    def state_dict(self) -> dict[str, Tensor]:
        """The average by parameter and buffer name; of a model that FSDP shards, gathered: each process calls it."""
        return gathered(self._average)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over an average.

        Raises:
            TransferError: If it is of another model.
        """
        _check_same(self._average, state, "This average and the one to load")
        for name, value in self._average.items():
            own_part(value).copy_(own_part(cut_like(state[name], value)))

    def _follow(self, model: nn.Module) -> list[Tensor]:
        """The model's tensors in the average's order, as far as this process has them; moves the average to them."""
        tensors = _tensors(model)
        if missing := [name for name in self._average if name not in tensors]:
            raise TransferError(f"The model lacks {missing[:5]}, which the average holds: it is another model's.")
        for name, average in self._average.items():
            if average.device != tensors[name].device or is_sharded(tensors[name]):
                self._average[name] = cut_like(average, tensors[name])
        return [own_part(tensors[name]) for name in self._average]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _wide(value: Tensor) -> Tensor:
    """A copy in float32 at least."""
    return value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)


def _mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = _wide(values[0]) * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total.add_(value.detach().to(total), alpha=weight)
    return (total / sum(weights)).to(values[0].dtype)


def _common(name: str, values: Sequence[Tensor]) -> Tensor:
    """What all share; of counters, the largest."""
    values = [value.to(values[0].device) for value in values]
    if values[0].dim() == 0 and values[0].dtype != torch.bool:
        return torch.stack(values).max()
    if not all(torch.equal(value, values[0]) for value in values):
        raise TransferError(f"'{name}' ({values[0].dtype}) differs between the state dicts, and has no average.")
    return values[0].clone()


def _check_same(first: Mapping[str, Tensor], other: Mapping[str, Tensor], who: str) -> None:
    """Raises where keys or shapes differ."""
    if strange := sorted(first.keys() ^ other.keys()):
        raise TransferError(
            f"{who} differ in {len(strange)} keys: {strange[:5]}. Averages need models of one architecture (merge "
            "adapters first)."
        )
    if shapes := [
        f"{name} {tuple(value.shape)} and {tuple(other[name].shape)}"
        for name, value in first.items()
        if value.shape != other[name].shape
    ]:
        raise TransferError(f"{who} differ in {len(shapes)} shapes: {'; '.join(shapes[:5])}.")
