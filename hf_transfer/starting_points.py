"""Where a run starts: a backbone by its name, one that was loaded before, or what an earlier run left."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .errors import TransferError

if TYPE_CHECKING:
    from .backbones import Backbone
    from .config import RunConfig
    from .data.sources import Data

logger = logging.getLogger(__name__)


def starting_backbone(model: Any, run: RunConfig, data: Data, *, adapt: bool, seed: int) -> Backbone:
    """The backbone that a run starts from, with a head for the data's labels.

    Args:
        model: The name of one, or a Backbone, which must already know the labels.
        run: What was asked for.
        data: What it is for.
        adapt: Whether the run will put adapters on it.
        seed: Of the new head, and of adapters.

    Returns:
        The Backbone. The adapter of an earlier run, if it was one, is folded into its base. A head for other classes
        starts anew, even where there were as many.

    Raises:
        TransferError: If it cannot be loaded, or does not fit the data.
    """
    from transformers import set_seed

    from .backbones import load_backbone
    from .data.columns import check_fits

    set_seed(seed)  # a new head and adapters are drawn at random
    if isinstance(model, (str, Path)):
        task = run.task or data.columns.task
        labels = data.labels if data.labels is not None else data.outputs
        model = load_backbone(model, labels=labels, task=task, pretrained=run.pretrained, image_size=run.image_size)
        return _with_head_of_its_own(_without_adapter(model, adapt))
    check_fits(model.modality, data.columns)
    _check_loaded(model, run, data)
    return model


def _check_loaded(backbone: Backbone, run: RunConfig, data: Data) -> None:
    """Whether a backbone that was loaded before is one for this data."""
    if not run.pretrained:
        raise TransferError("pretrained=False goes with a model's name: pass it to load_backbone() instead.")
    if backbone.task != data.columns.task:
        raise TransferError(
            f"The backbone is for {backbone.task}, and the data is for {data.columns.task}. Load it with "
            f"load_backbone(..., task={data.columns.task!r}, labels=data.labels)."
        )
    if data.outputs is not None and data.outputs != backbone.outputs:
        raise TransferError(
            f"The data has {data.outputs} numbers a row, and the backbone {backbone.outputs} outputs. Load it with "
            f"load_backbone(..., task='regression', labels={data.outputs})."
        )
    if data.labels is not None and list(backbone.labels or ()) != list(data.labels):
        unknown = sorted(set(data.labels) - set(backbone.labels or ()))
        raise TransferError(
            f"The data's labels {data.labels} are not the model's {backbone.labels}"
            + (f": {unknown} are not in the model" if unknown else ", in this order")
            + ". Load it with load_backbone(..., labels=data.labels), or pass its name, for a head of the data's own."
        )


def _with_head_of_its_own(backbone: Backbone) -> Backbone:
    """Starts the head anew where its rows were trained for other classes."""
    from .freezing import shortened
    from .loading.heads import start_anew

    if backbone.renamed_from is None:
        return backbone
    logger.info(
        "The head of %s is new: the checkpoint's was for other classes, %s.",
        backbone.name,
        ", ".join(shortened(backbone.renamed_from)),
    )
    start_anew(backbone.model)
    return replace(backbone, renamed_from=None)


def _without_adapter(backbone: Backbone, adapt: bool) -> Backbone:
    """Folds the adapter of an earlier run into its base, from where this run starts."""
    from .adapters import is_adapted, merge

    if not is_adapted(backbone.model):
        return backbone
    if adapt:
        raise TransferError(
            f"{backbone.name!r} is an adapter, and a second one on top of it would have a base that is saved nowhere. "
            "Fold it into its base and save that: backbone = load_backbone(...); backbone.model = "
            "merge(backbone.model); backbone.save(folder). Then fine-tune the folder."
        )
    logger.info("The adapter %s is folded into its base, which is trained on from there.", backbone.name)
    return replace(backbone, model=cast(Any, merge(backbone.model)))
