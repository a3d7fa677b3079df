"""Same samples, same seed: the same gradient, however the batch is cut (DESIGN, invariant 1)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("training_step.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Any]:
    """Gradients by (cut, modality, terms): one process, and two by torchrun and gloo."""
    folder = tmp_path_factory.mktemp("gradients")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    found = {}
    for launch, cuts in (([sys.executable], ("16x1", "4x4")), (torchrun, ("8x1", "4x2"))):
        out = folder / f"{cuts[0]}.pt"
        done = subprocess.run(
            [*launch, str(SCRIPT), str(out), *cuts], capture_output=True, text=True, env=environment, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found |= torch.load(out, weights_only=True)
    return found


@pytest.mark.parametrize("terms", ["none", "dann", "distil"])
@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("cut", ["4x4", "8x1", "4x2"], ids=["accumulation 4", "2 processes", "2 processes x 2"])
def test_gradient_does_not_depend_on_the_cut_of_the_batch(results: Any, cut: str, modality: str, terms: str) -> None:
    whole, result = results["16x1", modality, terms], results[cut, modality, terms]
    largest = max(float(g.abs().max()) for g in whole["gradient"].values())
    assert largest > 1e-3
    for name, expected in whole["gradient"].items():
        torch.testing.assert_close(result["gradient"][name], expected, rtol=1e-5, atol=1e-6 * largest)
    for key in {"loss", "cross_entropy", "dann", "l2sp", "soft_targets", "hint"} & set(whole["log"]):
        assert result["log"][key] == pytest.approx(whole["log"][key], rel=1e-5, abs=1e-7), key
