"""Distils with a cache and a memory bank, cut and resumed. Run by test_processes.py on one process and on two.

torchrun --nproc_per_node 2 tests/distillation/processes.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from hf_transfer._torchvision import make_torchvision_importable

make_torchvision_importable()

from datasets import Dataset  # noqa: E402
from distillation.language_rows import language_trainer  # noqa: E402
from invariants.test_resume import StopAt, tiny_bert  # noqa: E402

from hf_transfer import Backbone, DistillationConfig, DistillationTrainer  # noqa: E402
from hf_transfer.objectives import CRD, Hint, SoftTargets  # noqa: E402

ROWS, STEPS_AN_EPOCH, STOP_AT = 23, 6, 9  # 23 rows: the last batch is filled up


def rows() -> Dataset:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (ROWS, 8), generator=generator)
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(),
         "labels": [i % 3 for i in range(ROWS)], "example_id": list(range(ROWS))}
    )  # fmt: skip


def network(seed: int) -> Backbone:
    return Backbone(tiny_bert(seed), None, "text", "text-classification", "tiny", ["a", "b", "c"], None)


def run(folder: Path, stop_at: int | None = None, resume: bool = False) -> DistillationTrainer:
    student = network(0)
    torch.manual_seed(2)
    args = DistillationConfig(
        output_dir=str(folder), per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", 1)),
        num_train_epochs=3, learning_rate=1e-2, use_cpu=True, save_strategy="steps", save_steps=STOP_AT,
        report_to="none", disable_tqdm=True, logging_steps=1, teacher_cache="always",
        teacher_cache_dir=str(folder.parent / "caches"), batch_eval_metrics=True,
    )  # fmt: skip
    trainer = DistillationTrainer(
        student, network(1), [SoftTargets(2.0), CRD(size=ROWS, negatives=8, width=4)], args, train_dataset=rows(),
        eval_dataset=rows(), callbacks=[StopAt(stop_at)] if stop_at else None,
    )  # fmt: skip
    torch.manual_seed(100 + resume)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def hinted(folder: Path) -> dict[str, torch.Tensor]:
    """Weights after training in which no term reads the logits."""
    torch.manual_seed(2)
    args = DistillationConfig(
        output_dir=str(folder), per_device_train_batch_size=4 // int(os.environ.get("WORLD_SIZE", 1)), max_steps=5,
        learning_rate=1e-2, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True, hard_weight=0.0,
        adam_epsilon=1e-3,
    )  # fmt: skip
    trainer = DistillationTrainer(network(0), network(1), [Hint(layers={0.5: 0.5})], args, train_dataset=rows())
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # processes draw their own
    trainer.train()
    return {name: value.detach().clone() for name, value in trainer.learner.state_dict().items()}


def written(out: Path) -> dict[str, Any]:
    """A cache of texts of unequal length: whether its batches were chosen, and what it says of the tokens of a row."""
    trainer = language_trainer(out, per_device_eval_batch_size=2, teacher_cache_dir=str(out / "texts"))
    chosen, key = trainer._cache_batches(), trainer._cache_key(1)
    cache = trainer._write_cache(trainer._cache_folder(key), key, chosen)
    masks = [torch.tensor([mask]) for mask in trainer.train_dataset["attention_mask"]]
    said = [cache.signal(torch.tensor([row]), 0, mask).logits for row, mask in enumerate(masks)]
    return {"largest": chosen.largest, "said": said}


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    whole = run(out / "whole")
    run(out / "cut", stop_at=STOP_AT)
    resumed = run(out / "cut", resume=True)
    result: dict[str, Any] = {
        "whole": whole.learner.state_dict(),
        "resumed": resumed.learner.state_dict(),
        "metrics": whole.evaluate(),
        "rows": sorted(whole.training_teacher.cache.example_ids.tolist()),
        "files": sorted(path.name for path in (out / "whole" / "checkpoint-18").iterdir()),
        "model is the user's": whole.model is whole.student.model,
        "written": written(out),
        "hinted": hinted(out / "hinted"),
        "language": language_trainer(out, chunk_tokens=8, per_device_eval_batch_size=4).evaluate(),
    }
    torch.save(result, out / f"{os.environ.get('RANK', 0)}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
