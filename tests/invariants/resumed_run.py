"""Runs a training whole, cut in its second epoch, and resumed. Launched on two processes by test_resume_processes.py.

torchrun --nproc_per_node 2 tests/invariants/resumed_run.py FOLDER random balanced_domains
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from hf_transfer._torchvision import make_torchvision_importable

make_torchvision_importable()

from test_resume import StopAt, rows, tiny_bert  # noqa: E402

from hf_transfer import TransferConfig, TransferTrainer  # noqa: E402
from hf_transfer.objectives import DANN, L2SP, CrossEntropy  # noqa: E402

STEPS_AN_EPOCH, STOP_AT = 6, 9  # 24 rows, 2 a process and step


class Reader(TransferTrainer):
    """Keeps the ids of the rows that this process learns from, a step a list."""

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self.read[self.state.global_step + 1] = inputs["example_id"].tolist()
        return super().training_step(model, inputs, num_items_in_batch)

    read: dict[int, list[int]]


def run(folder: Path, sampling: str, stop_at: int | None = None, resume: bool = False) -> dict[str, Any]:
    model = tiny_bert()
    torch.manual_seed(2)
    args = TransferConfig(
        output_dir=str(folder), per_device_train_batch_size=2, num_train_epochs=3, learning_rate=1e-2, use_cpu=True,
        save_strategy="steps", save_steps=STOP_AT, report_to="none", disable_tqdm=True, logging_steps=1,
        ema_decay=0.9, sampling=sampling,
    )  # fmt: skip
    trainer = Reader(
        model=model, args=args, train_dataset=rows(),
        objectives=[CrossEntropy(), DANN(weight=0.5), L2SP(weight=0.1)],
        callbacks=[StopAt(stop_at)] if stop_at else None,
    )  # fmt: skip
    trainer.read = {}
    torch.manual_seed(100 + resume)  # a new process is in another random state; only the checkpoint may matter
    trainer.train(resume_from_checkpoint=resume)
    losses = {e["step"]: (e["loss"], e["dann"]) for e in trainer.state.log_history if "loss" in e}
    return {"state": trainer.learner.state_dict(), "losses": losses, "read": trainer.read}


def main() -> None:
    torch.set_num_threads(1)
    out, results = Path(sys.argv[1]), {}
    for sampling in sys.argv[2:]:
        whole = run(out / sampling / "whole", sampling)
        run(out / sampling / "cut", sampling, stop_at=STOP_AT)
        results[sampling] = whole, run(out / sampling / "cut", sampling, resume=True)
    torch.save(results, out / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
