"""distill(): one call from a teacher, a student and data to a Result.

from hf_transfer import distill
result = distill("runs/teacher", "mobilenetv3_small_050", "uoft-cs/cifar10", pretrained=False)
result = distill("runs/bert", "carve:3", "stanfordnlp/sst2", objectives=["SoftTargets(temperature=2.0, weight=0.9)"])
result.metrics["test"]              # the student's, its teacher's, and how alike they are
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .config import RunConfig, flag
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
    from .distillation.config import DistillationConfig
    from .distillation.trainer import DistillationTrainer
    from .objective import Objective

logger = logging.getLogger(__name__)

CARVED, BORN_AGAIN, BILSTM = "carve:", "born-again", "bilstm"


@dataclass
class DistillationRun(RunConfig):
    """RunConfig, and the teacher.

    Args:
        teacher: A Hub id, folder or name of the teacher. `model` is the student: likewise, or made from the teacher:
            "carve:3" (three of its layers), "born-again" (the same network, new weights), "bilstm" (its tokenizer).
        objectives: The terms that learn from the teacher, written as in Python: "SoftTargets(temperature=2.0)".
        baseline: The run folder of the same student trained without a teacher; scores are compared with its.

    Raises:
        TransferError: As RunConfig; or if there is no teacher.
    """

    teacher: str = flag("The teacher: Hub id, local folder, timm name or torchvision/NAME.", default="")
    objectives: list[str] | None = field(
        default=None, metadata={"help": "Terms as in Python, e.g. 'SoftTargets(temperature=2.0)'."}
    )
    baseline: str | None = flag("Run folder of the same student without a teacher.", default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher:
            raise TransferError("teacher must be given: a Hub id or a folder, on the command line --teacher NAME.")
        if self.cache != "auto" or self.cache_views is not None:
            raise TransferError(
                f"cache={self.cache!r}, cache_views={self.cache_views!r}: they are finetune()'s, for frozen layers. "
                "For the teacher's answers give teacher_cache and teacher_cache_views."
            )

    def name_parts(self) -> tuple[str, ...]:
        """As RunConfig's, and the teacher: the same student without one has a folder of its own."""
        return (*super().name_parts(), "from", Path(self.teacher).resolve().name)


def distill(
    teacher: Any,
    model: str | Path | Backbone,
    dataset: str | Path | Dataset | DatasetDict | Mapping[str, Dataset],
    *,
    objectives: Sequence[Objective | str] | None = None,
    output_dir: str | Path = "distilled",
    **options: Any,
) -> Result:
    """Distils a teacher into a student on data, evaluates both, saves the student.

    Args:
        teacher: A Hub id, a folder, a Backbone, a network, or a list of these.
        model: The student: a Hub id, folder, timm name or Backbone; or made from the (first) teacher: "carve:3",
            "carve:0,2,5", "born-again", "bilstm".
        dataset: As for `finetune`.
        objectives: The terms that learn from the teacher, as objects or as they are written in Python; by default
            soft targets. The loss against the labels joins them with `hard_weight`.
        output_dir: The run folder.
        **options: Any field of DistillationRun or DistillationConfig.

    Returns:
        The Result. Its metrics tell, for each split, the student's and the teacher's scores and how alike they are.

    Raises:
        TransferError: For bad input, before any training.
    """
    from .distillation.config import DistillationConfig
    from .distillation.fidelity import MEASURES
    from .evaluation import check_best_metric, compute_metrics_for
    from .hub.leaks import shown_name
    from .plans import plan
    from .run_folder import run_facts
    from .tuning import tuning_from_name

    started = time.time()
    run, training = split_options(
        {**options, "output_dir": str(output_dir)}, DistillationRun, DistillationConfig, model=shown(model),
        dataset=shown(dataset), teacher=_shown_teacher(teacher),
    )  # fmt: skip
    terms = _terms(objectives)
    baseline = _baseline(run.baseline)
    seed = training.get("seed", TRAINER_SEED)
    data = load(dataset, run, seed)
    teachers = _teachers(teacher)
    student = _student(model, teachers[0], run, data, seed)
    used = {**training_defaults(student.modality, run.tuning, student.model), **training}
    args = arguments(DistillationConfig, used, training, data)
    metrics_of_task = compute_metrics_for(student.task, student.labels or student.outputs).names
    check_best_metric(args, [*metrics_of_task, *MEASURES])
    args.baseline_score = baseline.get("validation", args.baseline_score)
    log_choices(run, student, args, {name: value for name, value in used.items() if name not in training})
    tuning = tuning_from_name(run.tuning, train_blocks=run.train_blocks, lora_r=run.lora_r)
    if len(tuning.phases(student.model)) > 1:
        raise TransferError(f"tuning={run.tuning!r} has several phases, and distill() trains once. Use another.")
    student.model = cast(Any, tuning.apply(student.model))
    publish = check_output(args, student)
    prepared, collator = _rows(data, student, teachers, run, args)
    trainer = _trainer(student, teachers, terms, prepared, collator, args)
    seconds = trainer.train(args.resume_from_checkpoint).metrics["train_runtime"]
    metrics = _evaluate(trainer, prepared, baseline)
    trained = plan(student.model, learning_rate=args.learning_rate)
    facts = {
        **run_facts(run, args, used, data, {split: prepared[split] for split in data.splits}),
        "teacher": ", ".join(map(shown_name, run.teacher.split(", "))),
        "tuning_settings": str(tuning),
        "objectives": [str(term) for term in trainer.objectives],
        "trainable_parameters": trained.trainable,
        "total_parameters": trained.total,
        "metrics": metrics,
        "costs": _costs(trainer),
        "calibration": _calibrate(trainer, prepared),
        "steps": trainer.state.global_step,
        "seconds": {"train": round(seconds, 1), "total": round(time.time() - started, 1)},
    }
    result = Result(student, metrics, trainer.state.log_history, trained, facts, Path(args.output_dir))
    return finish(result, trainer, args, publish=publish)


def _shown_teacher(teacher: Any) -> str:
    return ", ".join(map(shown, teacher if isinstance(teacher, (list, tuple)) else [teacher]))


def _terms(objectives: Sequence[Objective | str] | None) -> list[Objective] | None:
    if objectives is None:
        return None
    from .written_terms import terms_from_text

    return [term for item in objectives for term in (terms_from_text([item]) if isinstance(item, str) else [item])]


def _baseline(folder: str | None) -> dict[str, float]:
    """The accuracy by split of a run without a teacher; empty without one."""
    if folder is None:
        return {}
    path = Path(folder) / "results.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        return {split: values["accuracy"] for split, values in metrics.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TransferError(
            f"baseline={folder!r}: {path} holds no accuracy of a run ({error!r}). Give the run folder of the same "
            "student trained without a teacher."
        ) from error


def _teachers(teacher: Any) -> list[Backbone]:
    from torch import nn

    from .adapters import is_adapted
    from .backbones import Backbone, load_backbone
    from .distillation.live import refuse_fresh_head
    from .distillation.teacher import backbone_of, merged

    def one(given: Any) -> Backbone:
        if isinstance(given, Backbone):
            return given
        if isinstance(given, nn.Module):
            return backbone_of(given, None)
        loaded = load_backbone(given)
        if not is_adapted(loaded.model):
            return loaded
        refuse_fresh_head(loaded)
        return merged(loaded)

    given = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
    if not given:
        raise TransferError("teacher=[] is empty: give at least one.")
    return [one(item) for item in given]


def _student(model: Any, teacher: Backbone, run: DistillationRun, data: Data, seed: int) -> Backbone:
    from transformers import set_seed

    from .distillation.student import bilstm_student, born_again, carve
    from .starting_points import starting_backbone

    made = isinstance(model, str) and (model.startswith(CARVED) or model in (BORN_AGAIN, BILSTM))
    if not made:
        return starting_backbone(model, run, data, adapt=run.tuning == "lora", seed=seed)
    if teacher.task != data.columns.task:
        raise TransferError(
            f"model={model!r} is made from the teacher {teacher.name!r}, which is for {teacher.task}, and the data is "
            f"for {data.columns.task}: give a teacher of the data's task."
        )
    set_seed(seed)  # new weights are drawn at random
    if model.startswith(CARVED):
        return carve(teacher, _layers(model))
    return (born_again if model == BORN_AGAIN else bilstm_student)(teacher)


def _layers(model: str) -> int | list[int]:
    """carve:3 -> 3 layers; carve:0,2,5 -> these."""
    try:
        numbers = [int(number) for number in model.removeprefix(CARVED).split(",")]
    except ValueError:
        raise TransferError(f"model={model!r}: write how many layers, carve:3, or which, carve:0,2,5.") from None
    return numbers if len(numbers) > 1 else numbers[0]


def _rows(
    data: Data, student: Backbone, teachers: Sequence[Backbone], run: DistillationRun, args: DistillationConfig
) -> tuple[dict[str, Any], Any]:
    """The splits for the student, with a teacher's own inputs where it reads rows in another way; the collator."""
    from .data.collate import collator_for
    from .data.store_choice import stored_splits
    from .distillation.bridge import TeacherInputs, reads_otherwise, with_teacher_inputs

    prepared = prepare_splits(data, student, run, args)
    collator = collator_for(student, mixup=run.mixup, cutmix=run.cutmix, seed=args.seed)
    others = [teacher for teacher in teachers if reads_otherwise(teacher, student)]
    if not others:
        return stored_splits(prepared, run, args), collator
    if len(teachers) > 1:
        raise TransferError(
            f"{others[0].name!r} reads text or sound in another way than the student. Of several teachers all must "
            "read it as the student does."
        )
    own = prepare_splits(data, teachers[0], run, args)
    rows = {split: with_teacher_inputs(prepared[split], own[split]) for split in prepared}
    return rows, TeacherInputs(collator, collator_for(teachers[0]))


def _trainer(
    student: Backbone,
    teachers: Sequence[Backbone],
    terms: Sequence[Objective] | None,
    prepared: Mapping[str, Any],
    collator: Any,
    args: DistillationConfig,
) -> DistillationTrainer:
    from .distillation.trainer import DistillationTrainer
    from .evaluation import compute_metrics_for

    return DistillationTrainer(
        model=student,
        teacher=teachers[0] if len(teachers) == 1 else list(teachers),
        objectives=terms,
        args=args,
        train_dataset=prepared["train"],
        eval_dataset=prepared.get("validation"),
        data_collator=collator,
        compute_metrics=compute_metrics_for(student.task, student.labels or student.outputs),
    )


def _evaluate(
    trainer: DistillationTrainer, prepared: dict[str, Any], baseline: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Metrics by split, each compared with the baseline's of the same split."""
    metrics: dict[str, dict[str, float]] = {}
    for split in ("validation", "test"):
        if split in prepared:
            if baseline:
                trainer.args.baseline_score = baseline.get(split)
            metrics |= evaluate_splits(trainer, {split: prepared[split]})
    return metrics


def _costs(trainer: DistillationTrainer) -> dict[str, Any]:
    """Parameters, multiply-adds of one row and the ratio of latencies, of student and teacher."""
    from .distillation.costs import latency_ratio, macs, parameters
    from .distillation.live import NetworkTeacher
    from .objective import model_inputs

    if not isinstance(trainer.teacher, NetworkTeacher):
        return {}
    batch = {name: value.to(trainer.args.device) for name, value in trainer.sample_batch(1).items()}
    inputs, theirs = model_inputs(batch), trainer.teacher.bridge(batch)
    student, teacher = trainer.model, trainer.teacher.backbone.model
    ratio = latency_ratio(student, inputs, teacher, theirs)
    return {
        "parameters": {"student": parameters(student), "teacher": parameters(teacher)},
        "macs_a_row": {"student": macs(student, inputs), "teacher": macs(teacher, theirs)},
        "latency_student_to_teacher": ratio._asdict(),
    }


def _calibrate(trainer: DistillationTrainer, prepared: Mapping[str, Any]) -> dict[str, float]:
    """Fits one temperature on validation data and writes it into the config: `config.calibration_temperature`."""
    from .evaluation.calibration import expected_calibration_error, fit_temperature

    if "validation" not in prepared or not trainer.student.task.endswith("-classification"):
        return {}
    if trainer.student.task == "token-classification":
        return {}
    logits, labels = trainer.student_logits(prepared["validation"])
    temperature = fit_temperature(logits, labels)
    config: Any = trainer.model.config
    config.calibration_temperature = temperature
    return {
        "temperature": temperature,
        "ece_before": float(expected_calibration_error(logits, labels)),
        "ece_after": float(expected_calibration_error(logits / temperature, labels)),
    }
