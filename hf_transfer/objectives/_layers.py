"""Terms that compare layers with a teacher's: which layers, in which layout, and the projector between two widths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TransferError
from ..objective import Objective, Schedule, Step
from ._teacher import rows_of, teacher_of

if TYPE_CHECKING:
    from ..anatomy import Anatomy

FEATURES = "features"
"""The layer that both networks have: the input of the classifier."""
MOST_PREFIX_TOKENS = 8  # class, distillation and register tokens before the grid of an image transformer

Role = Literal["hidden", "embedding", "query", "key", "value"]
Layout = Literal["map", "tokens", "vector"]
Layers = str | float | Sequence[str | float] | Mapping[Any, Any]


@dataclass(frozen=True)
class LayerPair:
    """A layer of the student beside one of the teacher.

    Attributes:
        student: Module path in the student, or "features" for the input of the classifier.
        teacher: The same in the teacher.
        student_shape: Of one example's value there, without the batch: (C, H, W), (T, D) or (D,).
        teacher_shape: The same in the teacher.
        role: What the layer puts out; terms about attention have queries, keys and values of their own.
    """

    student: str
    teacher: str
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]
    role: Role = "hidden"

    @property
    def layout(self) -> Layout:
        """How the two can be compared: a vector if either is one, tokens if both have as many, else maps."""
        shapes = (self.student_shape, self.teacher_shape)
        if min(map(len, shapes)) == 1:
            return "vector"
        return "tokens" if max(map(len, shapes)) == 2 and shapes[0][0] == shapes[1][0] else "map"

    @property
    def student_width(self) -> int:
        """Channels, or hidden size."""
        return _width(self.student_shape)

    @property
    def teacher_width(self) -> int:
        """Channels, or hidden size."""
        return _width(self.teacher_shape)

    def __str__(self) -> str:
        return f"{self.student} {self.student_shape} ~ {self.teacher} {self.teacher_shape}"


class FeatureTerm(Objective):
    """A term that compares layers of the student with layers of the teacher.

    `layers` says which, in the user's words. Whoever knows both networks resolves it into `LayerPair`s and hands them
    to `connect`, once, before training: only then can the term size what it owns. With `layers="features"` it is the
    input of the two classifiers.

    Args:
        layers: "last", "uniform", "stages", "features", names, depths in [0, 1], or student -> teacher of these.
        weight: A number or a schedule of training progress.
        name: The name it is logged under.
    """

    def __init__(self, layers: Layers, weight: float | Schedule = 1.0, name: str | None = None) -> None:
        super().__init__(weight, name)
        self.layers = layers
        self.uses_features = layers == FEATURES
        self.pairs: tuple[LayerPair, ...] = ()

    def connect(self, pairs: Sequence[LayerPair]) -> None:
        """Tells which layers to compare and their shapes; makes what the term owns.

        Args:
            pairs: At least one, input to output.

        Raises:
            TransferError: If the term cannot compare them.
        """
        if not pairs:
            raise TransferError(f"The term '{self.name}' got no layers to compare for layers={self.layers!r}.")
        self.pairs = tuple(pairs)
        self.build()

    def build(self) -> None:
        """Makes what the term owns, from `pairs`."""

    @property
    def student_layers(self) -> tuple[str, ...]:
        """Modules of the student whose output `forward` reads in `step.hidden`."""
        return tuple(dict.fromkeys(pair.student for pair in self.pairs if pair.student != FEATURES))

    @property
    def teacher_layers(self) -> tuple[str, ...]:
        """Modules of the teacher whose output `forward` reads in `step.teacher.hidden`."""
        return tuple(dict.fromkeys(pair.teacher for pair in self.pairs if pair.teacher != FEATURES))

    def prepare(self, model: nn.Module, anatomy: Anatomy | None) -> None:
        if not self.pairs:
            raise TransferError(
                f"The term '{self.name}' compares layers with a teacher's and was not told which: use "
                "DistillationTrainer, or call connect() with LayerPairs before training."
            )

    def count(self, batch: Mapping[str, Any]) -> Tensor | None:
        return rows_of(batch)

    def values(self, step: Step, pair: LayerPair) -> tuple[Tensor, Tensor, Tensor | None]:
        """A pair's values in one layout, (N, ...) each, and which tokens count, (N, T) bool or None for all.

        Raises:
            TransferError: If one is missing, or they cannot be brought into one layout.
        """
        return same_layout(*self.outputs(step, pair), pair, attended(step))

    def outputs(self, step: Step, pair: LayerPair) -> tuple[Tensor, Tensor]:
        """What a pair's two layers put out, as they are.

        Raises:
            TransferError: If one is missing.
        """
        signal = teacher_of(step, self.name)
        if pair.student == FEATURES:
            student, held = step.features, ["no features"]
        else:
            hidden = step.hidden
            student, held = hidden.get(pair.student), list(hidden)
        teacher = signal.features if pair.teacher == FEATURES else signal.hidden.get(pair.teacher)
        if student is None:
            raise TransferError(f"The term '{self.name}' needs the student's '{pair.student}', and has {held}.")
        if teacher is None:
            raise TransferError(
                f"The term '{self.name}' needs the teacher's '{pair.teacher}', and its signal has {signal.contents()}."
            )
        # autograd refuses to keep what was made in inference mode; a cache and a teacher of its own dtype are narrower
        if not torch.compiler.is_compiling() and teacher.is_inference():  # a graph cannot ask; of ours none is
            teacher = teacher.clone()
        return student, teacher.to(torch.promote_types(teacher.dtype, student.dtype))


class Projector(nn.Module):
    """From the student's width to the teacher's at every position: a linear map; nothing where the widths agree."""

    def __init__(self, pair: LayerPair) -> None:
        super().__init__()
        self.layout = pair.layout
        same = pair.student_width == pair.teacher_width
        self.linear = nn.Identity() if same else nn.Linear(pair.student_width, pair.teacher_width)

    def forward(self, x: Tensor) -> Tensor:
        # (N, C, H, W), (N, T, D) or (N, D)
        return self.linear(x.movedim(1, -1)).movedim(-1, 1) if self.layout == "map" else self.linear(x)


def same_layout(
    student: Tensor, teacher: Tensor, pair: LayerPair, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Brings two values into one layout; of two maps the larger is averaged to the smaller one's size.

    Args:
        student: (N, C, H, W), (N, T, D) or (N, D).
        teacher: The same.
        pair: Where they come from.
        mask: (N, T) bool, attended tokens of the input; read where a value has these tokens.

    Returns:
        Two (N, C, h, w), two (N, T, D) or two (N, D); and the mask, if they are tokens of this mask.
    """
    if pair.layout == "vector":
        return pooled(student, mask), pooled(teacher, mask), None
    if pair.layout == "tokens":
        if student.shape[:2] != teacher.shape[:2]:
            raise TransferError(
                f"The layers {pair} have tokens of shape {tuple(student.shape[:2])} and {tuple(teacher.shape[:2])}: "
                "token by token they compare only if both networks split the input the same way."
            )
        return student, teacher, mask_of(student, mask)
    refuse_sequences(student, teacher, pair, mask)
    student, teacher = as_map(student, pair), as_map(teacher, pair)
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return _resized(student, size), _resized(teacher, size), None


def refuse_sequences(student: Tensor, teacher: Tensor, pair: LayerPair, mask: Tensor | None) -> None:
    """Raises TransferError where values are the tokens of a sequence, which cannot be made maps."""
    if mask_of(student, mask) is not None or mask_of(teacher, mask) is not None:
        raise TransferError(f"The layers {pair} hold the tokens of a sequence, which have no grid to compare on.")


def attended(step: Step) -> Tensor | None:
    """(N, T) bool, the tokens of the input that are no padding; None where the input has no attention mask."""
    mask = step.inputs.get("attention_mask")
    return None if mask is None else mask.bool()


def mask_of(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask, if x has its tokens: audio's is over samples, and an image has none."""
    return mask if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape else None


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of each row over all that follows, or over the tokens that count: (N, ...) -> (N,).

    Args:
        x: (N, ...), or (N, T, ...) with a mask.
        mask: (N, T) bool. A row without tokens that count has 0.
    """
    if mask is None:
        return x if x.dim() == 1 else x.flatten(1).mean(dim=1)
    per_token = x.flatten(2).mean(dim=2) if x.dim() > 2 else x  # (N, T)
    return torch.where(mask, per_token, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def _width(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 3 else shape[-1]


def pooled(x: Tensor, mask: Tensor | None) -> Tensor:
    """(N, D): the mean over positions, or over attended tokens."""
    if x.dim() == 4:
        return x.mean(dim=(2, 3))
    mask = mask_of(x, mask)
    if mask is None:
        return x.mean(dim=1) if x.dim() == 3 else x
    return (x * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def as_map(x: Tensor, pair: LayerPair) -> Tensor:
    """(N, C, H, W): the patches of an image transformer on their square grid, without the tokens before them.

    Raises:
        TransferError: If they have no such grid.
    """
    if x.dim() == 4:
        return x
    side = side_of(x.shape[1], pair)
    return x[:, x.shape[1] - side**2 :].transpose(1, 2).unflatten(2, (side, side))


def side_of(tokens: int, pair: LayerPair) -> int:
    """Side of the square grid that the last of an image transformer's tokens are.

    Raises:
        TransferError: If there are too many tokens before it.
    """
    side = math.isqrt(tokens)
    if tokens - side**2 > MOST_PREFIX_TOKENS:
        raise TransferError(
            f"The layers {pair}: {tokens} tokens are no square grid of patches after at most "
            f"{MOST_PREFIX_TOKENS} other tokens. Use square images, or layers with equal numbers of tokens."
        )
    return side


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size)
