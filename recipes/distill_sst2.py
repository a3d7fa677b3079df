"""Distil a text classifier: into some of its own layers (DistilBERT's way), or into a BiLSTM over its tokenizer.

    accelerate launch recipes/finetune_text.py --dataset stanfordnlp/sst2 --output_dir runs/sst2-teacher  # the teacher
    accelerate launch recipes/distill_sst2.py --teacher runs/sst2-teacher                       # three of its layers
    accelerate launch recipes/distill_sst2.py --teacher runs/sst2-teacher --model bilstm --learning_rate 2e-3 \
        --num_train_epochs 10 --objectives "LogitMSE(weight=0.9)"
    python recipes/finetune_text.py --model ../shared/weights/all-MiniLM-L6-v2 --dataset ../shared/data/sst2 \
        --output_dir runs/sst2-teacher
    python recipes/distill_sst2.py --teacher runs/sst2-teacher --dataset ../shared/data/sst2

carve:3 keeps three blocks of the teacher, evenly spaced (Sanh et al. 2019, arXiv:1910.01108); the BiLSTM learns from
the teacher's logits (Tang et al. 2019, arXiv:1903.12136). With --hard_weight 1 --objectives "SoftTargets(weight=0.0)"
the student learns from the labels alone, for comparison. Nothing is selected on the test split.
"""

from hf_transfer import DistillationConfig, distill
from hf_transfer.cli import results_table
from hf_transfer.config import parse_given
from hf_transfer.console import is_first_process, run
from hf_transfer.distill import DistillationRun

DEFAULTS = {
    "model": "carve:3",
    "dataset": "stanfordnlp/sst2",
    "num_train_epochs": 3,
    "learning_rate": 2e-4,
    "objectives": ["SoftTargets(temperature=2.0, weight=0.9)"],
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
