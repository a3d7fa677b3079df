"""finetune(): one call from a backbone and data to a Result.

from hf_transfer import finetune
result = finetune("timm/resnet18.a1_in1k", "uoft-cs/cifar10", tuning="lora")
result.metrics["test"]; result.push_to_hub("me/resnet18-cifar10")
"""

from __future__ import annotations

import difflib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
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

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Uploads the run folder as a model repository.

        Args:
            repo_id: `user/name`.
            private: Whether a new repository is private; the account's default if None.
            token: A write token; the stored login if None.
            revision: The branch; `main` if None.

        Returns:
            The address of the commit.
        """
        from .hub.push import push

        return push(self.folder, repo_id, private=private, token=token, revision=revision)


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
            What is not given takes the recommended value for this modality and tuning (recommended.py). With
            `push_to_hub` the finished run folder is uploaded once, at the end, to `hub_model_id` (by default the
            folder's name, in the token's account).

    Returns:
        The Result.

    Raises:
        TransferError: For bad input, before any training.
    """
    from .data.sources import load_data
    from .phases import train_in_phases
    from .plans import plan
    from .run_folder import run_facts
    from .starting_points import starting_backbone

    started = time.time()
    run, training = _split_options(model, dataset, tuning, {**options, "output_dir": str(output_dir)})
    chosen = _tuning(tuning, run)
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
    backbone = starting_backbone(model, run, data, adapt=_makes_adapter(chosen), seed=seed)
    used = {**training_defaults(backbone.modality, run.tuning), **training}
    args = _arguments(used, training, data)
    _log_choices(run, backbone, args, {name: value for name, value in used.items() if name not in training})
    terms = _default_terms(backbone, data, run, args) if objectives is None else _given_terms(objectives, run)
    steps = chosen.phases(backbone.model)
    backbone.model = cast(Any, steps[0].apply(backbone.model))
    publish = _check_output(args, backbone)
    prepared = _prepare(data, backbone, run, args)
    done = train_in_phases(backbone, steps, args, lambda phase: _trainer(backbone, phase, prepared, terms, run))
    metrics = _evaluate(done.trainer, prepared)
    rates = {name: getattr(args, name) for name in ("learning_rate", "head_learning_rate", "layer_decay")}
    trained = plan(backbone.model, **rates)
    facts = {
        **run_facts(run, args, used, data, prepared),
        "tuning_settings": str(chosen),
        "objectives": [term.name for term in terms],
        "trainable_parameters": trained.trainable,
        "total_parameters": trained.total,
        "metrics": metrics,
        "steps": done.steps,
        "seconds": {"train": round(done.seconds, 1), "total": round(time.time() - started, 1)},
    }
    result = Result(backbone, metrics, done.history, trained, facts, Path(args.output_dir))
    if done.trainer.is_world_process_zero():
        result.save(result.folder)
    done.trainer.accelerator.wait_for_everyone()
    if publish and done.trainer.is_world_process_zero():
        private, token, revision = args.hub_private_repo, args.hub_token, args.hub_revision
        result.push_to_hub(_repository(args), private=private, token=token, revision=revision)
    return result


def _tuning(tuning: str | Tuning, run: RunConfig) -> Tuning:
    from .tuning import tuning_from_name

    if isinstance(tuning, str):
        chosen = tuning_from_name(tuning, train_blocks=run.train_blocks, lora_r=run.lora_r)
    elif run.train_blocks is not None or run.lora_r is not None:
        raise TransferError(f"train_blocks and lora_r go with a tuning's name; {tuning} has its own: leave them out.")
    else:
        chosen = tuning
    if _makes_adapter(chosen) and not run.pretrained:
        raise TransferError(
            f"tuning={run.tuning!r} saves an adapter without its base, and with pretrained=False the base is random "
            "weights that are saved nowhere. Train those whole (tuning='full'), or save them first: "
            "load_backbone(..., pretrained=False).save(folder)."
        )
    return chosen


def _makes_adapter(tuning: Tuning) -> bool:
    from .tuning import LoRA, Peft

    return isinstance(tuning, (LoRA, Peft))


def _name_of(tuning: Tuning) -> str:
    """The name by which recipes know a kind of tuning, its class's for others."""
    from .tuning import TUNINGS, tuning_from_name

    return next((name for name in TUNINGS if type(tuning_from_name(name)) is type(tuning)), type(tuning).__name__)


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
        tuning=tuning if isinstance(tuning, str) else _name_of(tuning),
        **{name: value for name, value in options.items() if name in own},
    )
    return run, {name: value for name, value in options.items() if name not in own}


def _arguments(used: dict[str, Any], given: Mapping[str, Any], data: Data) -> TransferConfig:
    from .transfer_config import TransferConfig

    if "validation" not in data.splits:
        for name in ("early_stopping_patience", "load_best_model_at_end"):
            if used.get(name):
                raise TransferError(f"{name} needs a validation split, and there is none: {data.selection}.")
        if str(given.get("eval_strategy", "no")) not in ("no", "IntervalStrategy.NO"):
            raise TransferError(f"eval_strategy needs a validation split, and there is none: {data.selection}.")
        used["eval_strategy"] = "no"
    try:
        args = TransferConfig(**used)
    except ValueError as error:  # TrainingArguments' own checks
        raise TransferError(str(error)) from error
    args.batch_eval_metrics = True  # the metrics read a batch at a time; memory stays flat
    return args


def _log_choices(run: RunConfig, backbone: Backbone, args: TransferConfig, recommended: Mapping[str, Any]) -> None:
    """Says what nobody asked for by name: recommended arguments, rows a step, the numbers of the classes."""
    from .freezing import shortened

    chosen = ", ".join(f"{name}={value!r}" for name, value in recommended.items())
    logger.info("Recommended for %s with tuning %r: %s", backbone.modality, run.tuning, chosen or "nothing")
    sizes = (args.train_batch_size, args.gradient_accumulation_steps, args.world_size)
    logger.info("%d rows a step: %d a process, accumulated %d times, processes %d", math.prod(sizes), *sizes)
    if backbone.labels:
        names = [f"{number} {name}" for number, name in enumerate(backbone.labels)]
        logger.info("Labels: %s", ", ".join(shortened(names)))


def _check_output(args: TransferConfig, backbone: Backbone) -> bool:
    """Whether the tuned model can be saved, and pushed if that is asked for. Returns whether it is.

    From here on the Trainer does not know of it: it would create the repository now, and push every checkpoint with a
    card of its own.
    """
    from .hub.bundle import check_output_folder
    from .hub.push import check_push

    check_output_folder(args.output_dir, backbone.model)
    if not args.push_to_hub:
        return False
    strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy))  # by default "every_save"
    if strategy not in ("end", "every_save") or args.hub_always_push:
        raise TransferError(
            f"hub_strategy={strategy!r} with hub_always_push={args.hub_always_push}: the finished run is pushed "
            "once, at the end. Leave hub_strategy and hub_always_push out."
        )
    check_push(_repository(args), token=args.hub_token, model=backbone.model)
    args.push_to_hub = False
    return True


def _repository(args: TransferConfig) -> str:
    return args.hub_model_id or Path(args.output_dir).resolve().name


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


def _default_terms(backbone: Backbone, data: Data, run: RunConfig, args: TransferConfig) -> list[Objective]:
    """The task's own loss: cross-entropy (label-smoothed, class-weighted as asked), or MSE for regression."""
    from .data.sampling import class_weights
    from .objectives import MSE, CrossEntropy

    weights = None
    smoothing, args.label_smoothing_factor = args.label_smoothing_factor, 0.0  # the term takes it over
    if data.labels is None and (run.class_weights or smoothing):
        name = "class_weights" if run.class_weights else "label_smoothing_factor"
        raise TransferError(f"{name} is for data with classes; this is data for {data.columns.task}. Leave it out.")
    if backbone.task == "regression":
        return [MSE()]
    if run.class_weights == "balanced":
        weights = class_weights(data.splits["train"][data.columns.label], len(data.labels or ()))
    return [CrossEntropy(label_smoothing=smoothing, class_weights=weights, shift=backbone.task == "causal-lm")]


def _given_terms(objectives: Sequence[Objective], run: RunConfig) -> list[Objective]:
    if run.class_weights:
        raise TransferError(
            "class_weights does not reach explicit objectives: pass CrossEntropy(class_weights=...) among them; "
            "hf_transfer.data.sampling.class_weights(labels, n) gives the balanced ones."
        )
    return list(objectives)


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
