"""Whether a run decodes its images once: what stands against a store, and the stored splits.

The pixels are the same either way, so "auto" asks only whether images would be decoded more than once, and whether
there is room.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..disk import SPARE, free_bytes, is_writable
from ..errors import TransferError
from ..store.folders import default_home
from .pixel_store import IMAGES, StoreTooLarge
from .stored_rows import StorePlan, has_images, store_name

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..transfer_config import TransferConfig

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation")  # test rows are read once


def stored_splits(prepared: Mapping[str, Any], run: RunConfig, args: TransferConfig) -> dict[str, Any]:
    """The prepared splits, training and validation images from a store where that is worth it.

    Called by all processes at once. Says in the log what was decided, and why.

    Args:
        prepared: The splits, as `transforms.prepare` made them.
        run: `image_store`, `image_store_dir`, `image_store_max_bytes`.
        args: The Trainer's arguments.

    Raises:
        TransferError: With image_store="always", if there can be none; or if no space is left.
    """
    if run.image_store == "never":
        return dict(prepared)
    if run.image_store == "auto" and not has_images(prepared["train"]):
        return dict(prepared)
    obstacle, plans, home = None, {}, _home(run)
    try:
        plans = {split: StorePlan.of(prepared[split]) for split in SPLITS if _is_read(split, prepared, args)}
        obstacle = _obstacle(plans, home, run, args)
    except TransferError as error:
        obstacle = str(error)
    if (obstacle := _first_process_says(obstacle)) is not None:
        return _live(prepared, run, obstacle)
    stored: dict[str, Any] = dict(prepared)
    left = run.image_store_max_bytes
    try:
        for split, plan in plans.items():
            stored[split] = plan.carried_out(home / store_name(plan.key), left, args.dataloader_num_workers)
            left -= stored[split].store.bytes
    except StoreTooLarge as error:
        return _live(prepared, run, str(error))
    return stored


def _live(prepared: Mapping[str, Any], run: RunConfig, obstacle: str) -> dict[str, Any]:
    if run.image_store == "always":
        raise TransferError(f"image_store='always' cannot be: {obstacle}")
    logger.info("Images are decoded anew in every epoch: %s", obstacle)
    return dict(prepared)


def _is_read(split: str, prepared: Mapping[str, Any], args: TransferConfig) -> bool:
    evaluates = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
    return split in prepared and (split == "train" or evaluates)


def _obstacle(plans: Mapping[str, StorePlan], home: Path, run: RunConfig, args: TransferConfig) -> str | None:
    """What stands against a store; None if nothing does."""
    epochs = _epochs(len(plans["train"].prepared), args)
    if run.image_store == "auto" and epochs <= 1:
        return f"{round(epochs, 2):g} epoch(s) decode no image twice."
    if not is_writable(home):
        return f"{home} cannot be written to: give another image_store_dir."
    size, free = sum(plan.bytes for plan in plans.values()), free_bytes(home)
    said = f"{'; '.join(f'{split}: {plan}' for split, plan in plans.items())}; {free / 2**20:,.0f} MiB free in {home}"
    logger.info("Image store over %g epochs: %s", round(epochs, 2), said)
    if size > run.image_store_max_bytes:
        return f"{said}: more than image_store_max_bytes={run.image_store_max_bytes:,} allows."
    if size <= SPARE * free or all((home / store_name(plan.key) / IMAGES).exists() for plan in plans.values()):
        return None
    return f"{said}: too little is free."


def _epochs(rows: int, args: TransferConfig) -> float:
    if args.max_steps <= 0:
        return args.num_train_epochs
    return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size / rows


def _home(run: RunConfig) -> Path:
    root = run.image_store_dir
    return default_home("images") if root is None else Path(root).absolute()


def _first_process_says(obstacle: str | None) -> str | None:
    chosen = [obstacle]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(chosen)
    return chosen[0]
