"""From a batch that was made for the student to what the teacher takes, of the very same augmented examples."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.text_transforms import token_limit
from ..dissection.wrapping import plain_model
from ..errors import TransferError
from ..objective import CONTRACT_COLUMNS
from .image_bridge import ImageBridge
from .same_inputs import difference, marks_pairs, second_text
from .teacher_inputs import TeacherInputs as TeacherInputs
from .teacher_inputs import teacher_part
from .teacher_inputs import with_teacher_inputs as with_teacher_inputs
from .teacher_inputs import without_teacher_inputs as without_teacher_inputs

if TYPE_CHECKING:
    from ..backbones import Backbone

MAIN_INPUTS = {
    "image": ("pixel_values",),
    "text": ("input_ids",),
    "audio": ("input_values", "input_features"),
}
_BY_TOKEN = ("token-classification", "causal-lm")


def reads_otherwise(teacher: Backbone, student: Backbone) -> bool:
    """Whether batches must carry the teacher's own inputs, because it reads text or sound otherwise."""
    modality = teacher.modality
    return modality != "image" and difference(student.processor, teacher.processor, modality) is not None


class Bridge:
    """A collated batch of the student's -> the teacher's inputs.

    Images are rescaled and resized (`ImageBridge`). Text and audio pass as they are where both networks read the same;
    otherwise, and wherever the batch has them, the teacher's inputs are the columns `teacher_...`, which
    `with_teacher_inputs` adds to the rows and `TeacherInputs` collates.

    Args:
        student: Whose batches come.
        teacher: What they are for.

    Attributes:
        needs_columns: Whether only `teacher_...` columns will do.

    Raises:
        TransferError: If no batch of the student's could be made the teacher's.
    """

    def __init__(self, student: Backbone, teacher: Backbone) -> None:
        if student.modality != teacher.modality:
            raise TransferError(
                f"The teacher {teacher.name!r} takes {teacher.modality}, the student {student.name!r} "
                f"{student.modality}: choose a teacher of the same modality."
            )
        self.modality = teacher.modality
        self.takes = _forward_names(teacher.model)
        self.by_name = any(name in self.takes for name in MAIN_INPUTS[self.modality])
        self._images = ImageBridge(student, teacher) if self.modality == "image" else None
        self._difference = None
        self._limit: int | None = None
        self._separator: int | None = None
        if self.modality != "image":
            self._difference = difference(student.processor, teacher.processor, self.modality)
            self._refuse_other_tokens(teacher)
        if self.modality == "text" and teacher.processor is not None:
            self._limit = token_limit(teacher) if getattr(teacher.model, "config", None) is not None else None
            if "token_type_ids" in self.takes and marks_pairs(teacher.processor):
                self._separator = teacher.processor.sep_token_id

    @property
    def needs_columns(self) -> bool:
        """Whether batches must carry the teacher's own inputs."""
        return self._difference is not None

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The teacher's inputs, on the batch's device.

        Raises:
            TransferError: If the batch lacks them, or they are longer than the teacher takes.
        """
        inputs = teacher_part(batch)
        if not inputs:
            inputs = self._from_students({k: v for k, v in batch.items() if k not in CONTRACT_COLUMNS})
        inputs = {name: value for name, value in inputs.items() if name in self.takes or not self.by_name}
        main = next((inputs[name] for name in MAIN_INPUTS[self.modality] if name in inputs), None)
        if main is None:
            raise TransferError(
                f"The batch has {', '.join(batch) or 'nothing'}, of which the teacher takes {list(inputs)}: it needs "
                f"{' or '.join(MAIN_INPUTS[self.modality])}."
            )
        if self._limit is not None and main.shape[1] > self._limit:
            raise TransferError(
                f"The batch has {main.shape[1]} tokens a row, and the teacher takes {self._limit}: prepare the data "
                f"with max_length={self._limit}."
            )
        return inputs

    def run(self, model: Any, inputs: Mapping[str, Tensor]) -> Any:
        """Calls the teacher; a module that does not name its input gets it as the first argument."""
        if not self.by_name:
            return model(next(inputs[name] for name in MAIN_INPUTS[self.modality] if name in inputs))
        return model(**inputs, **({"use_cache": False} if "use_cache" in self.takes else {}))

    def _from_students(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._images is not None:
            return {"pixel_values": self._images(batch["pixel_values"])} if "pixel_values" in batch else {}
        if self._difference is not None:
            raise TransferError(_other_inputs(self.modality, self._difference))
        if self._separator is None or "token_type_ids" in batch or "input_ids" not in batch:
            return batch
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids))
        return {**batch, "token_type_ids": second_text(ids, mask, self._separator)}

    def _refuse_other_tokens(self, teacher: Backbone) -> None:
        if self._difference is not None and teacher.task in _BY_TOKEN:
            raise TransferError(
                f"The student and the teacher {teacher.name!r} have different tokenizers ({self._difference}), and "
                f"task={teacher.task!r} compares them token by token. Choose a teacher with the student's tokenizer"
                + ("." if teacher.task != "causal-lm" else ", or train on what it writes: generate_targets().")
            )

    def __str__(self) -> str:
        return str(self._images) if self._images is not None else f"{self.modality} {self._difference}"


def _forward_names(model: nn.Module) -> frozenset[str]:
    """The inputs that a model's forward names; labels are none of its business here."""
    names = inspect.signature(plain_model(model).forward).parameters
    return frozenset(names) - {"labels"}


def _other_inputs(modality: str, difference: str) -> str:
    kind = "tokenizers" if modality == "text" else "feature extractors"
    return (
        f"The student and the teacher have different {kind} ({difference}), and the batch does not carry the "
        f"teacher's own inputs. Prepare the same rows for both, train on hf_transfer.distillation.bridge."
        "with_teacher_inputs(student_rows, teacher_rows) and collate with TeacherInputs(collator_for(student), "
        "collator_for(teacher))."
    )
