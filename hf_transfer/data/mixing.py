"""mixup and CutMix: a batch's images blended in pairs, with the labels blended alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..errors import TransferError
from .labels import UNLABELLED
from .replay import key


@dataclass(frozen=True)
class Mixing:
    """Blends the labelled rows of a batch in pairs, first with last, as timm's Mixup does in batch mode.

    Unlabelled rows (-100) are left as they are: a blend with an unknown label has no label.
    Sources: mixup, Zhang et al. 2017, arXiv:1710.09412; CutMix, Yun et al. 2019, arXiv:1905.04899.

    Args:
        mixup: alpha of the Beta distribution of mixup's ratio, >= 0; 0 is no mixup.
        cutmix: alpha of CutMix's, >= 0; 0 is no CutMix. With both, each batch takes one of them, by a fair coin.
        num_classes: C.
        seed: Same seed, epoch and rows, same blend.

    Raises:
        TransferError: If an alpha is negative, or there are not two classes.
    """

    mixup: float
    cutmix: float
    num_classes: int
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.mixup, self.cutmix) < 0 or max(self.mixup, self.cutmix) == 0:
            raise TransferError(f"mixup={self.mixup}, cutmix={self.cutmix}: alphas are >= 0, and one is above 0.")
        if self.num_classes < 2:
            raise TransferError(f"mixup and CutMix blend classes; the backbone has {self.num_classes} output.")

    def __call__(
        self, pixels: Tensor, labels: Tensor, example_ids: Sequence[int], epoch: int
    ) -> tuple[Tensor, Tensor]:
        """Blends one batch.

        Args:
            pixels: (N, C, H, W).
            labels: (N,) int64; -100 = unlabelled.
            example_ids: N identities of the rows.
            epoch: Counted from 0.

        Returns:
            The pixels, and soft labels (N, num_classes) float32 that sum to 1; -100 throughout on unlabelled rows.
        """
        labelled = torch.nonzero(labels != UNLABELLED).flatten()  # (L,)
        soft = torch.full((len(labels), self.num_classes), float(UNLABELLED))
        if not len(labelled):
            return pixels, soft
        generator = np.random.default_rng(key(self.seed, epoch, *example_ids))
        own = pixels[labelled]
        mixed, share = self._blend(own, own.flip(0), generator)
        hard = one_hot(labels[labelled], self.num_classes).float()  # (L, C)
        soft[labelled] = share * hard + (1 - share) * hard.flip(0)
        return pixels.index_copy(0, labelled, mixed), soft

    def _blend(self, a: Tensor, b: Tensor, generator: np.random.Generator) -> tuple[Tensor, float]:
        """One ratio for the batch; returns the images and a's share in them."""
        cut = self.cutmix > 0 and (self.mixup == 0 or generator.random() < 0.5)
        alpha = self.cutmix if cut else self.mixup
        share = float(generator.beta(alpha, alpha))
        if not cut:
            return share * a + (1 - share) * b, share
        height, width = a.shape[-2:]
        rows, columns = _box(height, width, share, generator)
        mixed = a.clone()
        mixed[..., rows, columns] = b[..., rows, columns]
        area = (rows.stop - rows.start) * (columns.stop - columns.start)
        return mixed, 1 - area / (height * width)  # what was really kept: the border clips boxes


def _box(height: int, width: int, share: float, generator: np.random.Generator) -> tuple[slice, slice]:
    """A box of 1 - share of the area around a uniform centre, clipped to the image."""
    side = np.sqrt(1 - share)
    h, w = int(height * side), int(width * side)
    y, x = int(generator.integers(height)), int(generator.integers(width))
    return (
        slice(max(y - h // 2, 0), min(y + (h + 1) // 2, height)),
        slice(max(x - w // 2, 0), min(x + (w + 1) // 2, width)),
    )
