"""Which checkpoints of a run are whole."""

from __future__ import annotations

import json
from pathlib import Path

PREFIX = "checkpoint"  # transformers.trainer_utils.PREFIX_CHECKPOINT_DIR, without its import


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest `checkpoint-N` in a folder that was saved whole.

    Args:
        folder: An output folder; may be missing.

    Returns:
        Its path, or None.
    """
    steps = {}
    for path in Path(folder).glob(f"{PREFIX}-*"):
        number = path.name.rpartition("-")[2]
        if number.isdigit() and is_complete_checkpoint(path):
            steps[int(number)] = str(path)
    return steps[max(steps)] if steps else None


def is_complete_checkpoint(folder: str | Path) -> bool:
    """Whether a checkpoint was saved whole: the Trainer writes trainer_state.json last, so it is there, and readable.

    Args:
        folder: The checkpoint's folder; may be missing.
    """
    try:
        json.loads((Path(folder) / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True
