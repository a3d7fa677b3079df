"""Interrupt and resume on two processes = uninterrupted, bit for bit on a CPU (DESIGN, invariant 2)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("resumed_run.py")
SAMPLINGS = ("random", "balanced_domains")
ROWS, STEPS_AN_EPOCH, STOP_AT, STEPS = 24, 6, 9, 18


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each process's (whole, resumed) run by sampling, from one launch by torchrun and gloo."""
    folder = tmp_path_factory.mktemp("resume")
    path = os.pathsep.join([str(SCRIPT.parents[2]), str(SCRIPT.parent)])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT),
         str(folder), *SAMPLINGS],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_resumed_processes_equal_the_uninterrupted_ones(results: Any, sampling: str) -> None:
    for rank in range(2):
        whole, resumed = results[rank][sampling]
        assert resumed["losses"] == whole["losses"]
        assert list(resumed["read"]) == list(range(STOP_AT + 1, STEPS + 1))
        assert resumed["read"] == {step: ids for step, ids in whole["read"].items() if step > STOP_AT}
        assert resumed["state"].keys() == whole["state"].keys()
        for name, value in whole["state"].items():
            if not torch.is_tensor(value):
                continue
            assert torch.equal(resumed["state"][name], value), (rank, name)
            assert torch.equal(results[0][sampling][0]["state"][name], value), f"the processes differ in {name}"


def test_processes_share_each_epochs_rows_in_a_new_order(results: Any) -> None:
    reads = [result["random"][0]["read"] for result in results]
    epochs = []
    for epoch in range(3):
        steps = range(epoch * STEPS_AN_EPOCH + 1, (epoch + 1) * STEPS_AN_EPOCH + 1)
        epochs.append([row for read in reads for step in steps for row in read[step]])
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
