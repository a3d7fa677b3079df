"""finetune(): one call from a backbone and data to a Result.

from hf_transfer import finetune
result = finetune("timm/resnet18.a1_in1k", "uoft-cs/cifar10", tuning="lora")
result.metrics["test"]; result.push_to_hub("me/resnet18-cifar10")
"""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .config import RunConfig
from .errors import TransferError
from .recommended import training_defaults

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from .backbones import Backbone
    from .data.sources import Data
    from .objective import Objective
    from .plans import Plan
    from .trainer import TransferConfig, TransferTrainer
    from .tuning import Tuning

logger = logging.getLogger(__name__)

TRAINER_SEED = 42  # TrainingArguments' own default
_TOLD_ELSEWHERE = ("model", "dataset", "tuning", "task", "pretrained")  # in results.json, beside the options


@dataclass
class Result:
    """What a fine-tuning gave.

    Attributes:
        backbone: The tuned model with its processor, labels and task.
        metrics: Metrics by split: `{"validation": {"accuracy": ...}, "test": {...}}`.
        history: The Trainer's log, one entry a logging step or evaluation.
        plan: What was trained, with parameters and learning rates by group.
        facts: What results.json holds.
        folder: The run folder: an ordinary checkpoint, README.md (the card) and results.json.
    """

    backbone: Backbone
    metrics: dict[str, dict[str, float]]
    history: list[dict[str, Any]]
    plan: Plan
    facts: dict[str, Any]
    folder: Path

    @property
    def model(self) -> Any:
        """The tuned model."""
        return self.backbone.model

    def save(self, folder: str | Path) -> None:
        """Writes model, card and results.json to another folder."""
        from .run_folder import write_run

        write_run(Path(folder), self.backbone, self.facts)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Uploads the run folder as a model repository.

        Args:
            repo_id: `user/name`.
            private: Whether a new repository is private; the account's default if None.
            token: A write token; the stored login if None.

        Returns:
            The address of the commit.
        """
        from .hub.push import push

        return push(self.folder, repo_id, private=private, token=token)


def finetune(
    model: str | Path | Backbone,
    dataset: str | Path | Dataset | DatasetDict | Mapping[str, Dataset],
    *,
    tuning: str | Tuning = "full",
    objectives: Sequence[Objective] | None = None,
    output_dir: str | Path = "finetuned",
    **options: Any,
) -> Result:
    """Fine-tunes a backbone on labelled data, evaluates, saves.

    Args:
        model: A Hub id, folder, timm name, or a loaded Backbone.
        dataset: A Hub id, a folder, a file, "digits", or a `datasets` object. The validation split is held out of
            train where there is none; the test split is looked at once, at the end.
        tuning: "full", "linear_probe", "partial", "gradual", "bitfit", "lora", or a Tuning.
        objectives: The terms to minimise; by default the task's own (cross-entropy, or MSE for regression).
        output_dir: The run folder.
        **options: Any field of RunConfig (image_size, max_train_samples, ...) or TransferConfig (learning_rate, ...).
            What is not given takes the recommended value for this modality and tuning (recommended.py).

    Returns:
        The Result.

    Raises:
        TransferError: For bad input, before any training.
    """
    from .data.sources import load_data
    from .plans import plan

    started = time.time()
    run, training = _split_options(model, dataset, tuning, {**options, "output_dir": str(output_dir)})
    seed = training.get("seed", TRAINER_SEED)
    data = load_data(
        dataset,
        input_column=run.input_column,
        label_column=run.label_column,
        task=run.task,
        max_train_samples=run.max_train_samples,
        max_eval_samples=run.max_eval_samples,
        validation=run.validation,
        seed=seed,
    )
    backbone = _backbone(model, run, data, seed)
    steps = _tuning_steps(tuning, run, backbone)
    args = _arguments(training, backbone, run, data)
    prepared = _prepare(data, backbone, run, args)
    terms = [default_objective(backbone, data, run, args)] if objectives is None else list(objectives)
    trainer, history, train_seconds = _train(backbone, steps, args, prepared, terms, run)
    metrics = _evaluate(trainer, prepared)
    rates = {name: getattr(args, name) for name in ("learning_rate", "head_learning_rate", "layer_decay")}
    result = Result(backbone, metrics, history, plan(backbone.model, **rates), {}, Path(args.output_dir))
    result.facts = _facts(run, args, training, data, result, trainer)
    result.facts["seconds"] = {"train": round(train_seconds, 1), "total": round(time.time() - started, 1)}
    if trainer.is_world_process_zero():
        result.save(result.folder)
    trainer.accelerator.wait_for_everyone()
    return result


def _split_options(model: Any, dataset: Any, tuning: Any, options: dict[str, Any]) -> tuple[RunConfig, dict[str, Any]]:
    """RunConfig's own options, and the training arguments that were given."""
    from .transfer_config import TransferConfig

    own = {f.name for f in fields(RunConfig)}
    known = own | {f.name for f in fields(TransferConfig)}
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3)
            raise TransferError(f"Unknown option {name!r} of finetune(). Nearest: {', '.join(near) or 'none'}.")
    run = RunConfig(
        model=str(getattr(model, "name", model)) if not isinstance(model, (str, Path)) else str(model),
        dataset=str(dataset) if isinstance(dataset, (str, Path)) else "data in memory",
        tuning=tuning if isinstance(tuning, str) else type(tuning).__name__,
        **{name: value for name, value in options.items() if name in own},
    )
    return run, {name: value for name, value in options.items() if name not in own}


def _backbone(model: Any, run: RunConfig, data: Data, seed: int) -> Backbone:
    """Loads the backbone for the data's labels; one that was loaded before must already know them."""
    from transformers import set_seed

    from .backbones import load_backbone
    from .data.columns import check_fits

    if isinstance(model, (str, Path)):
        set_seed(seed)  # a new head is drawn at random
        task = run.task or data.columns.task
        labels = data.labels if data.labels is not None else data.outputs
        model = load_backbone(model, labels=labels, task=task, pretrained=run.pretrained, image_size=run.image_size)
    elif data.labels is not None and list(model.labels or ()) != list(data.labels):
        unknown = sorted(set(data.labels) - set(model.labels or ()))
        raise TransferError(
            f"The data's labels {data.labels} are not the model's {model.labels}"
            + (f": {unknown} are not in the model" if unknown else ", in this order")
            + ". Load the backbone with load_backbone(..., labels=data.labels)."
        )
    check_fits(model.modality, data.columns)
    return model


def _tuning_steps(tuning: str | Tuning, run: RunConfig, backbone: Backbone) -> list[Tuning]:
    """The tunings to apply one after the other: one, or the phases of gradual unfreezing."""
    from .tuning import tuning_from_name

    if isinstance(tuning, str):
        tuning = tuning_from_name(tuning, train_blocks=run.train_blocks, lora_r=run.lora_r)
    return tuning.phases(backbone.model)


def _arguments(training: dict[str, Any], backbone: Backbone, run: RunConfig, data: Data) -> TransferConfig:
    from .hub.bundle import check_output_folder
    from .transfer_config import TransferConfig

    defaults = training_defaults(backbone.modality, run.tuning)
    if "validation" not in data.splits:
        defaults["eval_strategy"] = "no"
    args = TransferConfig(**{**defaults, **training})
    args.batch_eval_metrics = True  # the metrics read a batch at a time; memory stays flat
    if args.resume_from_checkpoint is None:
        check_output_folder(args.output_dir, backbone.model)
    return args


def _prepare(data: Data, backbone: Backbone, run: RunConfig, args: TransferConfig) -> dict[str, Any]:
    from .data.transforms import prepare

    with args.main_process_first(desc="data preparation"):
        return {
            split: prepare(
                rows,
                backbone,
                data.columns,
                train=split == "train",
                augment=run.augment or "light",
                image_size=run.image_size,
                max_length=run.max_length,
                seed=args.seed,
                on_bad_example=run.on_bad_example,
            )
            for split, rows in data.splits.items()
        }


def default_objective(backbone: Backbone, data: Data, run: RunConfig, args: TransferConfig) -> Objective:
    """The task's own loss: cross-entropy (label-smoothed, class-weighted as asked), or MSE for regression."""
    from .data.sampling import class_weights
    from .objectives import MSE, CrossEntropy

    if backbone.task == "regression":
        return MSE()
    smoothing, args.label_smoothing_factor = args.label_smoothing_factor, 0.0  # the term takes it over
    weights = None
    if run.class_weights == "balanced":
        weights = class_weights(data.splits["train"][data.columns.label], len(data.labels or ()))
    return CrossEntropy(label_smoothing=smoothing, class_weights=weights, shift=backbone.task == "causal-lm")


def _train(
    backbone: Backbone,
    steps: Sequence[Tuning],
    args: TransferConfig,
    prepared: dict[str, Any],
    terms: Sequence[Objective],
    run: RunConfig,
) -> tuple[TransferTrainer, list[dict[str, Any]], float]:
    """Trains each tuning with a Trainer of its own; several (gradual unfreezing) share the epochs.

    Returns:
        The last Trainer, the log of all, and the seconds spent training.
    """
    history: list[dict[str, Any]] = []
    seconds = 0.0
    for number, step in enumerate(steps, start=1):
        backbone.model = cast(Any, step.apply(backbone.model))
        phase = args if len(steps) == 1 else _phase(args, number, len(steps))
        trainer = _trainer(backbone, phase, prepared, terms, run)
        seconds += trainer.train(_checkpoint(args, phase, first=number == 1)).metrics["train_runtime"]
        history += trainer.state.log_history
    return trainer, history, seconds


def _phase(args: TransferConfig, number: int, phases: int) -> TransferConfig:
    """The arguments of one phase: its share of the training, its own folder of checkpoints."""
    phase = copy(args)
    phase.output_dir = str(Path(args.output_dir) / f"phase-{number}")
    phase.num_train_epochs = args.num_train_epochs / phases
    phase.max_steps = max(1, args.max_steps // phases) if args.max_steps > 0 else args.max_steps
    return phase


def _checkpoint(args: TransferConfig, phase: TransferConfig, *, first: bool) -> str | None:
    """Where to resume: a folder that was named, or with "true" the last whole checkpoint (of this phase, if any)."""
    from .checkpoints import last_complete_checkpoint

    asked = args.resume_from_checkpoint
    if asked is None or str(asked).lower() == "false":
        return None
    if str(asked).lower() != "true":
        return str(asked) if first else None
    found = last_complete_checkpoint(phase.output_dir)
    if found is None and first:
        raise TransferError(
            f"resume_from_checkpoint: no whole checkpoint in {phase.output_dir!r}. Train anew without it."
        )
    return found


def _trainer(
    backbone: Backbone, args: TransferConfig, prepared: dict[str, Any], terms: Sequence[Objective], run: RunConfig
) -> TransferTrainer:
    from .data.collate import collator_for
    from .evaluation import compute_metrics_for
    from .trainer import TransferTrainer

    return TransferTrainer(
        model=backbone.model,
        args=args,
        train_dataset=prepared["train"],
        eval_dataset=prepared.get("validation"),
        processing_class=backbone.processor,
        data_collator=collator_for(backbone, mixup=run.mixup, cutmix=run.cutmix, seed=args.seed),
        compute_metrics=compute_metrics_for(backbone.task, backbone.labels or backbone.outputs),
        objectives=terms,
    )


def _is_set(run: RunConfig, option: Field) -> bool:
    return option.name not in _TOLD_ELSEWHERE and getattr(run, option.name) != option.default


def _evaluate(trainer: TransferTrainer, prepared: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Metrics of the final model by split, without the Trainer's timings."""
    metrics: dict[str, dict[str, float]] = {}
    for split in ("validation", "test"):
        if split in prepared:
            found = trainer.evaluate(prepared[split], metric_key_prefix=split)
            named = {name.removeprefix(f"{split}_"): value for name, value in found.items()}
            timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch")
            metrics[split] = {name: value for name, value in named.items() if name not in timings}
    return metrics


def selection_rule(args: TransferConfig, data: Data) -> str:
    """How the evaluated weights were chosen, in words."""
    if not args.load_best_model_at_end:
        return f"last step; nothing was selected ({data.selection})"
    return f"best {args.metric_for_best_model} on validation ({data.selection})"


def _facts(
    run: RunConfig,
    args: TransferConfig,
    training: dict[str, Any],
    data: Data,
    result: Result,
    trainer: TransferTrainer,
) -> dict[str, Any]:
    """What results.json holds."""
    from .hub.leaks import shown_name
    from .run_folder import library_versions

    used = {**training_defaults(result.backbone.modality, run.tuning), **training}
    kept = {"num_train_epochs": args.num_train_epochs, **{name: getattr(args, name, None) for name in used}}
    local = ("output_dir", "hub_token", "report_to", "resume_from_checkpoint", "push_to_hub")
    return {
        "model": shown_name(run.model),
        "pretrained": run.pretrained,
        "task": result.backbone.task,
        "tuning": run.tuning,
        "metrics": result.metrics,
        "selection": selection_rule(args, data),
        "data": {"name": data.name, "fingerprint": data.fingerprint},
        "counts": {split: len(rows) for split, rows in data.splits.items()},
        "trainable_parameters": result.plan.trainable,
        "total_parameters": result.plan.total,
        "steps": trainer.state.global_step,
        "processes": args.world_size,
        "seed": args.seed,
        "options": {f.name: getattr(run, f.name) for f in fields(run) if _is_set(run, f)},
        "training_arguments": {name: value for name, value in kept.items() if name not in local},
        "versions": library_versions(),
    }
