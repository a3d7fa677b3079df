"""Distillation on two processes: one cache, one memory bank, exact resume, and every row scored once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distillation.language_rows import WORDS, language_backbone, language_rows, language_trainer
from distillation.processes import hinted, network

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SCRIPT = Path(__file__).with_name("processes.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    root = SCRIPT.parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    done = subprocess.run(
        [*TORCHRUN, str(SCRIPT), str(folder)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_both_hold_the_same_memory_and_weights(ranks: Any) -> None:
    for name, value in ranks[0]["whole"].items():
        torch.testing.assert_close(ranks[1]["whole"][name], value, rtol=0, atol=0, msg=name)
    memory = next(value for name, value in ranks[0]["whole"].items() if name.endswith("memory"))  # (2, 23, 4)
    torch.testing.assert_close(memory.norm(dim=2), torch.ones(2, 23))  # every row was seen by someone, and shared


def test_interrupted_and_resumed_is_uninterrupted(ranks: Any) -> None:
    for rank in ranks:
        for name, value in rank["whole"].items():
            torch.testing.assert_close(rank["resumed"][name], value, rtol=0, atol=0, msg=name)


def test_the_cache_holds_every_row_and_evaluation_scores_each_once(ranks: Any) -> None:
    for rank in ranks:
        assert rank["rows"] == list(range(23))
        correct = rank["metrics"]["eval_student_accuracy"] * 23
        assert correct == pytest.approx(round(correct))
    assert ranks[0]["metrics"]["eval_kl"] == ranks[1]["metrics"]["eval_kl"]


def test_a_head_that_no_term_reads_waits_for_no_gradient(ranks: Any, tmp_path: Path) -> None:
    """The same training as on one process, and the head is as it was."""
    alone = hinted(tmp_path)
    for rank in ranks:
        for name, value in alone.items():
            torch.testing.assert_close(rank["hinted"][name], value, rtol=0, atol=1e-6, msg=name)
    assert torch.equal(alone["model.classifier.weight"], network(0).model.classifier.weight)


def test_neither_teacher_nor_terms_are_in_the_saved_model(ranks: Any) -> None:
    for rank in ranks:
        assert rank["model is the user's"]
    weights = [name for name in ranks[0]["files"] if name.endswith((".safetensors", ".bin"))]
    assert weights == ["model.safetensors", "training_args.bin"]


def test_a_cache_of_texts_by_length_is_what_the_teacher_says(ranks: Any) -> None:
    teacher = language_backbone(1, WORDS - 3).model
    assert ranks[0]["written"]["largest"] == ranks[1]["written"]["largest"] is not None
    for row, said in zip(language_rows(), ranks[1]["written"]["said"], strict=True):
        with torch.inference_mode():
            direct = teacher(input_ids=torch.tensor([row["input_ids"]])).logits
        torch.testing.assert_close(said.float(), direct, rtol=1e-3, atol=1e-3)  # kept in half precision


def test_tokens_in_stretches_are_scored_as_on_one_process(ranks: Any, tmp_path: Path) -> None:
    alone = language_trainer(tmp_path, per_device_eval_batch_size=4).evaluate()
    for rank in ranks:
        for name in ("eval_perplexity", "eval_accuracy", "eval_kl", "eval_agreement", "eval_teacher_nll"):
            assert rank["language"][name] == pytest.approx(alone[name], rel=1e-5)
