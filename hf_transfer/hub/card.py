"""The card of a model: README.md with metadata that the Hub reads, and `.eval_results/*.yaml` beside it.

    write_card(folder, CardFacts(name="resnet18-cifar10", task="image-classification", library="timm", ...))

A card states what was measured and how; nothing of the machine it was trained on reaches it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import TransferError
from .leaks import hub_id, shown_name, without_paths
from .usage import PIPELINE_TAGS, usage

if TYPE_CHECKING:
    from huggingface_hub import EvalResultEntry, ModelCardData


@dataclass(frozen=True)
class CardFacts:
    """What a card tells. Every field is optional but the first three; what is not known is not said.

    Attributes:
        name: The model's name, such as "resnet18-cifar10".
        task: One of `hf_transfer.backbones.TASKS`.
        library: What loads the folder: "transformers", "timm" (an image model saved for both) or "peft" (an adapter).
        modality: "image", "text" or "audio".
        base_model: The backbone as it was named: a Hub id, a path, a timm name.
        pretrained: Whether the backbone's weights were pretrained.
        dataset: The data as it was named: a Hub id, a path, a name.
        labels: Label names in id order; for regression as many as there are outputs.
        counts: Examples by split.
        tuning: What was trained, such as "lora".
        trainable_parameters: Parameters that trained.
        total_parameters: All parameters.
        hyperparameters: Learning rate, epochs, batch size, ...
        metrics: Metrics by split.
        selection: How the checkpoint was chosen, in words.
        seed: The seed.
        versions: Versions of the libraries by name.
        teacher: What it was distilled from.
        costs: Parameters, multiply-adds a row (`macs_a_row`) of student and teacher, and `latency_student_to_teacher`.
        calibration: `temperature` that was fitted on validation data, `ece_before` and `ece_after`.
        license: The licence as the Hub names it, such as "apache-2.0".
        tags: Tags beside our own.
    """

    name: str
    task: str
    library: Literal["transformers", "timm", "peft"]
    modality: Literal["image", "text", "audio"] = "image"
    base_model: str | None = None
    pretrained: bool = True
    dataset: str | None = None
    labels: Sequence[str] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    tuning: str | None = None
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    selection: str | None = None
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    teacher: str | None = None
    costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    calibration: Mapping[str, float] = field(default_factory=dict)
    license: str | None = None
    tags: Sequence[str] = ()


def write_card(folder: str | Path, facts: CardFacts) -> Path:
    """Writes README.md and, for a test score on data of the Hub, `.eval_results/<data>.yaml`.

    Args:
        folder: The folder that holds the model.
        facts: What the card tells.

    Returns:
        The path of README.md.

    Raises:
        TransferError: The folder does not exist.
    """
    from huggingface_hub import ModelCard, eval_result_entries_to_yaml
    from huggingface_hub.utils import yaml_dump

    folder = Path(folder)
    if not folder.is_dir():
        raise TransferError(f"No folder {folder} to write a card into. Save the model there first.")
    card = ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n{_text(facts)}")
    entries = _hub_results(facts)
    if entries:
        results = folder / ".eval_results" / f"{entries[0].dataset_id.replace('/', '--')}.yaml"
        results.parent.mkdir(exist_ok=True)
        _write(results, yaml_dump(eval_result_entries_to_yaml(entries)))
    _write(folder / "README.md", str(card))
    return folder / "README.md"


def _write(path: Path, text: str) -> None:
    staged = path.with_name(path.name + ".partial")
    staged.write_text(text, encoding="utf-8")
    os.replace(staged, path)  # a full disk leaves the old file whole


def _metadata(facts: CardFacts) -> ModelCardData:
    from huggingface_hub import EvalResult, ModelCardData

    base, data = hub_id(facts.base_model), hub_id(facts.dataset)
    more: dict[str, Any] = {}
    if base and facts.pretrained:
        more = {"base_model": base, "base_model_relation": "adapter" if facts.library == "peft" else "finetune"}
    results = [
        EvalResult(
            task_type=_pipeline_tag(facts),
            dataset_type=data or shown_name(facts.dataset),
            dataset_name=shown_name(facts.dataset),
            dataset_split=split,
            metric_type=name,
            metric_name=_pretty(name),
            metric_value=value,
        )
        for split, values in facts.metrics.items()
        for name, value in _numbers(values).items()
        if facts.dataset
    ]
    return ModelCardData(
        library_name=facts.library,
        pipeline_tag=_pipeline_tag(facts),
        tags=list(dict.fromkeys(["transfer-learning", "hf-transfer-learning", *_taught(facts), *facts.tags])),
        datasets=[data] if data else None,
        license=facts.license,
        model_name=shown_name(facts.name),
        eval_results=results or None,
        **more,
    )


def _taught(facts: CardFacts) -> list[str]:
    return ["knowledge-distillation"] if facts.teacher else []


def _pipeline_tag(facts: CardFacts) -> str:
    """The Hub has no task for regression: there it is the classification pipeline with one output."""
    return PIPELINE_TAGS.get(facts.task, f"{facts.modality}-classification")


def _hub_results(facts: CardFacts) -> list[EvalResultEntry]:
    """The test score as `.eval_results` holds it: one value a benchmark, so the first metric that is not the loss."""
    from huggingface_hub import EvalResultEntry

    data = hub_id(facts.dataset)
    scores = {name: value for name, value in _numbers(facts.metrics.get("test", {})).items() if name != "loss"}
    if data is None or not scores:
        return []
    name, value = next(iter(scores.items()))
    rows = f"{facts.counts['test']:,} examples of the test split" if "test" in facts.counts else "the test split"
    return [EvalResultEntry(dataset_id=data, task_id="default", value=value, notes=f"{name} on {rows}")]


def _numbers(values: Mapping[str, float]) -> dict[str, float]:
    """Metrics to six digits; what is not finite is not a result."""
    return {name: round(float(value), 6) for name, value in values.items() if math.isfinite(value)}


def _pretty(name: str) -> str:
    return {"auroc": "AUROC", "mse": "MSE", "macro_f1": "Macro F1", "entity_f1": "Entity F1"}.get(
        name, name.replace("_", " ").capitalize()
    )


def _text(facts: CardFacts) -> str:
    sections = [
        f"# {shown_name(facts.name)}\n\n{_summary(facts)}",
        f"## Use\n\n```python\n{usage(facts)}\n```",
        _results(facts),
        _student_and_teacher(facts),
        _data(facts),
        _training(facts),
    ]
    return without_paths("\n\n".join(section for section in sections if section)) + "\n"


def _summary(facts: CardFacts) -> str:
    base = shown_name(facts.base_model) if facts.base_model else None
    linked = f"[{base}](https://huggingface.co/{base})" if base and hub_id(facts.base_model) else f"`{base}`"
    what = f"A model for {facts.task}" if facts.library != "peft" else f"An adapter for {facts.task}"
    start = f", fine-tuned from {linked}" if facts.pretrained else f" with the architecture of {linked}, from scratch"
    teachers = ", ".join(f"`{shown_name(name)}`" for name in (facts.teacher or "").split(", ") if name)
    taught = f", distilled from {teachers}" if teachers else ""
    data = f" on {_linked_data(facts)}" if facts.dataset else ""
    return f"{what}{start if base else ''}{taught}{data}."


def _linked_data(facts: CardFacts) -> str:
    data = hub_id(facts.dataset)
    return f"[{data}](https://huggingface.co/datasets/{data})" if data else f"`{shown_name(facts.dataset or '')}`"


def _results(facts: CardFacts) -> str:
    if not facts.metrics:
        return ""
    names = list(dict.fromkeys(name for values in facts.metrics.values() for name in values))
    rows = [
        [split, *(f"{values[name]:.4f}" if name in values else "" for name in names)]
        for split, values in facts.metrics.items()
    ]
    how = [facts.selection, f"Seed {facts.seed}." if facts.seed is not None else None]
    note = "\n\n" + " ".join(part for part in how if part) if any(how) else ""
    return f"## Results\n\n{_table(['split', *map(_pretty, names)], rows)}{note}"


def _student_and_teacher(facts: CardFacts) -> str:
    """What the student costs beside its teacher, and the temperature that mends its confidence."""
    lines = []
    if facts.costs:
        names = {"parameters": "Parameters", "macs_a_row": "Multiply-adds a row"}
        rows = [
            [title, *(f"{facts.costs[name][side]:,}" for side in ("student", "teacher"))]
            for name, title in names.items()
        ]
        latency = facts.costs["latency_student_to_teacher"]
        lines.append(_table(["", "student", "teacher"], rows))
        lines.append(
            f"One row takes the student {latency['ratio']:.2f} times as long as its teacher "
            f"(interval {latency['low']:.2f} to {latency['high']:.2f}, on the machine of the training)."
        )
    if facts.calibration:
        before, after = facts.calibration["ece_before"], facts.calibration["ece_after"]
        lines.append(
            f"Calibration: divide the logits by `config.calibration_temperature` = "
            f"{facts.calibration['temperature']:.4g} before the softmax. Fitted on the validation split, where it "
            f"takes the expected calibration error from {before:.3f} to {after:.3f}; the classes do not change."
        )
    return "## Student and teacher\n\n" + "\n\n".join(lines) if lines else ""


def _data(facts: CardFacts) -> str:
    if not facts.dataset:
        return ""
    lines = [_linked_data(facts) + "."]
    if facts.counts:
        lines.append(_table(["split", "examples"], [[split, f"{count:,}"] for split, count in facts.counts.items()]))
    if facts.labels and facts.task != "regression":
        lines.append(f"{len(facts.labels)} labels: {', '.join(f'`{label}`' for label in facts.labels)}.")
    return "## Data\n\n" + "\n\n".join(lines)


def _training(facts: CardFacts) -> str:
    lines = []
    if facts.tuning:
        lines.append(f"Tuning: `{facts.tuning}`.")
    if facts.trainable_parameters is not None and facts.total_parameters:
        share = 100 * facts.trainable_parameters / facts.total_parameters
        lines.append(
            f"Trained {facts.trainable_parameters:,} of {facts.total_parameters:,} parameters ({share:.3g} %)."
        )
    parts = [" ".join(lines)] if lines else []
    if facts.hyperparameters:
        rows = [[f"`{name}`", f"`{value}`"] for name, value in facts.hyperparameters.items() if value is not None]
        parts.append(_table(["hyper-parameter", "value"], rows))
    if facts.versions:
        parts.append("Versions: " + ", ".join(f"{name} {version}" for name, version in facts.versions.items()) + ".")
    return "## Training\n\n" + "\n\n".join(parts) if parts else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
