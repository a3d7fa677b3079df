"""as_teacher(): whatever a user calls a teacher, made to answer for a student's batches."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from ..adapters import is_adapted, merge
from ..anatomy import plain_model
from ..errors import TransferError
from .adapter_off import AdapterOffTeacher as AdapterOffTeacher
from .base import Teacher as Teacher
from .ensemble import EnsembleTeacher as EnsembleTeacher
from .live import LiveTeacher as LiveTeacher
from .live import NetworkTeacher as NetworkTeacher
from .live import refuse_fresh_head, shares_weights

if TYPE_CHECKING:
    import torch

    from ..backbones import Backbone

logger = logging.getLogger(__name__)


def as_teacher(
    teacher: str | os.PathLike[str] | nn.Module | Backbone | Teacher | Sequence[Any],
    student: Backbone,
    *,
    dtype: Literal["auto"] | torch.dtype = "auto",
    compile: bool = False,
    quantize: bool = False,
) -> Teacher:
    """Makes a teacher of a student.

    Args:
        teacher: A folder or Hub id, a Backbone, a module (which is taken to read the student's inputs as they are), a
            Teacher, which stays what it is, or a list of these for an ensemble of equal weights. The base of a LoRA
            student, or the student itself, gives its AdapterOffTeacher.
        student: What it teaches.
        dtype: See LiveTeacher.
        compile: See LiveTeacher.
        quantize: See LiveTeacher.

    Returns:
        What answers for a batch.

    Raises:
        TransferError: If it was never trained for the task, or cannot teach this student.
    """
    options: dict[str, Any] = {"dtype": dtype, "compile": compile, "quantize": quantize}
    if isinstance(teacher, list | tuple):
        return EnsembleTeacher([as_teacher(each, student, **options) for each in teacher])
    if isinstance(teacher, Teacher):
        _refuse_options(options, f"a {type(teacher).__name__} that is already made")
        return teacher
    backbone = _backbone(teacher, student, dtype)
    if is_adapted(student.model) and shares_weights(backbone.model, student.model):
        _refuse_options(options, "a student's own base")
        logger.info("the teacher is the student's own base, with the adapter off")
        return AdapterOffTeacher(student)
    refuse_fresh_head(backbone)
    if isinstance(teacher, str | os.PathLike) and is_adapted(backbone.model):
        backbone = merged(backbone)
    return LiveTeacher(backbone, student, **options)


def backbone_of(model: nn.Module, processor: Any = None, *, like: Backbone | None = None) -> Backbone:
    """A Backbone around a network that `load_backbone` did not make.

    Task, modality and labels come from a transformers model's configuration, or from timm's `pretrained_cfg`.

    Args:
        model: A transformers or timm model with a head, adapted or not; with `like`, any module.
        processor: Its tokenizer, image processor or feature extractor.
        like: What fills in where the network says nothing, for example its student.

    Returns:
        The network, as it is, with what belongs to it.

    Raises:
        TransferError: If it does not say what it takes and does, and there is no `like`.
    """
    from ..backbones import Backbone

    plain: Any = plain_model(model)
    any_model: Any = model
    if getattr(plain, "config", None) is not None:
        task, modality = _task_and_modality(plain)
        name = plain.config.name_or_path or type(plain).__name__
        labels = None if task == "causal-lm" else _labels(plain.config)
    elif getattr(plain, "pretrained_cfg", None) is not None:
        task, modality, name, labels = "image-classification", "image", type(plain).__name__, None
    elif like is not None:
        task, modality, name, labels = like.task, like.modality, type(plain).__name__, None
    else:
        raise TransferError(
            f"{type(plain).__name__} has neither a transformers configuration nor timm's pretrained_cfg. Wrap it: "
            "hf_transfer.backbones.Backbone(model, processor, modality, task, name, labels, data_config)."
        )
    if processor is None and like is not None and like.modality == modality:
        processor = like.processor
    data_config = _data_config(plain, processor, like) if modality == "image" else None
    return Backbone(any_model, processor, modality, task, name, labels, data_config)


def _refuse_options(options: dict[str, Any], of: str) -> None:
    given = [f"{name}={value!r}" for name, value in options.items() if value not in ("auto", False)]
    if given:
        raise TransferError(f"{', '.join(given)} cannot be applied to {of}: say so when making it, or leave it out.")


def _backbone(teacher: Any, student: Backbone, dtype: Any) -> Backbone:
    from ..backbones import Backbone, load_backbone

    if isinstance(teacher, Backbone):
        return teacher
    if isinstance(teacher, str | os.PathLike):
        return load_backbone(os.fspath(teacher), **({} if dtype == "auto" else {"dtype": dtype}))
    if not isinstance(teacher, nn.Module):
        raise TransferError(
            f"teacher={teacher!r}: valid are a folder, a Hub id, a module, a Backbone, a Teacher, or a list of these."
        )
    if not shares_weights(teacher, student.model):
        logger.warning(
            "the teacher came as a bare %s: it is taken to read the student's %s as it is. Give its folder or a "
            "Backbone if it has a processor of its own",
            type(plain_model(teacher)).__name__, student.modality,
        )  # fmt: skip
    return backbone_of(teacher, like=student)


def merged(backbone: Backbone) -> Backbone:
    """An adapter that was loaded for teaching, folded into its base: adapters cost time at every batch.

    Args:
        backbone: With an adapter, whose head `refuse_fresh_head` has let pass: from then on it counts as trained.

    Returns:
        The full network; the backbone as it is, which the log says, where its adapter cannot be folded in.
    """
    try:
        model: Any = merge(backbone.model)
    except TransferError as error:
        logger.info("the teacher keeps its adapter beside the base: %s", error)
        return backbone
    model.fresh_parameters = ()
    return replace(backbone, model=model)


def _task_and_modality(model: Any) -> tuple[str, Any]:
    """What the class of a transformers model is for, by transformers' own tables."""
    from ..loading.request import Request
    from ..loading.transformers_models import resolve_task

    class_name = type(model).__name__
    config = model.config
    saved, config.architectures = config.architectures, [class_name]
    try:
        return resolve_task(config, Request(config.name_or_path or class_name))
    finally:
        config.architectures = saved


def _labels(config: Any) -> list[str] | None:
    from ..loading.transformers_models import label_names

    return label_names(config)


def _data_config(model: Any, processor: Any, like: Backbone | None) -> dict[str, Any] | None:
    """What an image network takes: timm's own, the processor's, or `like`'s at the size it is built for."""
    from ..loading import image_sizes, processors, timm_models

    config = getattr(model, "config", None)
    if config is not None and config.model_type == "timm_wrapper":
        return timm_models.data_config(config)
    if config is None and getattr(model, "pretrained_cfg", None) is not None:
        from timm.data.config import resolve_model_data_config

        return resolve_model_data_config(model)
    if like is not None and (processor is None or processor is like.processor):
        if config is None or like.data_config is None:
            return like.data_config
        channels, side = image_sizes.image_shape(config)
        height, width = (side, side) if side is not None else like.data_config["input_size"][1:]
        return {**like.data_config, "input_size": (channels, height, width)}
    return processors.data_config(processor, model)
