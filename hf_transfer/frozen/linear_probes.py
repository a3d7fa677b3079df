"""Many linear probes at once: a grid of learning rates and weight decays, trained in one pass over the same batches.

probes = fit_probes(train.x, train.labels, classes=10)             # 16 settings
best = probes.best(validation.x, validation.labels)                # chosen on rows that trained nothing
probes.predict(test.x)[best]                                       # (N,) class ids

All probes see the same rows at the same time, so their logits are one product of the batch with their weights side by
side, and their gradients another. Each ends as it would have alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import TransferError
from ..objective import UNLABELLED, wide

MOMENTUM = 0.9
_ROWS = 4096  # that are scored at a time
_NOTHING = 1e-20  # probabilities below it count as 0: a CPU multiplies by denormal numbers a hundred times as slowly


class Setting(NamedTuple):
    """What one probe is trained with; the learning rate is for features of length 1 on average."""

    learning_rate: float
    weight_decay: float

    def __str__(self) -> str:
        return f"lr {self.learning_rate:g}, decay {self.weight_decay:g}"


GRID = tuple(Setting(*values) for values in product((1.0, 3.0, 10.0, 30.0), (0.0, 1e-5, 1e-4, 1e-3)))


@dataclass(frozen=True)
class LinearProbes:
    """P linear classifiers on the same features.

    Attributes:
        settings: What each was trained with.
        weight: (P, D, C), for standardised features.
        bias: (P, C).
        mean: (D,) of the training features.
        scale: (D,) by which centred features are divided: their standard deviation, times the square root of D so that
            a row has length 1 on average. 1 where a feature is constant.
    """

    settings: tuple[Setting, ...]
    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """(P, N, C) logits of features (N, D)."""
        p, d, c = self.weight.shape
        joint = self.weight.transpose(0, 1).reshape(d, p * c)
        standard = (self._placed(x) - self.mean) / self.scale  # (N, D)
        return (standard @ joint).unflatten(1, (p, c)).transpose(0, 1) + self.bias[:, None]

    def predict(self, x: Tensor) -> Tensor:
        """(P, N) class ids of features (N, D)."""
        return torch.cat([self.logits(rows).argmax(-1) for rows in x.split(_ROWS)], dim=1)

    def accuracy(self, x: Tensor, labels: Tensor) -> Tensor:
        """(P,) shares of the rows that each gets right; rows whose label is -100 do not count."""
        x, labels = _labelled(x, labels)
        return (self.predict(x) == labels.to(self.weight.device)).double().mean(1)

    def best(self, x: Tensor, labels: Tensor) -> int:
        """Which probe gets most of some rows right; the first of equals.

        Args:
            x: (N, D) features of rows that trained none of them, and that nothing is reported on.
            labels: (N,).
        """
        return int(self.accuracy(x, labels).argmax())

    def _placed(self, x: Tensor) -> Tensor:
        return x.to(self.weight)


def fit_probes(
    x: Tensor,
    labels: Tensor,
    classes: int,
    *,
    settings: Sequence[Setting] = GRID,
    steps: int = 500,
    batch_size: int = 256,
    seed: int = 0,
) -> LinearProbes:
    """Trains softmax regressions by SGD with momentum 0.9 and a cosine schedule, from zero, all in one pass.

    A learning rate that diverges ends in numbers that are not finite, of that probe and of no other.

    Args:
        x: (N, D) features; half precision is computed in float32. They are trained on where they are.
        labels: (N,) class ids in [0, classes); rows with -100 are left out.
        classes: C, from 2.
        settings: One probe each.
        steps: Optimizer steps, from 1.
        batch_size: Rows a step, from 1; all rows where there are fewer.
        seed: Of the order of rows, which all probes share.

    Returns:
        The probes, in the order of the settings.

    Raises:
        TransferError: If shapes or labels do not fit, or a number is out of range.
    """
    _check(x, labels, classes, settings, steps, batch_size)
    x, labels = _labelled(wide(x), labels.to(x.device))
    mean, scale = _standard(x)
    x = torch.cat([(x - mean) / scale, x.new_ones(len(x), 1)], dim=1)  # (N, D + 1): the last weight is the bias
    p, rates, decays = len(settings), *(x.new_tensor(values) for values in zip(*settings, strict=True))
    rate, decay = rates.repeat(classes), decays.repeat(classes)  # (C * P,), as the columns of the weights
    # Classes before probes: a softmax over a middle dimension takes a tenth of the time of one over ten last numbers.
    weight = x.new_zeros(x.shape[1], classes * p)  # (D + 1, C * P)
    velocity = torch.zeros_like(weight)
    for step, rows in enumerate(_batches(len(x), batch_size, steps, seed)):
        rows = rows.to(x.device)
        batch = x.index_select(0, rows)  # (B, D + 1)
        slope = (batch @ weight).view(-1, classes, p).softmax(1)  # (B, C, P), of the loss by the logits
        nn.functional.threshold(slope, _NOTHING, 0.0, inplace=True)
        target = labels.index_select(0, rows)[:, None, None].expand(-1, 1, p)
        slope.scatter_add_(1, target, slope.new_full((1, 1, 1), -1.0).expand_as(target))
        velocity.addmm_(batch.T, slope.flatten(1), beta=MOMENTUM, alpha=1 / len(rows))
        velocity[:-1].addcmul_(weight[:-1], decay)  # the bias does not decay
        weight.addcmul_(velocity, rate, value=-_cosine(step / steps))
    stacked = weight.unflatten(1, (classes, p)).permute(2, 0, 1)  # (P, D + 1, C)
    return LinearProbes(tuple(settings), stacked[:, :-1].contiguous(), stacked[:, -1].contiguous(), mean, scale)


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _batches(n: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches of row numbers: each epoch in an order of its own, the rows left over at its end dropped."""
    generator = torch.Generator().manual_seed(seed)
    size, done = min(size, n), 0
    while True:
        order = torch.randperm(n, generator=generator)
        for start in range(0, n - size + 1, size):
            if done == steps:
                return
            done += 1
            yield order[start : start + size]


def _standard(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and divisor (D,)."""
    spread = x.std(0, correction=0)
    varies = spread > 1e-6 * x.abs().amax(0)
    return x.mean(0), torch.where(varies, spread * x.shape[1] ** 0.5, 1.0)


def _labelled(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    kept = labels != UNLABELLED
    return (x, labels) if bool(kept.all()) else (x[kept.to(x.device)], labels[kept])


def _check(x: Tensor, labels: Tensor, classes: int, settings: Sequence[Setting], steps: int, batch_size: int) -> None:
    for name, value, least in (("classes", classes, 2), ("steps", steps, 1), ("batch_size", batch_size, 1)):
        if value < least:
            raise TransferError(f"{name}={value} is not valid: it must be a whole number from {least}.")
    if not settings or any(rate <= 0 or decay < 0 for rate, decay in settings):
        raise TransferError(f"settings={list(settings)}: at least one, with learning rates > 0 and decays >= 0.")
    if x.dim() != 2 or labels.shape != x.shape[:1] or labels.is_floating_point():
        raise TransferError(
            f"Features {tuple(x.shape)} with labels {tuple(labels.shape)} of {labels.dtype}: they must be (N, D) and "
            "whole numbers (N,)."
        )
    known = labels[labels != UNLABELLED]
    if not len(known) or known.min() < 0 or known.max() >= classes:
        raise TransferError(f"Labels must be in 0..{classes - 1}, or -100; found {labels.unique().tolist()[:10]}.")
