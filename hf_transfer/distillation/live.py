"""Teachers that run a network for every batch."""

from __future__ import annotations

import copy
import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from .. import fsdp
from ..adapters import adaptable_layers, is_adapted
from ..anatomy import Taps, plain_model, plain_name
from ..errors import TransferError
from ..objective import logits_of, match_rows
from .base import Teacher
from .bridge import Bridge
from .label_map import class_map
from .signal import TeacherSignal

if TYPE_CHECKING:
    from ..backbones import Backbone

logger = logging.getLogger(__name__)


class NetworkTeacher(Teacher):
    """What live teachers have in common: bridge, forward in inference mode, class order, taps.

    Attributes:
        backbone: The network; its model and anatomy are what layers are named by.
        bridge: Turns a student's batch into the teacher's inputs.
        classes: Which of its logits the student's classes are.
    """

    def __init__(self, teacher: Backbone, student: Backbone) -> None:
        if teacher.task != student.task:
            raise TransferError(
                f"The teacher {teacher.name!r} was made for {teacher.task}, the student {student.name!r} for "
                f"{student.task}: choose a teacher of the student's task."
            )
        self.backbone = teacher
        self.bridge = Bridge(student, teacher)
        self.classes = class_map(student, teacher)
        self.labels, self.task = student.labels, student.task
        self.sharded = False  # whether this process holds a part of it only
        self._layers = self._features = Taps(teacher.model, [])

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.backbone.model.parameters()).device

    def watch(self, layers: Sequence[str] = (), features: bool = False) -> None:
        model: Any = self.backbone.model
        self._layers = Taps(model, list(layers))
        self._features = Taps(model, self.backbone.anatomy.classifiers[:1] if features else [], inputs=True)

    def networks(self) -> list[nn.Module]:
        return [self.backbone.model]

    def __call__(self, batch: Mapping[str, Tensor]) -> TeacherSignal:
        home = next(value.device for value in batch.values() if torch.is_tensor(value))
        with self.answering(), self._layers as layers, self._features as features:
            inputs = {name: self._placed(value) for name, value in self.bridge(batch).items()}
            all_logits = logits_of(self._forward(inputs))
            mask = inputs.get("attention_mask")
            signal = TeacherSignal(
                logits=self.classes(all_logits),
                features=next((match_rows(found, all_logits, mask) for found in features.values.values()), None),
                hidden=dict(layers.values),
            )
            layers.values.clear()  # the taps outlive the batch, its tensors should not
            features.values.clear()
        return _for_autograd(signal.to(home))

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Where the network runs: eval mode, inference mode, in its own precision under any autocast around."""
        model: nn.Module = self.backbone.model
        if model.training:
            model.eval()
        # parts are gathered into tensors that outlive the batch, which inference mode would taint
        without_gradients = torch.no_grad() if self.sharded else torch.inference_mode()
        with without_gradients, torch.autocast(self.device.type, enabled=False):
            yield

    def _forward(self, inputs: Mapping[str, Tensor]) -> Any:
        return self.bridge.run(self.backbone.model, inputs)

    def _placed(self, value: Tensor) -> Tensor:
        """An input where the network is, floating ones in its dtype."""
        return value.to(self.device, _dtype(self.backbone.model) if value.is_floating_point() else None)

    def fingerprint(self) -> str:
        return self._digest()

    def _digest(self, *more: object) -> str:
        digest = hashlib.sha256()
        model: Any = self.backbone.model
        parts = (type(plain_model(model)).__name__, _dtype(model), self.bridge, self.classes, *more)
        digest.update("|".join(map(str, parts)).encode())
        for name, value in sorted(_own_weights(model), key=lambda item: item[0]):
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(cast(Any, data.numpy()))
        return digest.hexdigest()


class LiveTeacher(NetworkTeacher):
    """A network that answers for every batch.

    It runs in eval mode, in inference mode, in its own dtype, on its own input size and scale, and is never trained.

    Args:
        teacher: The network, for the student's task. A head that was never trained is refused by `as_teacher`, not
            here.
        student: Whose batches it answers for, and whose class order it answers in.
        dtype: Floating dtype it computes in. "auto" keeps that of its weights; another converts a copy of it.
        compile: Whether to run it through `torch.compile`; not with layers or features watched.
        quantize: Whether its Linear layers compute in int8 (weights and inputs, dynamically, by `torch.ao`), on the
            CPU and from float32 only; a copy is quantised.

    Raises:
        TransferError: If the two do not fit, or an option does not apply.
    """

    def __init__(
        self,
        teacher: Backbone,
        student: Backbone,
        *,
        dtype: Literal["auto"] | torch.dtype = "auto",
        compile: bool = False,
        quantize: bool = False,
    ) -> None:
        if compile and quantize:
            raise TransferError("compile=True and quantize=True do not go together: torch.compile does not see int8.")
        if shares_weights(teacher.model, student.model):
            raise TransferError(
                "The teacher and the student share parameters, so that the teacher would change as the student "
                "trains. Give the teacher a copy, copy.deepcopy(model); a LoRA student's base is AdapterOffTeacher."
            )
        if teacher.model.training:
            logger.warning("the teacher %s came in train mode; it is put into eval mode", teacher.name)
            teacher.model.eval()
        super().__init__(_in_dtype(teacher, dtype), student)
        self.compiled, self.quantized = compile, quantize
        self._fingerprint: str | None = None
        if quantize:
            self._fingerprint = self._digest("int8")  # of the weights before, which are then gone
            self.backbone = _quantized(self.backbone)
        self._run: Any = torch.compile(self.backbone.model) if compile else self.backbone.model

    def watch(self, layers: Sequence[str] = (), features: bool = False) -> None:
        if self.compiled and (layers or features):
            raise TransferError("Layers and features are read by hooks, which compile=True leaves out: turn it off.")
        super().watch(layers, features)

    def networks(self) -> list[nn.Module]:
        return [] if self.compiled else super().networks()  # hooks are left out, and every new size is compiled anew

    def to(self, device: torch.device | str) -> LiveTeacher:
        device = torch.device(device)
        if self.quantized and device.type != "cpu":
            raise TransferError(f"quantize=True computes on the CPU, and the teacher is to be placed on {device}.")
        model: Any = self.backbone.model
        if getattr(model, "hf_device_map", None) is None:  # else accelerate spread it over devices
            model.to(device)
        return self

    def shard(self) -> LiveTeacher:
        """Leaves each process a part of the network, which all must then ask equally often.

        Raises:
            TransferError: If it is compiled or quantised.
        """
        if self.compiled or self.quantized:
            raise TransferError("A teacher is not cut into parts with compile=True or quantize=True: leave these out.")
        fsdp.shard(self.backbone.model, self.backbone.anatomy)
        self.sharded = True
        return self

    def _forward(self, inputs: Mapping[str, Tensor]) -> Any:
        return self.bridge.run(self._run, inputs)

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = self._digest()
        return self._fingerprint


def _for_autograd(signal: TeacherSignal) -> TeacherSignal:
    """With layers and features that terms may compute with: autograd refuses to keep what is of inference mode."""
    features = None if signal.features is None else signal.features.clone()
    return replace(signal, features=features, hidden={name: value.clone() for name, value in signal.hidden.items()})


def refuse_fresh_head(backbone: Backbone, *, base: bool = False) -> None:
    """Refuses a network whose last layers start at random: it knows nothing of the task.

    `load_backbone` notes which tensors the checkpoint lacked. A head saved whole with an adapter counts as trained
    when it is no longer what the base has.

    Args:
        backbone: The network.
        base: Whether its adapter will be off.

    Raises:
        TransferError: If tensors behind its last block are new.
    """
    model: Any = backbone.model
    plain = plain_model(model)
    fresh = () if getattr(plain, "was_trained", False) else getattr(plain, "fresh_parameters", ())
    fresh = [name for name in fresh if backbone.anatomy.group(name) > backbone.anatomy.depth]
    if is_adapted(model) and not base:
        fresh = [name for name in fresh if not _differs_from_base(model, name)]
    if fresh:
        raise TransferError(
            f"The teacher {backbone.name!r} starts with new weights in {', '.join(fresh[:4])}: its checkpoint has no "
            "head for this task, and what it says is random. Fine-tune it first. If it was trained in this process by "
            "other means than a TransferTrainer, say so with LiveTeacher(teacher, student)."
        )


def _differs_from_base(model: Any, name: str) -> bool:
    """Whether an adapter's own copy of a base's tensor is not that tensor."""
    state = {key: value for key, value in model.state_dict().items() if plain_name(key) == name}
    original = [value for key, value in state.items() if "original_module" in key.split(".")]
    own = [value for key, value in state.items() if "modules_to_save" in key.split(".")]
    return any(not torch.equal(a, b) for a, b in zip(own, original, strict=False))


def shares_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks have a parameter in common."""
    return not {id(p) for p in a.parameters()}.isdisjoint(id(p) for p in b.parameters())


def _own_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """State of a network without what its adapters add, by plain names."""
    adapters = set(model.peft_config) if is_adapted(model) else set()
    for name, value in model.state_dict().items():
        if adapters.isdisjoint(name.split(".")):
            yield plain_name(name), value


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _in_dtype(teacher: Backbone, dtype: Any) -> Backbone:
    if dtype == "auto" or dtype == _dtype(teacher.model):
        return teacher
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TransferError(f'dtype={dtype!r}: valid are "auto" and a floating dtype of torch, e.g. torch.bfloat16.')
    model: Any = copy.deepcopy(teacher.model)
    return replace(teacher, model=model.to(dtype))


def _quantized(teacher: Backbone) -> Backbone:
    """A copy whose Linear layers in blocks and neck compute in int8."""
    model: Any = teacher.model
    if is_adapted(model):
        raise TransferError(
            "quantize=True does not reach through adapters: merge them first, hf_transfer.tuning.merge."
        )
    if _dtype(model) != torch.float32:
        raise TransferError(f"quantize=True starts from float32, and the teacher is {_dtype(model)}: load it so.")
    if next(model.parameters()).device.type != "cpu":
        raise TransferError("quantize=True computes on the CPU: move the teacher there, or leave it out.")
    linear = [name for name, layer in adaptable_layers(model, teacher.anatomy).items() if type(layer) is nn.Linear]
    if not linear:
        raise TransferError(
            f"quantize=True concerns Linear layers, and the blocks of {teacher.name!r} have none: leave it out."
        )
    with warnings.catch_warnings():
        # torch says to move to torchao, which this package does not depend on. Goes with torch.ao.quantization.
        warnings.filterwarnings("ignore", message="torch.ao.quantization is deprecated", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
        from torch.ao.quantization import default_dynamic_qconfig, quantize_dynamic

        quantized = quantize_dynamic(model, dict.fromkeys(linear, default_dynamic_qconfig))
    logger.info("%d Linear layers of the teacher compute in int8", len(linear))
    copied = replace(teacher, model=quantized)
    copied.__dict__["anatomy"] = teacher.anatomy  # as it was: int8 layers are of other classes
    return copied
