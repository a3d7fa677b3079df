"""Trains tiny models on two processes, under DDP or FSDP2, and writes what came of it. Run by test_fsdp.py.

torchrun --nproc_per_node 2 tests/invariants/fsdp_run.py FOLDER fsdp
torchrun --nproc_per_node 2 tests/invariants/fsdp_run.py FOLDER fsdp projector weights
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_transfer._torchvision import make_torchvision_importable

make_torchvision_importable()

from accelerate import PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from distillation.language_rows import language_backbone, language_rows, padded  # noqa: E402
from invariants.test_resume import StopAt  # noqa: E402
from invariants.training_step import CLASSES, ROWS, backbone, rows, tiny_model  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

from hf_transfer import DistillationConfig, DistillationTrainer, LoRA, TransferConfig, TransferTrainer  # noqa: E402
from hf_transfer.objective import Objective  # noqa: E402
from hf_transfer.objectives import (  # noqa: E402
    CRD,
    DANN,
    L1,
    L2SP,
    CrossEntropy,
    Hint,
    MiniLMRelation,
    SimilarityPreserving,
    SoftTargets,
)
from hf_transfer.shards import gathered, is_sharded  # noqa: E402

STEPS, STOP_AT = 6, 4
WORLD = int(os.environ.get("WORLD_SIZE", 1))
MEANWHILE = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4 // WORLD}
ACTIVATIONS = "activation_checkpointing"  # before transformers 5.23 by another name
CHECKPOINTING = ACTIVATIONS if hasattr(TrainingArguments, ACTIVATIONS) else "gradient_checkpointing"
SCORES = ("eval_loss", "eval_kl", "eval_agreement", "eval_student_accuracy")
OPEN = {"reshard_after_forward": False}


def arguments(kind: type[TrainingArguments], folder: Path, strategy: str, fsdp: Any = None, **options: Any) -> Any:
    """Training arguments. accelerate makes FSDP of several GPUs only: it is told that these processes have some."""
    sharding = {"fsdp": True, "fsdp_config": {"version": 2, **(fsdp or {})}} if strategy == "fsdp" else {}
    given = {
        "output_dir": str(folder), "per_device_train_batch_size": 8 // WORLD, "max_steps": STEPS,
        "learning_rate": 1e-2, "adam_epsilon": 1e-3,  # else Adam makes steps of gradients that are rounding alone
        "max_grad_norm": 0.5, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
        "save_strategy": "no", **sharding, **options,
    }  # fmt: skip
    args = kind(**given)
    if strategy == "fsdp":
        assert args.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


def labelled(modality: str) -> Any:
    data = rows(modality).remove_columns(["labels", "domain"])
    return data.add_column("labels", [i % CLASSES for i in range(ROWS)])


def stock(folder: Path, strategy: str) -> Trainer:
    """The stock Trainer: shows that FSDP runs here at all, and what it is compared with."""
    args = arguments(TrainingArguments, folder, strategy, fsdp={"transformer_layer_cls_to_wrap": ["BertLayer"]})
    data = labelled("text").remove_columns(["example_id"])
    return Trainer(model=tiny_model("text"), args=args, train_dataset=data)


def distillation(folder: Path, strategy: str, terms: list, modality: str = "text", **options: Any) -> Any:
    """A student and a wider teacher, which is decided where a new one is not."""
    caches = {"teacher_cache": "never", "teacher_cache_dir": str(folder / "caches")}
    args = arguments(DistillationConfig, folder, strategy, **{"hard_weight": 0.1, **caches, **options})
    teacher: Any = tiny_model(modality, width=24)
    with torch.no_grad():
        teacher.classifier.weight.mul_(50)
    return DistillationTrainer(
        backbone(tiny_model(modality), modality), backbone(teacher, modality), terms, args,
        train_dataset=labelled(modality), eval_dataset=labelled(modality),
    )  # fmt: skip


def adaptation(folder: Path, strategy: str, **options: Any) -> TransferTrainer:
    """Terms that read the features, own a discriminator, remember the starting weights, and read the weights."""
    return TransferTrainer(
        model=tiny_model("text"), args=arguments(TransferConfig, folder, strategy, **options),
        objectives=[CrossEntropy(), DANN(weight=0.5), L2SP(weight=0.1), L1(weight=1e-3)], train_dataset=rows("text"),
    )  # fmt: skip


def adapted(folder: Path, strategy: str, **options: Any) -> TransferTrainer:
    base: Any = tiny_model("text")
    base.save_pretrained(folder.parent / "base")
    base.name_or_path = base.config._name_or_path = str(folder.parent / "base")
    torch.manual_seed(3)
    return TransferTrainer(
        model=LoRA(r=4).apply(base), args=arguments(TransferConfig, folder, strategy, **options),
        objectives=[CrossEntropy(), L2SP(weight=0.1)], train_dataset=labelled("text"), eval_dataset=labelled("text"),
    )  # fmt: skip


def language(folder: Path, strategy: str, **options: Any) -> DistillationTrainer:
    args = arguments(DistillationConfig, folder, strategy, hard_weight=0.5, **options)
    student = language_backbone(0)
    student.model.config.tie_word_embeddings = True
    student.model.tie_weights()
    return DistillationTrainer(
        student, language_backbone(1), [SoftTargets(2.0, shift=True)], args,
        train_dataset=language_rows(), eval_dataset=language_rows(), data_collator=padded,
    )  # fmt: skip


CASES: dict[str, Callable[[Path, str], Any]] = {
    "stock": stock,
    "logits": lambda folder, how: distillation(folder, how, [SoftTargets(2.0)]),
    "logits, accumulated": lambda folder, how: distillation(folder, how, [SoftTargets(2.0)], **MEANWHILE),
    "cache": lambda folder, how: distillation(folder, how, [SoftTargets(2.0)], teacher_cache="always"),
    "projector": lambda folder, how: distillation(folder, how, [SoftTargets(2.0), Hint("last")], "image"),
    "teacher in parts": lambda folder, how: distillation(
        folder,
        how,
        [SoftTargets(2.0), Hint("last")],
        teacher_sharded=how == "fsdp",
        eval_strategy="steps",
        eval_steps=2,
    ),
    "layers": lambda folder, how: distillation(
        folder, how, [SoftTargets(2.0), SimilarityPreserving("uniform"), MiniLMRelation(relation_heads=2)]
    ),
    "memory": lambda folder, how: distillation(folder, how, [SoftTargets(2.0), CRD(size=ROWS, negatives=8, width=4)]),
    "weights": adaptation,
    "weights, accumulated": lambda folder, how: adaptation(folder, how, **MEANWHILE),
    "weights, never resharded": lambda folder, how: adaptation(folder, how, fsdp=OPEN),
    "rates by depth": lambda folder, how: adaptation(folder, how, layer_decay=0.5, head_learning_rate=2e-2),
    "checkpointing": lambda folder, how: distillation(
        folder, how, [SoftTargets(2.0), Hint("last")], **{CHECKPOINTING: True}
    ),
    "bfloat16": lambda folder, how: distillation(folder, how, [SoftTargets(2.0), Hint("last")], bf16=True),
    "adapters": adapted,
    "language": language,
    "language in chunks": lambda folder, how: language(folder, how, chunk_tokens=8),
}
ALONE: dict[str, Callable[[Path, str], Any]] = {  # what DDP does not run: the model's output is not in the loss
    "hint": lambda folder, how: distillation(folder, how, [Hint("uniform")], hard_weight=0.0),
    "relations": lambda folder, how: distillation(
        folder, how, [MiniLMRelation(relation_heads=2)], hard_weight=0.0, fsdp=OPEN
    ),
}


def trained(trainer: Any, strategy: str = "") -> dict[str, Any]:
    """The weights and the log after a run."""
    trainer.train()
    learner = getattr(trainer, "learner", None) or trainer.model
    assert any(map(is_sharded, learner.parameters())) == (strategy == "fsdp")
    if getattr(trainer.args, "teacher_sharded", False):
        assert all(map(is_sharded, trainer.teacher.backbone.model.parameters()))
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    scores = [[entry[name] for name in SCORES] for entry in trainer.state.log_history if "eval_kl" in entry]
    return {"weights": copied(gathered(learner.state_dict())), "log": log, "scores": scores}


def copied(state: Any) -> Any:
    return {name: value.clone() if torch.is_tensor(value) else copied(value) for name, value in state.items()}


def long_run(folder: Path, strategy: str, fsdp: Any, stop_at: int | None = None, resume: bool = False) -> Any:
    torch.manual_seed(3)
    terms = [SoftTargets(2.0), Hint("last"), CRD(size=ROWS, negatives=8, width=4), L2SP(weight=0.1)]
    trainer = distillation(
        folder, strategy, terms, fsdp=fsdp, ema_decay=0.8, save_strategy="steps", save_steps=2, eval_strategy="steps",
        eval_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_kl", greater_is_better=False,
    )  # fmt: skip
    if stop_at is not None:
        trainer.add_callback(StopAt(stop_at))
    torch.manual_seed(100 + resume)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def life(folder: Path, strategy: str, fsdp: Any = None) -> dict[str, Any]:
    """Averaged, evaluated, saved, interrupted, resumed, its best checkpoint loaded, and trained once more."""
    whole = long_run(folder / "whole", strategy, fsdp)
    long_run(folder / "cut", strategy, fsdp, stop_at=STOP_AT)
    resumed = long_run(folder / "cut", strategy, fsdp, resume=True)
    result = {
        "whole": copied(gathered(whole.learner.state_dict())),
        "resumed": copied(gathered(resumed.learner.state_dict())),
        "evaluations": [[e[name] for name in SCORES] for e in whole.state.log_history if "eval_kl" in e],
        "best": Path(whole.state.best_model_checkpoint).name,
        "unlabelled": torch.from_numpy(whole.predict(whole.eval_dataset.remove_columns("labels")).predictions),
        "labelled": whole.student_logits(whole.eval_dataset)[0],
        "model is the user's": whole.model is whole.student.model,
    }
    whole.save_model(str(folder / "saved"))
    whole.args.max_steps = 2
    result["again"] = trained(whole, strategy)["weights"]
    return result


def adapter_life(folder: Path, strategy: str) -> dict[str, Any]:
    """Adapters, interrupted, resumed and saved."""
    results = []
    for name, stop, resume in (("whole", None, False), ("cut", STOP_AT, False), ("cut", None, True)):
        trainer = adapted(folder / name, strategy, save_strategy="steps", save_steps=STOP_AT)
        if stop is not None:
            trainer.add_callback(StopAt(stop))
        torch.manual_seed(100 + resume)
        trainer.train(resume_from_checkpoint=resume)
        results.append(copied(gathered(trainer.learner.state_dict())))
    trainer.save_model(str(folder / "saved"))
    return {"whole": results[0], "resumed": results[2]}


class Norm(Objective):
    """Reads the weights as one would without FSDP."""

    def forward(self, step: Any) -> torch.Tensor:
        return torch.stack([p.square().sum() for p in step.model.parameters()]).sum()


def refusals(folder: Path) -> dict[str, str]:
    """What is raised where a run is not known to work, on every process alike."""

    def message(run: Callable[[], Any]) -> str:
        try:
            run()
        except Exception as error:  # whichever
            return f"{type(error).__name__}: {error}"
        return "nothing"

    def base_as_teacher() -> None:
        student = backbone(LoRA(r=4).apply(tiny_model("text")), "text")
        args = arguments(DistillationConfig, folder, "fsdp")
        DistillationTrainer(student, student, [SoftTargets(2.0)], args, train_dataset=labelled("text"))

    def two_in_parts() -> None:
        args = arguments(DistillationConfig, folder, "fsdp", teacher_sharded=True)
        networks = [backbone(tiny_model("text"), "text") for _ in range(3)]
        DistillationTrainer(networks[0], networks[1:], [SoftTargets(2.0)], args, train_dataset=labelled("text"))

    def cached_in_parts() -> None:
        options = {"teacher_sharded": True, "teacher_cache": "always"}
        distillation(folder, "fsdp", [SoftTargets(2.0)], **options).train()

    def trainer(model: Any, terms: list) -> TransferTrainer:
        args = arguments(TransferConfig, folder, "fsdp")
        return TransferTrainer(model=model, args=args, objectives=terms, train_dataset=labelled("text"))

    done = adaptation(folder, "fsdp")
    done.train()
    return {
        "evaluation first": message(lambda: distillation(folder, "fsdp", [SoftTargets(2.0)]).evaluate()),
        "base as teacher": message(base_as_teacher),
        "two teachers in parts": message(two_in_parts),
        "cache of a teacher in parts": message(cached_in_parts),
        "cut already": message(lambda: trainer(done.model, [CrossEntropy()])),
        "weights as they are": message(lambda: trainer(tiny_model("text"), [CrossEntropy(), Norm()]).train()),
    }


def run(name: str, make: Callable[[Path, str], Any], out: Path, strategy: str) -> dict[str, Any]:
    torch.manual_seed(3)
    return trained(make(out / strategy / name.replace(" ", "-"), strategy), strategy)


def lives(out: Path, strategy: str) -> dict[str, Any]:
    results = {}
    results["life"] = life(out / strategy / "life", strategy)
    results["adapter life"] = adapter_life(out / strategy / "adapters", strategy)
    if strategy == "fsdp":
        parts = {"state_dict_type": "SHARDED_STATE_DICT"}
        results["life in parts"] = life(out / strategy / "life-in-parts", strategy, parts)
        results["refusals"] = refusals(out / strategy / "refused")
    return results


def main() -> None:
    torch.set_num_threads(1)
    folder, strategy, *names = sys.argv[1:]
    cases = {**CASES, **ALONE} if strategy == "fsdp" else CASES
    results: dict[str, Any] = {name: run(name, cases[name], Path(folder), strategy) for name in names or cases}
    if not names:
        results |= lives(Path(folder), strategy)
    torch.save(results, Path(folder) / f"{strategy}-{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
