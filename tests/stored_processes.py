"""Trains with and without an image store, on two processes. Run by test_image_store_runs.py.

torchrun --nproc_per_node 2 tests/stored_processes.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from hf_transfer._torchvision import make_torchvision_importable

make_torchvision_importable()

import tiny_runs  # noqa: E402

from hf_transfer import finetune  # noqa: E402

IMAGES = {"pixel_values": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))}


def main() -> None:
    torch.set_num_threads(1)
    out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    if rank == 0:
        tiny_runs.image_backbone(out / "start", labels=[str(digit) for digit in range(10)])
    torch.distributed.barrier()
    own = {"num_train_epochs": 2, "per_device_train_batch_size": 10, "learning_rate": 0.03, "seed": 5}
    options = {**tiny_runs.QUICK, **own, "augment": "light+noise", "image_store_dir": str(out / "stores")}
    results = [
        finetune(out / "start", tiny_runs.digits(40, 20), output_dir=out / store, image_store=store, **options)
        for store in ("never", "auto")
    ]
    logits = [tiny_runs.logits(result.model, **IMAGES) for result in results]
    stores = len(list((out / "stores").glob("*/manifest.json")))
    torch.save({"logits": logits, "stores": stores, "metrics": [x.metrics for x in results]}, out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
