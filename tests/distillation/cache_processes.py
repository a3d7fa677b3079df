"""Two processes write one cache of augmented images. Run by test_cache.py.

torchrun --nproc_per_node 2 tests/distillation/cache_processes.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cache_rows import ImageTeacher, image_batches, prepared

from hf_transfer.distillation.cache import CacheKey, TeacherCache, write_cache
from hf_transfer.distillation.signature import data_signature, transform_signature
from hf_transfer.errors import TransferError

ROWS = 9


def refusal(work: Any) -> TransferError:
    try:
        work()
    except TransferError as error:
        return error
    raise AssertionError("nothing was refused")


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    rows, live = prepared(rows=ROWS), ImageTeacher()
    key = CacheKey("teacher", data_signature(rows), transform_signature(rows), views=2)
    own = [i % ROWS for i in range(rank, ROWS + 1, 2)]  # the last batch is padded by row 0

    def failing(batch: Any) -> Any:
        if rank == 1:
            raise TransferError("no answer from process 1")
        return live(batch)

    def write(teacher: Any, its_key: CacheKey = key) -> TeacherCache:
        return write_cache(
            out / "cache", its_key, teacher, lambda view: image_batches(rows, view, own), rank=rank, world_size=2,
            wait=dist.barrier,
        )  # fmt: skip

    report: dict[str, Any] = {"failed": str(refusal(lambda: write(failing)))}
    report["state after"] = type(refusal(lambda: TeacherCache.open(out / "cache", key))).__name__
    dist.barrier()
    cache, differences = write(live), []
    for view in range(2):
        for batch in image_batches(rows, view):
            found = cache.signal(batch["example_id"], view).logits
            differences.append(float((found.float() - live(batch).logits).abs().max()))
    report |= {"largest difference": max(differences), "rows": len(cache.example_ids)}
    before = live.batches
    write(live)
    report["asked again"] = live.batches - before
    report["other teacher"] = str(refusal(lambda: write(live, CacheKey("other", key.data, key.transform, 2))))
    (out / f"{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
