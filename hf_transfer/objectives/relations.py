"""Relations between the rows of a batch, as the teacher sees them: similarities, distances, angles, CKA.

Each couples the batch and gives one number; none needs a projector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..objective import Schedule, Step
from ._layers import FEATURES, FeatureTerm, Layers, attended, mask_of
from ._precision import direction, full_precision


@full_precision
def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """||G_t - G_s||^2 / N^2, G being the rows' inner products (N, N) with each row of G scaled to length 1.

    Source: Tung & Mori 2019, "Similarity-Preserving Knowledge Distillation", arXiv:1907.09682, equations 1 to 4.

    Args:
        student: (N, ...), of any width.
        teacher: (N, ...), of any width.

    Returns:
        0-d, 0 at equal similarities.
    """
    s, t = (direction(x.flatten(1) @ x.flatten(1).T, dim=1) for x in (student, teacher))  # (N, N)
    return (s - t).square().sum() / len(s) ** 2


@full_precision
def rkd(student: Tensor, teacher: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Tensor:
    """Huber loss between the two networks' distances of pairs of rows, and between their angles of triplets.

    Distances are divided by their mean over pairs of different rows. Averages are over all N^2 and N^3 entries, as in
    the authors' code.

    Source: Park et al. 2019, "Relational Knowledge Distillation", arXiv:1904.05068, equations 4 to 9.

    Args:
        student: (N, D), of any width.
        teacher: (N, D), of any width.
        distance_weight: Weight of the distances.
        angle_weight: Weight of the angles.

    Returns:
        0-d, 0 at equal distances (up to scale) and angles.
    """
    (d_s, a_s), (d_t, a_t) = _distances_and_angles(student), _distances_and_angles(teacher)
    return distance_weight * F.smooth_l1_loss(d_s, d_t) + angle_weight * F.smooth_l1_loss(a_s, a_t)


@full_precision
def cka(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - linear CKA: 1 - <K_s, K_t> / (||K_s|| ||K_t||), K being the inner products (N, N) of centred features.

    Source: Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited", arXiv:1905.00414,
    equations 1 to 4. On small batches of wide features CKA is biased towards 1.

    Args:
        student: (N, ...), of any width.
        teacher: (N, ...), of any width.

    Returns:
        0-d in [0, 1]; 0 for features equal up to rotation, scale and offset; 1 where either is constant.
    """
    return 1 - F.cosine_similarity(_kernel(student.flatten(1)), _kernel(teacher.flatten(1)), dim=0)


def _kernel(x: Tensor) -> Tensor:
    """(N, D) -> (N * N,), inner products of centred rows, up to a factor."""
    x = x / x.detach().abs().amax().clamp(min=torch.finfo(x.dtype).tiny)  # the norm takes fourth powers
    x = x - x.mean(dim=0)
    return (x @ x.T).flatten()


def _distances_and_angles(x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, N) distances over their mean, and (N, N, N) cosines of the angle at each row between two others."""
    difference = x[None] - x[:, None]  # (N, N, D)
    length = torch.linalg.vector_norm(difference, dim=2)  # (N, N)
    mean = length.sum() / (length > 0).sum().clamp(min=1)
    towards = direction(difference, dim=2)
    return length / torch.where(mean > 0, mean, 1), towards @ towards.transpose(1, 2)


class RelationTerm(FeatureTerm):
    """A term that compares the relations between rows: one number for the batch."""

    def count(self, batch: Mapping[str, Any]) -> None:
        return None

    def relation(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The term's value for one pair of layers, (N, D) and (N, D'): 0-d."""
        raise NotImplementedError

    def forward(self, step: Step) -> Tensor:
        losses = []
        for pair in self.pairs:
            rows = []
            for x in self.outputs(step, pair):
                mask = mask_of(x, attended(step))
                rows.append((x if mask is None else x * mask[..., None]).flatten(1))  # padding is no part of a row
            losses.append(self.relation(*rows))
        return torch.stack(losses).sum()


class SimilarityPreserving(RelationTerm):
    """Rows as similar to one another as the teacher finds them. Tung & Mori 2019, arXiv:1907.09682.

    Args:
        layers: Which layers, whose losses are summed; see FeatureTerm.
        weight: A number or a schedule; 3000 is the authors' gamma.
        name: The name it is logged under.
    """

    def __init__(self, layers: Layers = "last", weight: float | Schedule = 3000.0, name: str | None = None) -> None:
        super().__init__(layers, weight, name)

    def relation(self, student: Tensor, teacher: Tensor) -> Tensor:
        return similarity_preserving(student, teacher)


class RKD(RelationTerm):
    """Distances and angles between rows as in the teacher. Park et al. 2019, arXiv:1904.05068.

    Args:
        layers: Which layers, whose losses are summed; the input of the classifier by default. See FeatureTerm.
        distance_weight: Weight of the distances of pairs.
        angle_weight: Weight of the angles of triplets; these take N^2 D and N^3 numbers.
        weight: A number or a schedule of training progress.
        name: The name it is logged under.
    """

    def __init__(
        self,
        layers: Layers = FEATURES,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        weight: float | Schedule = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(layers, weight, name)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def relation(self, student: Tensor, teacher: Tensor) -> Tensor:
        return rkd(student, teacher, self.distance_weight, self.angle_weight)


class CKA(RelationTerm):
    """Layers equal to the teacher's up to rotation, scale and offset. Kornblith et al. 2019, arXiv:1905.00414.

    Args:
        layers: Which layers, whose losses are summed; see FeatureTerm.
        weight: A number or a schedule of training progress.
        name: The name it is logged under.
    """

    def __init__(self, layers: Layers = "last", weight: float | Schedule = 1.0, name: str | None = None) -> None:
        super().__init__(layers, weight, name)

    def relation(self, student: Tensor, teacher: Tensor) -> Tensor:
        return cka(student, teacher)
