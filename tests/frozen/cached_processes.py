"""Trains from a prefix cache and without one, on two processes. Run by test_cached_training.py.

torchrun --nproc_per_node 2 tests/frozen/cached_processes.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from hf_transfer._torchvision import make_torchvision_importable

make_torchvision_importable()

import tiny_runs  # noqa: E402

import hf_transfer.trainer as trainer_module  # noqa: E402
from hf_transfer import finetune  # noqa: E402

IDS = torch.randint(4, 18, (4, 9), generator=torch.Generator().manual_seed(3))


def main() -> None:
    torch.set_num_threads(1)
    out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    if rank == 0:
        tiny_runs.text_backbone(out / "start")
    torch.distributed.barrier()
    trainers: list[str] = []
    train = trainer_module.TransferTrainer.train

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        trainers.append(type(self).__name__)
        return train(self, *args, **kwargs)

    trainer_module.TransferTrainer.train = noted  # type: ignore[method-assign]
    own = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 0.03, "seed": 5}
    options = {**tiny_runs.QUICK, **own, "tuning": "partial", "train_blocks": 1, "cache_dir": str(out / "caches")}
    results = [
        finetune(out / "start", tiny_runs.sentences(21), output_dir=out / cache, cache=cache, **options)
        for cache in ("never", "always")
    ]
    logits = [tiny_runs.logits(result.model, input_ids=IDS) for result in results]
    folder = next(path for path in (out / "caches").iterdir())
    torch.save(
        {
            "trainers": trainers,
            "shards": len(list((folder / "shards").glob("*.journal"))),
            "logits": logits[1],
            "moved": float((logits[1] - logits[1].mean(0)).abs().max()),
            "difference": float((logits[0] - logits[1]).abs().max()),
            "metrics": [result.metrics["validation"] for result in results],
        },
        out / f"{rank}.pt",
    )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
