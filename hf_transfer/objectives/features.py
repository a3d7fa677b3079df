"""A teacher's hidden layers as targets: hints, attention maps, correlation of channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import TransferError
from ..objective import Schedule, Step
from ._layers import FeatureTerm, Layers, Projector, masked_mean
from ._precision import correlation_distance, direction, full_precision


@full_precision
def hint(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared difference of two layers, averaged over each row's elements.

    Source: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", arXiv:1412.6550, equation 3; they take half the
    sum, which grows with the layer.

    Args:
        student: (N, ...), already as wide as the teacher's.
        teacher: (N, ...).
        mask: (N, T) bool for (N, T, D): tokens that count.

    Returns:
        (N,), 0 at equal layers.
    """
    return masked_mean((student - teacher).square(), mask)


@full_precision
def cosine_hint(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - cosine of two layers at each position, averaged over each row's positions.

    Args:
        student: (N, D), (N, T, D) or (N, C, H, W), already as wide as the teacher's.
        teacher: The same.
        mask: (N, T) bool for (N, T, D): tokens that count.

    Returns:
        (N,), in [0, 2]; 0 where the directions are equal. A position that is 0 in one network counts 1/2.
    """
    dim = 1 if student.dim() == 4 else -1
    distance = (direction(student, dim) - direction(teacher, dim)).square().sum(dim=dim) / 2
    return masked_mean(distance, mask)


@full_precision
def attention_transfer(student: Tensor, teacher: Tensor, mask: Tensor | None = None, p: float = 2.0) -> Tensor:
    """Squared difference of two maps of where a layer is active, averaged over positions.

    The map is the mean over channels of |activation|^p, scaled to length 1 over each row's positions.

    Source: Zagoruyko & Komodakis 2017, "Paying More Attention to Attention", arXiv:1612.03928, equation 2; the mean
    over positions is the authors' code's.

    Args:
        student: (N, C, H, W) or (N, T, D), of any width.
        teacher: The same positions, of any width.
        mask: (N, T) bool for (N, T, D): tokens that count.
        p: >= 1.

    Returns:
        (N,), 0 at equal maps.
    """
    maps = []
    for x in (student, teacher):
        energy = x.abs().pow(p).mean(dim=1 if x.dim() == 4 else 2)  # (N, H, W) or (N, T)
        maps.append(direction((energy if mask is None else energy * mask).flatten(1), dim=1))
    return masked_mean((maps[0] - maps[1]).square(), mask)


@full_precision
def pkd(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - Pearson's correlation of each channel over the batch and its positions, averaged over channels.

    That is half the squared difference of channels standardised to mean 0 and deviation 1, as the paper writes it.

    Source: Cao et al. 2022, "PKD: General Distillation Framework for Object Detectors via Pearson Correlation
    Coefficient", arXiv:2207.02039, equations 4 and 5.

    Args:
        student: (N, C, H, W), or (M, C).
        teacher: The same.

    Returns:
        0-d, 0 for layers equal up to each channel's scale (> 0) and offset.
    """
    s, t = (x.transpose(0, 1).flatten(1) for x in (student, teacher))  # (C, N * H * W)
    return correlation_distance(s, t, dim=1).mean()


class Hint(FeatureTerm):
    """Layers like the teacher's, through a linear map where the widths differ. Romero et al. 2015, arXiv:1412.6550.

    With `layers="features"` it distils embeddings: the input of the classifier.

    Args:
        layers: Which layers, whose losses are summed; see FeatureTerm.
        distance: "mse", or "cosine", which leaves the length free.
        weight: A number or a schedule of training progress.
        name: The name it is logged under.

    Raises:
        TransferError: If distance is none of these.
    """

    def __init__(
        self,
        layers: Layers = "last",
        distance: Literal["mse", "cosine"] = "mse",
        weight: float | Schedule = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(layers, weight, name)
        if distance not in ("mse", "cosine"):
            raise TransferError(f"distance must be 'mse' or 'cosine', got {distance!r}.")
        self.distance = distance
        self.projectors = nn.ModuleList()

    def build(self) -> None:
        self.projectors = nn.ModuleList(Projector(pair) for pair in self.pairs)

    def forward(self, step: Step) -> Tensor:
        measure = hint if self.distance == "mse" else cosine_hint
        losses = []
        for pair, projector in zip(self.pairs, self.projectors, strict=True):
            student, teacher, mask = self.values(step, pair)
            losses.append(measure(projector(student), teacher, mask))
        return torch.stack(losses).sum(dim=0)  # (N,)


class AttentionTransfer(FeatureTerm):
    """Active where the teacher is active; needs no projector. Zagoruyko & Komodakis 2017, arXiv:1612.03928.

    Args:
        layers: Which layers, whose losses are summed; see FeatureTerm.
        p: Power of the activations, >= 1.
        weight: A number or a schedule; 1000 is the authors' beta.
        name: The name it is logged under.

    Raises:
        TransferError: If p < 1; before training, if a layer has no positions.
    """

    def __init__(
        self,
        layers: Layers = "stages",
        p: float = 2.0,
        weight: float | Schedule = 1000.0,
        name: str | None = None,
    ) -> None:
        super().__init__(layers, weight, name)
        if not p >= 1:
            raise TransferError(f"p must be at least 1, got {p!r}.")
        self.p = p

    def build(self) -> None:
        for pair in self.pairs:
            if pair.layout == "vector":
                raise TransferError(f"The term '{self.name}' compares maps of where layers are active, got {pair}.")

    def forward(self, step: Step) -> Tensor:
        values = [self.values(step, pair) for pair in self.pairs]
        return torch.stack([attention_transfer(*value, p=self.p) for value in values]).sum(dim=0)  # (N,)


class PKD(FeatureTerm):
    """Channels that correlate with the teacher's; couples the batch. Cao et al. 2022, arXiv:2207.02039.

    Where the widths differ a linear map comes first.

    Args:
        layers: Which layers, whose losses are summed; see FeatureTerm.
        weight: A number or a schedule; the authors' for detectors is 6.
        name: The name it is logged under.
    """

    def __init__(self, layers: Layers = "last", weight: float | Schedule = 1.0, name: str | None = None) -> None:
        super().__init__(layers, weight, name)
        self.projectors = nn.ModuleList()

    def build(self) -> None:
        self.projectors = nn.ModuleList(Projector(pair) for pair in self.pairs)

    def count(self, batch: Mapping[str, Any]) -> None:
        return None

    def forward(self, step: Step) -> Tensor:
        losses = []
        for pair, projector in zip(self.pairs, self.projectors, strict=True):
            student, teacher, mask = self.values(step, pair)
            student = projector(student)
            if student.dim() == 3:  # every token that counts is a position
                mask = torch.ones_like(student[..., 0], dtype=torch.bool) if mask is None else mask
                student, teacher = student[mask], teacher[mask]  # (M, D)
            losses.append(pkd(student, teacher))
        return torch.stack(losses).sum()
