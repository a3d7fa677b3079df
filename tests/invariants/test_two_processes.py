"""On two processes: what is saved is ordinary and loads with the same logits, the model stays the user's, and without
terms the stock Trainer's weights come out (DESIGN, invariants 3 to 5). A NaN on one process stops both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification
from two_processes import SAVED, SPOILT, STEPS, STOPPED

from hf_transfer.checkpoints import last_complete_checkpoint
from hf_transfer.trainer import STATE_FILE

SCRIPT = Path(__file__).with_name("two_processes.py")
MODEL = {"config.json", "model.safetensors", "training_args.bin"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "model_config/config.json", "training_args.bin"}
STATE = {"optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"}


def launch(folder: Path, what: str) -> list[dict[str, Any]]:
    """Each process's results, from one launch by torchrun and gloo. A process that waits for ever is killed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, str(SCRIPT), str(folder), what], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def saved(home: Path) -> list[dict[str, Any]]:
    return launch(home, "save")


def files(folder: Path) -> set[str]:
    paths = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {str(path) for path in paths if not path.parts[0].startswith("checkpoint-")}


def assert_equal(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("case", SAVED)
def test_the_model_is_the_users_on_every_process(saved: Any, case: str) -> None:
    for result in saved:
        assert result[case]["same model"] and result[case]["steps"] == STEPS
    assert_equal(saved[1][case]["weights"], saved[0][case]["weights"])  # DDP kept them together


@pytest.mark.parametrize("case", SAVED)
def test_the_folder_is_an_ordinary_checkpoint_with_the_same_logits(saved: Any, home: Path, case: str) -> None:
    folder, result = home / case / "run", saved[0][case]
    model_files = ADAPTER if "LoRA" in case else MODEL
    own = {STATE_FILE} if "terms" in case else set()
    assert files(folder) == model_files
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert files(folder / "checkpoint-6") == model_files | STATE | own
    auto_class = AutoModelForImageClassification if case.startswith("image") else AutoModelForSequenceClassification
    for place in (folder, folder / "checkpoint-6"):
        options: dict[str, Any] = {}
        if "LoRA" in case:
            options = {"config": AutoConfig.from_pretrained(place / "model_config"), "ignore_mismatched_sizes": True}
        loaded = auto_class.from_pretrained(place, **options).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(**result["inputs"]).logits, result["logits"])


def test_without_terms_the_weights_are_the_stock_trainers(saved: Any) -> None:
    for result in saved:
        assert_equal(result["TransferTrainer"]["weights"], result["Trainer"]["weights"])
        assert result["TransferTrainer"]["losses"] == result["Trainer"]["losses"]
        assert len(result["Trainer"]["losses"]) == STEPS // 2


@pytest.fixture(scope="module")
def stops(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("stops")
    return folder, launch(folder, "stop")


@pytest.mark.parametrize("case", STOPPED)
def test_a_loss_that_is_not_finite_on_one_process_stops_both(stops: Any, case: str) -> None:
    home, (first, second) = stops[0] / case, (results[case] for results in stops[1])
    accumulation = STOPPED[case][1]
    step = SPOILT // (4 * accumulation)  # 4 rows a micro-batch over both processes
    assert first["step"] == second["step"] == step
    assert "nan at step" in second["said"] and f"[{SPOILT - 1}, {SPOILT}]" in second["said"]
    assert first["said"].startswith(f"The training loss of another process is not finite at step {step}")
    kept = home / f"checkpoint-{step}"
    assert last_complete_checkpoint(str(home)) == str(kept) and str(kept) in second["said"]
    assert not (home / f"checkpoint-{step + 1}").exists()
    good = AutoModelForImageClassification.from_pretrained(kept).state_dict()
    assert all(value.isfinite().all() for value in good.values())
    for result in (first, second):  # neither took the step
        assert_equal(result["weights"], good)
