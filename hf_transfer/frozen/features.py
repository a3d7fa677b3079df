"""extract(): the features of prepared rows under a frozen backbone, each row computed once.

features = extract(backbone, prepare(data.splits["train"], backbone, data.columns, train=False))
features.x                # (N, D): the input of the layer that gives the logits
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..anatomy import Taps
from ..batch_sizes import longest_first
from ..data.collate import collator_for
from ..data.columns import EXAMPLE_ID, LABELS
from ..data.replay import dataset_epoch, is_random
from ..errors import TransferError
from ..objective import logits_of, match_rows, model_inputs

if TYPE_CHECKING:
    from datasets import Dataset

    from ..backbones import Backbone


@dataclass(frozen=True)
class Features:
    """What a frozen backbone makes of N rows, in the rows' order; on the CPU.

    Of several views there are views x N entries: all rows of the first view, then all of the second.

    Attributes:
        x: (N, D) input of the backbone's classifier.
        labels: (N,) labels as the collator gives them; None where the rows have none.
        example_id: (N,) int64.
        logits: (N, Z) float32: what the backbone's own head says, of its own classes.
    """

    x: Tensor
    labels: Tensor | None
    example_id: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return len(self.x)


def extract(
    backbone: Backbone,
    rows: Dataset,
    *,
    batch_size: int = 64,
    views: int = 1,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Features:
    """Runs a backbone over prepared rows in eval and inference mode, and keeps what reaches its classifier.

    Texts run longest first, so that a batch holds little padding. Afterwards the network is where and as it was.

    Args:
        backbone: The network; its weights are only read.
        rows: Rows that `hf_transfer.data.transforms.prepare` made for it.
        batch_size: Rows a forward pass, from 1.
        views: How many views of each row, from 1: those of the epochs 0 to views - 1 of rows prepared with
            `train=True`. One view is that of the rows as they stand.
        device: Where it runs; by default the accelerator, or the CPU where there is none.
        dtype: Floating dtype that the features are kept in. The network computes in that of its weights.

    Returns:
        The Features.

    Raises:
        TransferError: If a number is out of range, there are several views and the rows have no random augmentation,
            or the backbone has no one feature vector a row (tokens, language models).
    """
    for name, value in (("batch_size", batch_size), ("views", views)):
        if value < 1:
            raise TransferError(f"{name}={value} is not valid: it must be a whole number from 1.")
    if views > 1 and not is_random(rows):
        raise TransferError(
            f"views={views}, and every view of these rows is the same: they have no random augmentation. Prepare "
            "images with prepare(..., train=True, augment='light'), or leave views out."
        )
    if backbone.task in ("token-classification", "causal-lm"):
        raise TransferError(
            f"The backbone is for {backbone.task}, which has one feature vector a token and not one a row. Load it "
            "with another task, e.g. load_backbone(..., task='text-classification')."
        )
    where = torch.device(device) if device is not None else default_device()
    with _running(backbone.model, where), _epoch_kept(rows):
        return _joined([_one_view(backbone, rows, batch_size, where, dtype) for _ in _epochs(rows, views)])


def default_device() -> torch.device:
    """The accelerator, or the CPU where there is none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def _epochs(rows: Dataset, views: int) -> Iterator[int]:
    """Moves the rows from view to view; one view stays where it is."""
    counter = dataset_epoch(rows)
    for view in range(views):
        if counter is not None and views > 1:
            counter.set(view)
        yield view


def _one_view(
    backbone: Backbone, rows: Dataset, batch_size: int, device: torch.device, dtype: torch.dtype
) -> Features:
    """All rows as they stand in this epoch."""
    model, collate = backbone.model, collator_for(backbone)
    order = longest_first(rows)
    found: dict[str, list[Tensor]] = {"x": [], LABELS: [], EXAMPLE_ID: [], "logits": []}
    with torch.inference_mode(), Taps(model, backbone.anatomy.classifiers[:1], inputs=True) as taps:
        for start in range(0, len(order), batch_size):
            chosen = rows.select(order[start : start + batch_size])
            batch = collate([chosen[i] for i in range(len(chosen))])
            inputs = {name: _placed(value, device, model.dtype) for name, value in model_inputs(batch).items()}
            logits = logits_of(model(**inputs))
            (seen,) = taps.values.values()
            found["x"].append(match_rows(seen, logits, inputs.get("attention_mask")).to("cpu", dtype))  # (B, D)
            found["logits"].append(logits.to("cpu", torch.float32))  # (B, Z)
            for name in (LABELS, EXAMPLE_ID):
                found[name] += [batch[name]] if name in batch else []
    back = torch.from_numpy(np.argsort(order))
    # Put together outside inference mode, whose tensors could not be trained on.
    x, ids, logits = (torch.cat(found[name])[back] for name in ("x", EXAMPLE_ID, "logits"))
    return Features(x, torch.cat(found[LABELS])[back] if found[LABELS] else None, ids, logits)


def _placed(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """An input where the network is, floating ones in its dtype."""
    return value.to(device, dtype if value.is_floating_point() else None)


def _joined(parts: list[Features]) -> Features:
    if len(parts) == 1:
        return parts[0]
    labels = [part.labels for part in parts if part.labels is not None]
    return Features(
        torch.cat([part.x for part in parts]),
        torch.cat(labels) if labels else None,
        torch.cat([part.example_id for part in parts]),
        torch.cat([part.logits for part in parts]),
    )


@contextmanager
def _running(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on a device in eval mode; afterwards where it was, each module in the mode that it was in."""
    home = next(model.parameters()).device
    training = [module for module in model.modules() if module.training]
    model.eval()
    if home != device:
        model.to(device)
    try:
        yield
    finally:
        if home != device:
            model.to(home)
        for module in training:
            module.training = True


@contextmanager
def _epoch_kept(rows: Dataset) -> Iterator[None]:
    """Puts the rows' epoch back."""
    counter = dataset_epoch(rows)
    before = None if counter is None else counter.value
    try:
        yield
    finally:
        if counter is not None and before is not None:
            counter.set(before)
