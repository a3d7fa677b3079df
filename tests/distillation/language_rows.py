"""A language model, its teacher and texts of unequal length, for tests on one process and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset

from hf_transfer import Backbone, DistillationConfig, DistillationTrainer
from hf_transfer.evaluation import compute_metrics_for
from hf_transfer.objectives import SoftTargets

WORDS = 23


def language_backbone(seed: int, words: int = WORDS) -> Backbone:
    """A random Llama whose logits are far from uniform."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=words, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    return Backbone(transformers.LlamaForCausalLM(config), None, "text", "causal-lm", "tiny", None, None)


def language_rows(rows: int = 11) -> Dataset:
    """Texts of 5 to 17 tokens, the first two of each without a label; the last batches are shorter than the first."""
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, WORDS - 3, (17 - row % 13,), generator=draw).tolist() for row in range(rows)]
    return Dataset.from_dict(
        {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids],
         "labels": [[-100, -100, *row[2:]] for row in ids], "example_id": list(range(rows))}
    )  # fmt: skip


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    batch = {
        name: torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])
        for name, value in fill.items()
        if name in rows[0]
    }
    return {**batch, "example_id": torch.tensor([row["example_id"] for row in rows])}


def language_trainer(folder: Path, **options: Any) -> DistillationTrainer:
    """A trainer of a student of WORDS words whose teacher knows three fewer."""
    args = DistillationConfig(
        output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, batch_eval_metrics=True,
        save_strategy="no", **{"hard_weight": 0.5, **options},
    )  # fmt: skip
    return DistillationTrainer(
        language_backbone(0), language_backbone(1, WORDS - 3), [SoftTargets(2.0, shift=True)], args,
        train_dataset=language_rows(), eval_dataset=language_rows(), data_collator=padded,
        compute_metrics=compute_metrics_for("causal-lm", None),
    )  # fmt: skip
