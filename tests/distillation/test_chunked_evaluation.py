"""Evaluation of language models a stretch of tokens at a time: the same metrics, and never all logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from distillation.language_rows import WORDS, language_rows, language_trainer
from torch import Tensor

ROWS_A_BATCH = 4


class Widest:
    """The most tokens that a last layer made logits for at once."""

    def __init__(self, *models: Any) -> None:
        self.tokens = 0
        for model in models:
            model.get_output_embeddings().register_forward_hook(self)

    def __call__(self, module: Any, args: Any, output: Tensor) -> None:
        self.tokens = max(self.tokens, output.shape[:-1].numel())


def evaluated(folder: Path, **options: Any) -> tuple[dict[str, float], int]:
    trainer = language_trainer(folder, per_device_eval_batch_size=ROWS_A_BATCH, **options)
    widest = Widest(trainer.model, trainer.teacher.backbone.model)
    metrics = trainer.evaluate()
    clocks = ("_per_second", "runtime", "_time")
    return {name: v for name, v in metrics.items() if not name.endswith(clocks)}, widest.tokens


@pytest.mark.parametrize("chunk_tokens", [1, 8, 12, 1000])
def test_metrics_and_loss_are_those_of_all_logits(tmp_path: Path, chunk_tokens: int) -> None:
    expected, whole = evaluated(tmp_path / "whole")
    found, most = evaluated(tmp_path / "chunked", chunk_tokens=chunk_tokens)
    assert {"eval_perplexity", "eval_kl", "eval_agreement", "eval_loss", "eval_teacher_nll"} <= expected.keys()
    assert found == pytest.approx(expected, rel=1e-5)
    if chunk_tokens < whole:
        assert most <= max(chunk_tokens, ROWS_A_BATCH) + ROWS_A_BATCH < whole  # and the token that ends a stretch


def test_without_a_term_of_the_evaluation_loss(tmp_path: Path) -> None:
    expected, _ = evaluated(tmp_path / "whole", hard_weight=0.0)
    found, most = evaluated(tmp_path / "chunked", hard_weight=0.0, chunk_tokens=8)
    assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert most <= 12


def test_predictions_are_all_logits_and_evaluations_after_them_are_not(tmp_path: Path) -> None:
    trainer = language_trainer(tmp_path, per_device_eval_batch_size=ROWS_A_BATCH, chunk_tokens=8)
    rows: Any = trainer.eval_dataset
    before = trainer.evaluate()["eval_kl"]
    predicted = trainer.predict(rows)
    longest = max(map(len, rows["input_ids"]))
    assert predicted.predictions.shape == (len(rows), longest, WORDS)
    widest = Widest(trainer.model, trainer.teacher.backbone.model)
    assert trainer.evaluate()["eval_kl"] == before
    assert widest.tokens <= 8 + ROWS_A_BATCH


def test_training_goes_on_in_chunks_after_an_evaluation(tmp_path: Path) -> None:
    trainer = language_trainer(
        tmp_path, per_device_train_batch_size=4, chunk_tokens=8, max_steps=2, teacher_cache="never"
    )
    trainer.evaluate()
    widest = Widest(trainer.model, trainer.teacher.backbone.model)
    trainer.train()
    assert widest.tokens <= 12


def test_a_cache_of_the_largest_logits_is_that_of_all_logits(tmp_path: Path) -> None:
    caches = []
    for name, options in (("whole", {}), ("chunked", {"chunk_tokens": 8})):
        trainer = language_trainer(
            tmp_path / name, per_device_train_batch_size=4, per_device_eval_batch_size=ROWS_A_BATCH, max_steps=2,
            teacher_cache="always", teacher_cache_dir=str(tmp_path / name), teacher_cache_top_k=3, **options,
        )  # fmt: skip
        widest = Widest(trainer.teacher.backbone.model)
        trainer.train()
        caches.append(trainer.training_teacher.cache)
    assert 0 < widest.tokens <= 8
    rows = language_rows()
    length = max(map(len, rows["input_ids"]))
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in rows["input_ids"]])
    whole, chunked = (cache.signal(torch.arange(len(rows)), 0, mask).top for cache in caches)
    assert torch.equal(chunked.indices, whole.indices)
    torch.testing.assert_close(chunked.values, whole.values, rtol=0, atol=2e-3)  # kept in half precision
    torch.testing.assert_close(chunked.tails[2.0], whole.tails[2.0])


def test_rows_without_labels_are_predicted(tmp_path: Path) -> None:
    trainer = language_trainer(tmp_path, chunk_tokens=8)
    ids = [[3, 4, 5], [6, 7, 8]]
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 3] * 2, "example_id": [0, 1]})
    assert torch.as_tensor(trainer.predict(rows).predictions).shape == (2, 3, WORDS)
