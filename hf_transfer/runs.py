"""What every run shares, from options to a Result: finetune() and distill() are these steps around a Trainer."""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import TransferError

if TYPE_CHECKING:
    from .backbones import Backbone
    from .config import RunConfig
    from .data.sources import Data
    from .plans import Plan
    from .trainer import TransferConfig, TransferTrainer

logger = logging.getLogger(__name__)

TRAINER_SEED = 42  # TrainingArguments' own default
Run = TypeVar("Run", bound="RunConfig")
Config = TypeVar("Config", bound="TransferConfig")


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


def split_options(
    options: Mapping[str, Any], run: type[Run], config: type[Config], **named: Any
) -> tuple[Run, dict[str, Any]]:
    """A run's own options, and the training arguments that were given.

    Args:
        options: What the caller gave by keyword.
        run: The class of the run's own options.
        config: The class of the training arguments.
        **named: The run's options that the caller has as arguments of its own.

    Raises:
        TransferError: If neither class has an option.
    """
    own = {f.name for f in fields(run)}
    known = own | {f.name for f in fields(config)}
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3)
            raise TransferError(f"Unknown option {name!r}. Nearest: {', '.join(near) or 'none'}.")
    mine = {name: value for name, value in options.items() if name in own}
    return run(**named, **mine), {name: value for name, value in options.items() if name not in own}


def shown(source: Any) -> str:
    """What to call a model or data: as it was named, or the name of a Backbone that was loaded before."""
    return str(source) if isinstance(source, (str, Path)) else str(getattr(source, "name", "data in memory"))


def load(dataset: Any, run: RunConfig, seed: int) -> Data:
    """The data that a run asks for."""
    from .data.sources import load_data

    return load_data(
        dataset,
        input_column=run.input_column,
        label_column=run.label_column,
        task=run.task,
        max_train_samples=run.max_train_samples,
        max_eval_samples=run.max_eval_samples,
        validation=run.validation,
        seed=seed,
    )


def arguments(config: type[Config], used: dict[str, Any], given: Mapping[str, Any], data: Data) -> Config:
    """The Trainer's arguments, checked against the splits there are.

    Args:
        config: Their class.
        used: What was given or recommended.
        given: What the user gave.
        data: The data.

    Raises:
        TransferError: If they do not go together.
    """
    if "validation" not in data.splits:
        for name in ("early_stopping_patience", "load_best_model_at_end"):
            if used.get(name):
                raise TransferError(f"{name} needs a validation split, and there is none: {data.selection}.")
        if str(given.get("eval_strategy", "no")) not in ("no", "IntervalStrategy.NO"):
            raise TransferError(f"eval_strategy needs a validation split, and there is none: {data.selection}.")
        used["eval_strategy"] = "no"
    try:
        args = config(**used)
    except ValueError as error:  # TrainingArguments' own checks
        raise TransferError(str(error)) from error
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise TransferError(
            "finetune() and distill() do not run under FSDP, as they save and measure the whole model in one process: "
            "launch with DDP, or train with TransferTrainer or DistillationTrainer."
        )
    args.batch_eval_metrics = True  # the metrics read a batch at a time; memory stays flat
    return args


def log_choices(run: RunConfig, backbone: Backbone, args: TransferConfig, recommended: Mapping[str, Any]) -> None:
    """Says what nobody asked for by name: recommended arguments, rows a step, the numbers of the classes."""
    from .freezing import shortened

    chosen = ", ".join(f"{name}={value!r}" for name, value in recommended.items())
    logger.info("Recommended for %s with tuning %r: %s", backbone.modality, run.tuning, chosen or "nothing")
    sizes = (args.train_batch_size, args.gradient_accumulation_steps, args.world_size)
    logger.info("%d rows a step: %d a process, accumulated %d times, processes %d", math.prod(sizes), *sizes)
    if backbone.labels:
        names = [f"{number} {name}" for number, name in enumerate(backbone.labels)]
        logger.info("Labels: %s", ", ".join(shortened(names)))


def check_output(args: TransferConfig, backbone: Backbone) -> bool:
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
    check_push(repository(args), token=args.hub_token, model=backbone.model)
    args.push_to_hub = False
    return True


def repository(args: TransferConfig) -> str:
    """Where a run is pushed to."""
    return args.hub_model_id or Path(args.output_dir).resolve().name


def finish(result: Result, trainer: TransferTrainer, args: TransferConfig, *, publish: bool) -> Result:
    """Saves a run's folder on the first process, for which all wait, and uploads it where that was asked for.

    Args:
        result: What the run gave.
        trainer: Its last.
        args: The Trainer's arguments, which say where to.
        publish: Whether to upload, as `check_output` answered.

    Returns:
        The result.
    """
    if trainer.is_world_process_zero():
        result.save(result.folder)
    trainer.accelerator.wait_for_everyone()
    if publish and trainer.is_world_process_zero():
        where: dict[str, Any] = {"private": args.hub_private_repo, "token": args.hub_token}
        result.push_to_hub(repository(args), revision=args.hub_revision, **where)
    return result


def prepare_splits(data: Data, backbone: Backbone, run: RunConfig, args: TransferConfig) -> dict[str, Any]:
    """Every split, ready for a backbone."""
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


def evaluate_splits(trainer: TransferTrainer, prepared: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Metrics of the final model by split, without the Trainer's timings."""
    metrics: dict[str, dict[str, float]] = {}
    for split in ("validation", "test"):
        if split in prepared:
            found = trainer.evaluate(prepared[split], metric_key_prefix=split)
            named = {name.removeprefix(f"{split}_"): value for name, value in found.items()}
            timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch")
            metrics[split] = {name: value for name, value in named.items() if name not in timings}
    return metrics
