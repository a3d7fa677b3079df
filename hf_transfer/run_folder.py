"""A run folder: an ordinary checkpoint, README.md (the card) and results.json."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import __version__

if TYPE_CHECKING:
    from datasets import Dataset

    from .backbones import Backbone
    from .config import RunConfig
    from .data.sources import Data
    from .transfer_config import TransferConfig

RESULTS_FILE = "results.json"
_TOLD_ELSEWHERE = ("model", "dataset", "tuning", "task", "pretrained")  # beside the options
_NOT_TOLD = (
    "output_dir",
    "report_to",
    "resume_from_checkpoint",
    "push_to_hub",
)  # and hub_...: of this machine or user
_LIBRARIES = ("torch", "transformers", "timm", "peft", "datasets", "accelerate", "evaluate")


def run_facts(
    run: RunConfig, args: TransferConfig, used: Mapping[str, Any], data: Data, prepared: Mapping[str, Dataset]
) -> dict[str, Any]:
    """What results.json says of a run's set-up.

    Args:
        run: What was trained on what.
        args: The Trainer's arguments.
        used: Those of them that were given or recommended, as they were.
        data: The data.
        prepared: Its splits as they were used, without unreadable rows.
    """
    from .hub.leaks import shown_name

    arguments = {"num_train_epochs": args.num_train_epochs, **used}
    return {
        "model": shown_name(run.model),
        "pretrained": run.pretrained,
        "task": data.columns.task,
        "tuning": run.tuning,
        "selection": selection_rule(args, data),
        "data": {"name": data.name, "fingerprint": data.fingerprint},
        "counts": {split: len(rows) for split, rows in prepared.items()},
        "processes": args.world_size,
        "seed": args.seed,
        "options": {
            option.name: getattr(run, option.name)
            for option in fields(run)
            if option.name not in _TOLD_ELSEWHERE and getattr(run, option.name) != option.default
        },
        "training_arguments": {
            name: value.value if isinstance(value, Enum) else value
            for name, value in arguments.items()
            if name not in _NOT_TOLD and not name.startswith("hub_")
        },
        "versions": library_versions(),
    }


def selection_rule(args: TransferConfig, data: Data) -> str:
    """How the evaluated weights were chosen, in words."""
    if not args.load_best_model_at_end:
        return f"The last step; nothing was selected ({data.selection})."
    return f"The best {args.metric_for_best_model} on validation ({data.selection})."


def write_run(folder: Path, backbone: Backbone, facts: dict[str, Any]) -> None:
    """Writes the model with its processor and labels, the card, and results.json last.

    Args:
        folder: Where; made if it is missing.
        backbone: The tuned model.
        facts: What finetune() collected.
    """
    from .hub import bundle
    from .hub.card import write_card
    from .hub.leaks import without_paths_in

    facts = without_paths_in(facts)
    folder.mkdir(parents=True, exist_ok=True)
    bundle.save(backbone.model, folder, processor=backbone.processor)
    write_card(folder, card_facts(backbone, facts, folder.resolve().name))
    staged = folder / f"{RESULTS_FILE}.partial"
    text = json.dumps(_finite(facts), indent=2, sort_keys=True, default=str)
    staged.write_text(text + "\n", encoding="utf-8")
    os.replace(staged, folder / RESULTS_FILE)


def _finite(value: Any) -> Any:
    """What JSON has words for: a metric that is not a number (a correlation with a constant) is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def card_facts(backbone: Backbone, facts: dict[str, Any], name: str) -> Any:
    """The card's view of a run's facts.

    Args:
        backbone: The tuned model.
        facts: What results.json holds.
        name: The model's name.

    Returns:
        A `hub.card.CardFacts`.
    """
    from peft import PeftModel
    from transformers import TimmWrapperForImageClassification

    from .hub.card import CardFacts

    library: Literal["transformers", "timm", "peft"] = "transformers"
    if isinstance(backbone.model, PeftModel):
        library = "peft"
    elif isinstance(backbone.model, TimmWrapperForImageClassification):
        library = "timm"
    return CardFacts(
        name=name,
        task=facts["task"],
        library=library,
        modality=backbone.modality,
        base_model=facts["model"],
        pretrained=facts["pretrained"],
        dataset=facts["data"]["name"],
        labels=backbone.labels,
        counts=facts["counts"],
        tuning=facts["tuning"],
        trainable_parameters=facts["trainable_parameters"],
        total_parameters=facts["total_parameters"],
        hyperparameters={**facts["training_arguments"], "steps": facts["steps"], "processes": facts["processes"]},
        metrics=facts["metrics"],
        selection=facts["selection"],
        seed=facts["seed"],
        versions=facts["versions"],
        teacher=facts.get("teacher"),
        costs=facts.get("costs", {}),
        calibration=facts.get("calibration", {}),
    )


def library_versions() -> dict[str, str]:
    """The versions of Python and of the libraries that a result depends on."""
    libraries = {name: version(name) for name in _LIBRARIES}
    return {"python": platform.python_version(), **libraries, "hf-transfer-learning": __version__}
