"""A head and the names of its classes: rows follow their names, and a head for other classes can start anew."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import TransferError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from .request import Request

logger = logging.getLogger(__name__)


def label_names(config: PretrainedConfig) -> list[str] | None:
    """Label names of a configuration in id order; None where they are only placeholders."""
    by_id: dict[Any, str] = config.id2label or {}
    names = [by_id[i] for i in sorted(by_id)]
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


def write_names(config: Any, names: Sequence[str]) -> None:
    """Writes label names into a configuration where transformers, and for its networks timm, look for them."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    if config.model_type == "timm_wrapper":
        config.label_names = list(names)


def set_labels(config: PretrainedConfig, request: Request, task: str) -> None:
    """Writes the labels asked for, and what kind of problem they make, into a configuration."""
    if task == "causal-lm":
        return
    names = request.label_names
    if names is not None:
        write_names(config, names)
    elif request.output_count is not None:
        config.num_labels = request.output_count
        config.id2label = {i: f"LABEL_{i}" for i in range(request.output_count)}
        config.label2id = {name: i for i, name in config.id2label.items()}
    if task == "regression":
        config.problem_type = "regression"
    elif request.labels is not None:
        # Left open, the model's own loss decides by the labels' dtype, turns to BCE for soft ones, and saves that.
        config.problem_type = "single_label_classification"


def follow_names(model: Any, saved: Sequence[str] | None) -> None:
    """Puts the rows of a loaded head into the order of the label names in the configuration.

    The same names in another order take their rows along. As many other names leave the rows where they are: the head
    is renamed, and `model.renamed_from` says from what.

    Args:
        model: A loaded model, plain or a PeftModel, whose configuration has the names that were asked for.
        saved: The names that the head was saved with, in id order; None where it was saved without.

    Raises:
        TransferError: The rows would have to move, and an adapter is on them.
    """
    from ..dissection.wrapping import plain_model

    model.renamed_from = None
    plain: Any = plain_model(model)
    names = label_names(model.config)
    if saved is None or names is None or names == list(saved) or len(names) != len(saved):
        return
    rows = _rows(model)
    fresh = getattr(plain, "fresh_parameters", ())
    if model is plain and set(rows) <= set(fresh):
        return  # the head is new, and has no classes yet; that of an adapter is in its own file
    if set(names) != set(saved):
        model.renamed_from = list(saved)
        return
    order = [list(saved).index(name) for name in names]
    for tensors in rows.values():
        for tensor in tensors:
            tensor.data = tensor.data[order]
    plain.fresh_parameters = tuple(sorted({*fresh, *rows}))  # an adapter on it must save them
    logger.info("The classes are numbered otherwise than in the checkpoint; the rows of the head follow their names.")


def start_anew(model: Any) -> None:
    """Draws the last layer of a head anew, as it is drawn for a number of classes that the checkpoint does not have.

    Args:
        model: A plain model. The weights start as its family starts them, from torch's global random state.
    """
    from torch import empty_like, nn

    rows = _rows(model)
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if any(f"{path}.{name}" in rows for name in own):
            for name, parameter in own.items():  # new ones: transformers passes over those that it marked as loaded
                setattr(module, name, nn.Parameter(empty_like(parameter)))
            module.reset_parameters()
            model._init_weights(module)  # it knows the layers of its family, and no others
    model.fresh_parameters = tuple(sorted({*getattr(model, "fresh_parameters", ()), *rows}))


def _rows(model: Any) -> dict[str, list[Tensor]]:
    """The tensors with a row an output, by name in the plain model; two of a name where peft keeps a copy."""
    from ..anatomy import Anatomy, plain_name

    classifiers = Anatomy.of(model).classifiers
    rows: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        plain = plain_name(name)  # of a low-rank matrix: its layer's
        layer = next((each for each in classifiers if f"{plain}.".startswith(f"{each}.")), None)
        if layer is not None and (plain == layer or ".base_layer." in name):
            raise TransferError(
                f"An adapter is on the classifier {layer!r}, so that its rows cannot be put into another order. Load "
                "the adapter without labels=, fold it into its base (hf_transfer.merge), save that, and load the "
                "folder with labels=."
            )
        if layer is not None and parameter.ndim and parameter.shape[0] == model.config.num_labels:
            rows.setdefault(plain, []).append(parameter)
    return rows
