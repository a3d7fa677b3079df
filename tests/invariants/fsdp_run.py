"""Trains tiny models on two processes, under DDP or FSDP2, and writes what came of it. Run by test_fsdp.py.

torchrun --nproc_per_node 2 tests/invariants/fsdp_run.py FOLDER fsdp
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
from transformers import Trainer, TrainingArguments  # noqa: E402

from distillation.language_rows import language_backbone, language_rows, padded  # noqa: E402
from hf_transfer import Backbone, DistillationConfig, DistillationTrainer, TransferConfig, TransferTrainer  # noqa: E402
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
from hf_transfer.shards import is_sharded, whole  # noqa: E402
from invariants.test_resume import StopAt  # noqa: E402
from invariants.training_step import backbone, rows, tiny_model  # noqa: E402

STEPS = 6


def arguments(kind: type[TrainingArguments], folder: Path, strategy: str, **options: Any) -> Any:
    """Training arguments; accelerate makes FSDP of several GPUs only, so it is told that these processes have some."""
    given = {
        "output_dir": str(folder), "per_device_train_batch_size": 8 // int(os.environ.get("WORLD_SIZE", 1)), "max_steps": STEPS, "learning_rate": 1e-2,
        "max_grad_norm": 0.5, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
        "save_strategy": "no", "adam_epsilon": 1e-3, "ddp_find_unused_parameters": True, **options,
    }  # fmt: skip
    if strategy == "fsdp":
        given |= {"fsdp": True, "fsdp_config": {"version": 2, **options.pop("fsdp_config", {})}}
    args = kind(**given)
    if strategy == "fsdp":
        assert args.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


def stock(folder: Path, strategy: str) -> Trainer:
    """The stock Trainer: shows that the two strategies can be compared at all."""
    blocks = {"fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"]}} if strategy == "fsdp" else {}
    args = arguments(TrainingArguments, folder, strategy, **blocks)
    data = rows("text").remove_columns(["labels", "domain", "example_id"]).add_column("labels", [i % 3 for i in range(16)])
    return Trainer(model=tiny_model("text"), args=args, train_dataset=data)


def labelled(modality: str) -> Any:
    return rows(modality).remove_columns(["labels", "domain"]).add_column("labels", [i % 3 for i in range(16)])


def distillation(folder: Path, strategy: str, terms: Callable[[], list], modality: str = "text", **options: Any) -> Any:
    torch.manual_seed(3)
    options = {"hard_weight": 0.1, "teacher_cache": "never", "teacher_cache_dir": str(folder / "caches"), **options}
    args = arguments(DistillationConfig, folder, strategy, **options)
    teacher: Any = tiny_model(modality, width=24)
    with torch.no_grad():
        teacher.classifier.weight.mul_(50)  # else it is as undecided as the student
    return DistillationTrainer(
        backbone(tiny_model(modality), modality), backbone(teacher, modality), terms(), args,
        train_dataset=labelled(modality), eval_dataset=labelled(modality),
    )  # fmt: skip


def adaptation(folder: Path, strategy: str, **options: Any) -> TransferTrainer:
    torch.manual_seed(3)
    return TransferTrainer(
        model=tiny_model("text"), args=arguments(TransferConfig, folder, strategy, **options), train_dataset=rows("text"),
        objectives=[CrossEntropy(), DANN(weight=0.5), L2SP(weight=0.1), L1(weight=1e-3)],
    )  # fmt: skip


def language(folder: Path, strategy: str, **options: Any) -> DistillationTrainer:
    args = arguments(DistillationConfig, folder, strategy, hard_weight=0.5, **options)
    return DistillationTrainer(
        language_backbone(0), language_backbone(1), [SoftTargets(2.0, shift=True)], args,
        train_dataset=language_rows(), eval_dataset=language_rows(), data_collator=padded,
    )  # fmt: skip


CASES: dict[str, Callable[[Path, str], Any]] = {
    "stock": stock,
    "logits": lambda f, s: distillation(f, s, lambda: [SoftTargets(2.0)]),
    "accumulation": lambda f, s: distillation(f, s, lambda: [SoftTargets(2.0)], gradient_accumulation_steps=2, per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", 1))),
    "cache": lambda f, s: distillation(f, s, lambda: [SoftTargets(2.0)], teacher_cache="always"),
    "projector": lambda f, s: distillation(f, s, lambda: [SoftTargets(2.0), Hint(layers="last")], "image"),
    "layers": lambda f, s: distillation(f, s, lambda: [SoftTargets(2.0), SimilarityPreserving(layers="uniform"), MiniLMRelation(relation_heads=2)]),
    "layers alone": lambda f, s: distillation(f, s, lambda: [MiniLMRelation(relation_heads=2)], hard_weight=0.0),
    "hint alone": lambda f, s: distillation(f, s, lambda: [Hint(layers="uniform")], hard_weight=0.0),
    "memory": lambda f, s: distillation(f, s, lambda: [SoftTargets(2.0), CRD(size=16, negatives=8, width=4)]),
    "weights": adaptation,
    "weights accumulated": lambda f, s: adaptation(f, s, gradient_accumulation_steps=2, per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", 1))),
    "average": lambda f, s: adaptation(f, s, ema_decay=0.8),
    "layers alone open": lambda f, s: distillation(f, s, lambda: [MiniLMRelation(relation_heads=2)], hard_weight=0.0, **({"fsdp_config": {"version": 2, "reshard_after_forward": False}} if s == "fsdp" else {})),
    "checkpointing": lambda f, s: distillation(f, s, lambda: [SoftTargets(2.0), Hint(layers="last")], activation_checkpointing=True),
    "language": language,
    "language chunked": lambda f, s: language(f, s, chunk_tokens=8),
}


def main() -> None:
    torch.set_num_threads(1)
    out, strategy, *names = sys.argv[1:]
    results = {}
    for name in names or CASES:
        trainer = CASES[name](Path(out) / strategy / name.replace(" ", "-"), strategy)
        try:
            trainer.train()
        except Exception as e:
            import traceback
            if os.environ.get("RANK", "0") == "0":
                print("FAILED", name, type(e), str(e)[:500])
                traceback.print_exc()
            continue
        learner = getattr(trainer, "learner", None) or trainer.model
        assert any(map(is_sharded, learner.parameters())) == (strategy == "fsdp")
        results[name] = {
            "weights": whole(learner.state_dict()),
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        }
    torch.save(results, Path(out) / f"{strategy}-{os.environ.get('RANK', 0)}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
