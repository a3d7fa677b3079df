"""Which checkpoints of a run are whole."""

from __future__ import annotations

import json
from pathlib import Path

PREFIX = "checkpoint"  # transformers.trainer_utils.PREFIX_CHECKPOINT_DIR, without its import


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest `checkpoint-N` in a folder that was saved whole.

    The Trainer writes trainer_state.json last; a checkpoint without a readable one was cut short.

    Args:
        folder: An output folder; may be missing.

    Returns:
        Its path, or None.
    """
    steps = {}
    for path in Path(folder).glob(f"{PREFIX}-*"):
        number = path.name.rpartition("-")[2]
        if number.isdigit() and _is_json(path / "trainer_state.json"):
            steps[int(number)] = str(path)
    return steps[max(steps)] if steps else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True
