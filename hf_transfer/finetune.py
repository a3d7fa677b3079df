"""finetune(): one call from a backbone and data to a Result.

from hf_transfer import finetune
result = finetune("timm/resnet18.a1_in1k", "uoft-cs/cifar10", tuning="lora")
result.metrics["test"]; result.push_to_hub("me/resnet18-cifar10")
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .config import RunConfig
from .errors import TransferError
from .recommended import training_defaults
from .runs import (
    TRAINER_SEED,
    Result,
    arguments,
    check_output,
    evaluate_splits,
    finish,
    load,
    log_choices,
    prepare_splits,
    shown,
    split_options,
)

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from .backbones import Backbone
    from .data.sources import Data
    from .objective import Objective
    from .trainer import TransferConfig, TransferTrainer
    from .tuning import Tuning


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
    from .evaluation import check_best_metric, compute_metrics_for
    from .frozen.training import CachedTrainer
    from .phases import train_in_phases
    from .plans import plan
    from .run_folder import run_facts
    from .starting_points import starting_backbone
    from .transfer_config import TransferConfig

    started = time.time()
    run, training = split_options(
        {**options, "output_dir": str(output_dir)}, RunConfig, TransferConfig, model=shown(model),
        dataset=shown(dataset), tuning=tuning if isinstance(tuning, str) else _name_of(tuning),
    )  # fmt: skip
    chosen = _tuning(tuning, run)
    seed = training.get("seed", TRAINER_SEED)
    data = load(dataset, run, seed)
    backbone = starting_backbone(model, run, data, adapt=_makes_adapter(chosen), seed=seed)
    used = {**training_defaults(backbone.modality, run.tuning, backbone.model), **training}
    args = arguments(TransferConfig, used, training, data)
    check_best_metric(args, compute_metrics_for(backbone.task, backbone.labels or backbone.outputs).names)
    log_choices(run, backbone, args, {name: value for name, value in used.items() if name not in training})
    terms = _default_terms(backbone, data, run, args) if objectives is None else _given_terms(objectives, run)
    steps = chosen.phases(backbone.model)
    backbone.model = cast(Any, steps[0].apply(backbone.model))
    publish = check_output(args, backbone)
    prepared = prepare_splits(data, backbone, run, args)
    rows = _Rows(prepared, run, args)
    done = train_in_phases(backbone, steps, args, lambda phase: _trainer(backbone, phase, rows, terms, run))
    metrics = evaluate_splits(done.trainer, prepared)
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
    if isinstance(done.trainer, CachedTrainer):
        facts["cache"] = str(done.trainer.cut)
    result = Result(backbone, metrics, done.history, trained, facts, Path(args.output_dir))
    return finish(result, done.trainer, args, publish=publish)


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


class _Rows:
    """The splits that are trained and evaluated on; stored where a network runs whole on them, once for all phases."""

    def __init__(self, prepared: dict[str, Any], run: RunConfig, args: TransferConfig) -> None:
        self.prepared, self.run, self.args = prepared, run, args

    @cached_property
    def stored(self) -> dict[str, Any]:
        from .data.store_choice import stored_splits

        return stored_splits(self.prepared, self.run, self.args)

    @property
    def for_frozen_layers(self) -> dict[str, Any]:
        """What a cache of frozen layers is computed from: it reads each view once, for which no store is written."""
        return self.stored if self.run.image_store == "always" else self.prepared


def _trainer(
    backbone: Backbone, args: TransferConfig, rows: _Rows, terms: Sequence[Objective], run: RunConfig
) -> TransferTrainer:
    from .data.collate import collator_for
    from .evaluation import compute_metrics_for
    from .frozen.choice import cached_data
    from .trainer import TransferTrainer

    collator = collator_for(backbone, mixup=run.mixup, cutmix=run.cutmix, seed=args.seed)
    cached = cached_data(backbone, rows.for_frozen_layers, collator, args, terms, run)
    prepared = rows.stored if cached is None else rows.for_frozen_layers
    return (TransferTrainer if cached is None else cached.trainer)(
        model=backbone.model,
        args=args,
        train_dataset=prepared["train"],
        eval_dataset=prepared.get("validation"),
        processing_class=backbone.processor,
        data_collator=collator,
        compute_metrics=compute_metrics_for(backbone.task, backbone.labels or backbone.outputs),
        objectives=terms,
    )
