"""A run folder: an ordinary checkpoint, README.md (the card) and results.json."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import __version__

if TYPE_CHECKING:
    from .backbones import Backbone

RESULTS_FILE = "results.json"
_LIBRARIES = ("torch", "transformers", "timm", "peft", "datasets", "accelerate", "evaluate")


def write_run(folder: Path, backbone: Backbone, facts: dict[str, Any]) -> None:
    """Writes the model with its processor and labels, the card, and results.json last.

    Args:
        folder: Where; made if it is missing.
        backbone: The tuned model.
        facts: What finetune() collected.
    """
    from .hub import bundle
    from .hub.card import write_card

    folder.mkdir(parents=True, exist_ok=True)
    bundle.save(backbone.model, folder, processor=backbone.processor)
    write_card(folder, card_facts(backbone, facts, folder.resolve().name))
    staged = folder / f"{RESULTS_FILE}.partial"
    staged.write_text(json.dumps(facts, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
    os.replace(staged, folder / RESULTS_FILE)


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
    )


def library_versions() -> dict[str, str]:
    """The versions of Python and of the libraries that a result depends on."""
    libraries = {name: version(name) for name in _LIBRARIES}
    return {"python": platform.python_version(), **libraries, "hf-transfer-learning": __version__}
