"""A student with adapters taught by its own base, in the same memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..adapters import is_adapted
from ..anatomy import plain_model, plain_name
from ..errors import TransferError
from .live import NetworkTeacher, refuse_fresh_head

if TYPE_CHECKING:
    from ..backbones import Backbone


class AdapterOffTeacher(NetworkTeacher):
    """A student with adapters taught by its own base: the same weights with the adapter off, no second copy.

    The student's modes and what of it trains are as they were after each answer.

    Args:
        student: A PeftModel whose base already does the task; it is placed and trained by whoever trains it.

    Raises:
        TransferError: If it has no adapter, or its base has a head that was never trained.
    """

    def __init__(self, student: Backbone) -> None:
        if not is_adapted(student.model):
            raise TransferError(
                f"{student.name!r} has no adapter to switch off: apply LoRA() first, or give another teacher."
            )
        refuse_fresh_head(student, base=True)
        _refuse_training_base(student.model)
        super().__init__(student, student)
        self._modules = list(student.model.modules())
        self._adapted = [m for m in self._modules if isinstance(m, _adapter_layers())]

    @contextmanager
    def answering(self) -> Iterator[None]:
        """As a teacher's, with the adapter off; the student's modes come back on exit."""
        training = [module for module in self._modules if module.training]
        try:
            for module in training:
                vars(module)["training"] = False  # nn.Module's own setattr would take milliseconds
            with self._adapter_off(), super().answering():
                yield
        finally:
            for module in training:
                vars(module)["training"] = True

    def _forward(self, inputs: Mapping[str, Tensor]) -> Any:
        """Of the network inside, past peft's own forward: a learned prompt is no layer, and is added there."""
        return self.bridge.run(plain_model(self.backbone.model), inputs)

    @contextmanager
    def _adapter_off(self) -> Iterator[None]:
        """What `PeftModel.disable_adapter` does for the length of a forward.

        peft's own (0.21) walks the network many times, 40 ms for 12 layers, on leaving makes all of an adapter
        trainable, what was frozen in it too, and fails for prompts of classifiers. To a layer it does just this.
        """
        on: list[Any] = [layer for layer in self._adapted if not layer.disable_adapters]
        try:
            for layer in on:
                layer._disable_adapters = True
            if on and not on[0].disable_adapters:
                raise TransferError("This release of peft switches adapters off in another way: install peft 0.21.")
            yield
        finally:
            for layer in on:
                layer._disable_adapters = False


def _adapter_layers() -> tuple[type, ...]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return (BaseTunerLayer, AuxiliaryTrainingWrapper)


def _refuse_training_base(model: Any) -> None:
    """Refuses a base that moves with the student: biases that LoRA trains, say."""
    adapters = set(model.peft_config)
    moving = [n for n, p in model.named_parameters() if p.requires_grad and adapters.isdisjoint(n.split("."))]
    if moving:
        raise TransferError(
            f"The student's base trains too ({len(moving)} tensors, first {plain_name(moving[0])}), so that it cannot "
            "be the teacher: freeze it, or give a copy from before as teacher."
        )
