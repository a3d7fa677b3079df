"""ReviewKD: the student's later layers help its earlier ones to become the teacher's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..objective import Schedule, Step
from ._layers import FeatureTerm, LayerPair, Layers, as_map, attended, refuse_sequences, side_of
from ._precision import full_precision


@full_precision
def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of two maps at full size and averaged to 4 x 4, 2 x 2 and 1 x 1, weighted 1, 1/2, 1/4, 1/8.

    Only sizes smaller than the map are taken; the weights taken sum to 1.

    Source: Chen et al. 2021, "Distilling Knowledge via Knowledge Review", arXiv:2104.09044, section 3.4; the weights
    are the authors' code's.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).

    Returns:
        (N,), 0 at equal maps.
    """
    loss = (student - teacher).square().flatten(1).mean(dim=1)
    total, weight = 1.0, 1.0
    for size in (4, 2, 1):
        if size >= student.shape[2]:
            continue
        weight /= 2
        total += weight
        s, t = (F.adaptive_avg_pool2d(x, size) for x in (student, teacher))
        loss = loss + weight * (s - t).square().flatten(1).mean(dim=1)
    return loss / total


class Fusion(nn.Module):
    """Attention-based fusion of a layer with what the layers after it gave. arXiv:2104.09044, figure 3.

    Args:
        pair: The layer and the teacher's.
        mid: Channels that are handed on.
        first: Whether it is the first in the review, the deepest layer, which has nothing to fuse with.
    """

    def __init__(self, pair: LayerPair, mid: int, first: bool) -> None:
        super().__init__()
        self.size = _size(pair.teacher_shape, pair)
        self.enter = nn.Sequential(nn.Conv2d(pair.student_width, mid, 1, bias=False), nn.BatchNorm2d(mid))
        self.leave = nn.Sequential(
            nn.Conv2d(mid, pair.teacher_width, 3, padding=1, bias=False), nn.BatchNorm2d(pair.teacher_width)
        )
        self.attend = None if first else nn.Conv2d(2 * mid, 2, 1)
        for layer in (*self.enter, *self.leave):
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_uniform_(layer.weight, a=1)

    def forward(self, x: Tensor, later: Tensor | None) -> tuple[Tensor, Tensor]:
        # (N, C, h, w), (N, mid, h', w') -> (N, C_t, H, W), (N, mid, H, W)
        x = self.enter(x)
        if self.attend is not None and later is not None:
            later = F.interpolate(later, x.shape[2:], mode="nearest")
            share = self.attend(torch.cat([x, later], dim=1)).sigmoid()  # (N, 2, h, w)
            x = x * share[:, :1] + later * share[:, 1:]
        if list(x.shape[2:]) != self.size:
            x = F.interpolate(x, self.size, mode="nearest")
        return self.leave(x), x


class ReviewKD(FeatureTerm):
    """Each layer, fused with those after it, like the teacher's layer. Chen et al. 2021, arXiv:2104.09044.

    The authors raise its weight over the first 20 of 240 epochs: `weight=LinearSchedule(0, 5, until=20 / 240)`.

    Args:
        layers: Which layers, at least two maps, vectors, or image transformer's tokens, taken as maps; see
            FeatureTerm.
        mid: Largest number of channels that are handed from layer to layer.
        weight: A number or a schedule; the authors' lie between 0.6 and 8, by pair of networks.
        name: The name it is logged under.

    Raises:
        TransferError: Before training, if a layer's tokens are no grid of patches.
    """

    def __init__(
        self,
        layers: Layers = "stages",
        mid: int = 512,
        weight: float | Schedule = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(layers, weight, name)
        self.mid = mid
        self.fusions = nn.ModuleList()

    def build(self) -> None:
        for pair in self.pairs:
            _size(pair.student_shape, pair)  # tokens without a grid are refused
        deepest = self.pairs[-1]
        mid = min(self.mid, deepest.student_width)
        self.fusions = nn.ModuleList(Fusion(pair, mid, pair is deepest) for pair in self.pairs)

    def forward(self, step: Step) -> Tensor:
        losses, later = [], None
        for pair, fusion in zip(reversed(self.pairs), reversed(self.fusions), strict=True):
            outputs = self.outputs(step, pair)
            refuse_sequences(*outputs, pair, attended(step))
            student, teacher = (x[..., None, None] if x.dim() == 2 else as_map(x, pair) for x in outputs)
            reviewed, later = fusion(student, later)
            losses.append(hierarchical_context(reviewed, teacher))
        return torch.stack(losses).sum(dim=0)  # (N,)


def _size(shape: tuple[int, ...], pair: LayerPair) -> list[int]:
    """Height and width of an example's value (C, H, W), (T, D) or (D,) as a map."""
    return [side_of(shape[0], pair)] * 2 if len(shape) == 2 else list(shape[1:]) or [1, 1]
