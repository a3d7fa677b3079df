"""Training from a prefix cache: the ordinary trainer and the user's network, which goes on from what was stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import TransferError
from ..objective import Learner, Objective
from ..trainer import TransferTrainer, _anatomy
from .cut import Cut
from .rows import ACTIVATION, PLACE


class CachedLearner(Learner):
    """A Learner whose network goes on from what a batch holds under ACTIVATION; it runs whole on other batches.

    Args:
        cut: Where the network is cut; the other arguments are Learner's.
    """

    def __init__(self, model: Any, objectives: Sequence[Objective], anatomy: Any, cut: Cut) -> None:
        super().__init__(model, objectives, anatomy)
        self.cut = cut

    def _outputs(self, inputs: dict[str, Any]) -> Any:
        value = inputs.pop(ACTIVATION, None)
        if value is None:
            return super()._outputs(inputs)
        return self.cut.rest(inputs, value.to(self.cut.dtype, memory_format=self.cut.memory_format))


class CachedTrainer(TransferTrainer):
    """A TransferTrainer that trains on cached activations what lies behind a cut.

    `model` is the whole network: it is what is saved, and what evaluates rows that are not cached.

    Args:
        *args: As for TransferTrainer.
        cut: Where the network is cut.
        **kwargs: As for TransferTrainer: datasets are CachedRows or ordinary ones, the collator is a CachedCollator.

    Raises:
        TransferError: If there are no objectives: the model's own loss cannot start from the cut.
    """

    def __init__(self, *args: Any, cut: Cut, **kwargs: Any) -> None:
        self.cut = cut
        if not kwargs.get("objectives"):
            raise TransferError("CachedTrainer needs objectives, for example [CrossEntropy()].")
        super().__init__(*args, **kwargs)

    def make_learner(self) -> Learner:
        """The Learner that goes on from the cut."""
        return CachedLearner(self.model, self.objectives, _anatomy(self.model), self.cut)

    def why_no_fsdp(self) -> str | None:
        """A network that goes on from a cut."""
        return "cached activations of frozen layers: train the network whole, TransferTrainer or cache='never'"

    def extra_columns(self) -> Sequence[str]:
        """Where a row's activation is."""
        return (PLACE,)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        """As it is: its batches hold no other columns, and some come whole."""
        return data_collator

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: transformers knows only those of the whole network."""
        return 0
