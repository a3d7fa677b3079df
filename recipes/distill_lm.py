"""Distil a causal language model into fewer of its layers, token by token, with the logits of a few tokens at a time.

    accelerate launch recipes/distill_lm.py
    accelerate launch recipes/distill_lm.py --teacher HuggingFaceTB/SmolLM2-360M --model HuggingFaceTB/SmolLM2-135M
    accelerate launch recipes/distill_lm.py --teacher_cache always --teacher_cache_top_k 64
    python recipes/distill_lm.py --teacher path/to/model --model carve:4 --dataset texts.jsonl --task causal-lm

The data has a column of texts, or of prompts and completions, whose prompts are not trained on. Per-token soft targets
need teacher and student to share a tokenizer. To train on what the teacher writes (sequence-level distillation, Kim &
Rush 2016, arXiv:1606.07947), make the completions with hf_transfer.distillation.generation.generate_targets, save them
by rows.to_json("completions.jsonl") and give that file as --dataset. Learning from the student's own text is TRL's
trade (GKDTrainer): docs/distillation.md.
"""

from hf_transfer import DistillationConfig, distill
from hf_transfer.cli import results_table
from hf_transfer.config import parse_given
from hf_transfer.console import is_first_process, run
from hf_transfer.distill import DistillationRun

DEFAULTS = {
    "teacher": "HuggingFaceTB/SmolLM2-135M",
    "model": "carve:15",
    "dataset": "roneneldan/TinyStories",
    "task": "causal-lm",
    "max_length": 256,
    "max_train_samples": 20_000,
    "max_eval_samples": 500,
    "num_train_epochs": 1,
    "learning_rate": 3e-4,
    "chunk_tokens": 1024,
    "objectives": ["SoftTargets(temperature=1.0, shift=True, weight=0.9)"],
    "hard_weight": 0.1,
}


def main() -> None:
    options, training = parse_given(
        defaults=DEFAULTS, description=__doc__, run_config=DistillationRun, training_config=DistillationConfig
    )
    result = distill(**vars(options), **training)
    if is_first_process():
        print(f"{result.plan}\n\n{results_table(result.folder)}\n\nSaved to {result.folder}")


if __name__ == "__main__":
    run(main)
