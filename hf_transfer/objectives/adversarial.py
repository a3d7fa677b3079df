"""Domain-adversarial training: features that a discriminator cannot tell domains apart by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TransferError
from ..objective import UNLABELLED, Objective, Schedule, SigmoidSchedule, Step
from ._labels import number_of

if TYPE_CHECKING:
    from ..anatomy import Anatomy


class _GradientReversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lambda_: float) -> Tensor:
        ctx.lambda_ = lambda_
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.lambda_ * grad, None


def gradient_reversal(x: Tensor, lambda_: float = 1.0) -> Tensor:
    """x, whose gradient comes back times -lambda_.

    Source: Ganin et al. 2016, "Domain-Adversarial Training of Neural Networks", arXiv:1505.07818.

    Args:
        x: Any shape.
        lambda_: Strength, >= 0.
    """
    return _GradientReversal.apply(x, lambda_)


class DANN(Objective):
    """A discriminator learns to tell the domains of features apart; the network learns that it cannot.

    It reads the `domain` of each row (-100 = none, which leaves the row out) and never its label. Between the features
    and the discriminator the gradient changes its sign and is scaled by `schedule`; `weight` scales both sides.

    Source: Ganin et al. 2016, arXiv:1505.07818.

    Args:
        hidden: Widths of the discriminator's hidden layers; the paper's for pretrained networks by default (its
            figure 4; it takes one layer of 100 for MNIST).
        schedule: lambda, a function of training progress in [0, 1] or a number.
        num_domains: Domains are 0 ... num_domains - 1.
        weight: A number or a schedule of training progress.
        name: The name it is logged under.

    Raises:
        TransferError: If an argument is out of its range; in training, if the batch has no `domain` or one that is not
            among the domains.
    """

    uses_features = True

    def __init__(
        self,
        hidden: Sequence[int] = (1024, 1024),
        schedule: float | Schedule = SigmoidSchedule(),  # noqa: B008 - frozen
        num_domains: int = 2,
        weight: float | Schedule = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        if num_domains < 2:
            raise TransferError(f"num_domains must be at least 2, got {num_domains!r}.")
        if any(width < 1 for width in hidden):
            raise TransferError(f"hidden must be widths of at least 1, got {list(hidden)!r}.")
        self.hidden, self.schedule, self.num_domains = tuple(hidden), schedule, num_domains
        self.discriminator = nn.Sequential()  # sized by prepare()

    def prepare(self, model: nn.Module, anatomy: Anatomy | None) -> None:
        self.discriminator = discriminator(feature_width(model, anatomy, self.name), self.hidden, self.num_domains)

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        domain = batch.get("domain")
        if domain is None:  # an evaluation batch, or forward() raises
            return number_of(None)
        has_domain = domain != UNLABELLED
        strange = has_domain & ((domain < 0) | (domain >= self.num_domains))
        if strange.any():
            raise TransferError(
                f"The term '{self.name}' got rows of domain {domain[strange].unique().tolist()}. Valid: 0 to "
                f"{self.num_domains - 1}, and -100 for none. For more domains pass num_domains."
            )
        return number_of(has_domain)

    def lambda_at(self, progress: float) -> float:
        """The strength of the reversed gradient at this progress in [0, 1]."""
        return self.schedule(progress) if callable(self.schedule) else self.schedule

    def forward(self, step: Step) -> Tensor:
        if step.domain is None:
            raise TransferError(
                f"The term '{self.name}' needs the rows' `domain` column (0 = source, 1 = target), and the batch has "
                "none. Build the data with hf_transfer.data.splits.combine(source=..., target=...)."
            )
        if step.features is None or step.features.dim() != 2:
            shape = None if step.features is None else tuple(step.features.shape)
            raise TransferError(
                f"The term '{self.name}' needs one feature vector a row, (N, D), got {shape}: a domain belongs to a "
                "row, and the features of token classification to its tokens."
            )
        features = step.features.to(next(self.discriminator.parameters()).dtype)  # (N, D)
        logits = self.discriminator(gradient_reversal(features, self.lambda_at(step.progress)))  # (N, domains)
        return F.cross_entropy(logits.float(), step.domain, ignore_index=UNLABELLED, reduction="none")  # (N,)


def discriminator(width: int, hidden: Sequence[int], num_domains: int) -> nn.Sequential:
    """A perceptron from (N, width) to (N, num_domains)."""
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(width, size), nn.ReLU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, num_domains))


def feature_width(model: nn.Module, anatomy: Anatomy | None, term: str) -> int:
    """The width of the model's features, which are the input of its classifier.

    Raises:
        TransferError: If the model has no classifier, or it is not a linear or convolutional layer.
    """
    from ..anatomy import plain_model

    name = anatomy.classifiers[0] if anatomy is not None and anatomy.classifiers else None
    layer = None if name is None else plain_model(model).get_submodule(name)
    for attribute in ("in_features", "in_channels"):  # PEFT's layers carry the former, for convolutions too
        width = getattr(layer, attribute, None)
        if isinstance(width, int):
            return width
    raise TransferError(
        f"The term '{term}' needs the width of the features, the input of the classifier, and found "
        + ("no classifier" if layer is None else f"'{name}', a {type(layer).__name__} without in_features")
        + f" in {type(model).__name__}. Load a model with a classification head, or drop the term."
    )
