"""Distil an image classifier into a small network from scratch, and tell how much of the teacher's gain it recovers.

    accelerate launch recipes/finetune_cifar.py --output_dir runs/cifar-teacher              # the teacher
    accelerate launch recipes/distill_cifar.py --teacher runs/cifar-teacher
    python recipes/distill_cifar.py --teacher runs/cifar-teacher --model resnet10t --objectives "DKD(beta=2.0)" Hint
    python recipes/finetune_cifar.py --model ../shared/weights/mobilenetv2_100.coral_tf2_in1k \
        --dataset ../shared/data/cifar10 --image_size 96 --max_train_samples 10000 --output_dir runs/cifar-teacher
    python recipes/distill_cifar.py --teacher runs/cifar-teacher --dataset ../shared/data/cifar10 --image_size 96 \
        --max_train_samples 10000 --objectives "SoftTargets(temperature=4.0, weight=0.9)"

The student is any network's name (--model, --pretrained false: from scratch), or made from the teacher: carve:3,
born-again. The terms are written as in Python (docs/terms.md lists them); the loss against the labels joins them with
--hard_weight. With --baseline RUN, the folder of the same student trained without a teacher (finetune_cifar.py), the
results say which share of the teacher's gain was recovered. Nothing is selected on the test split.
"""

from hf_transfer import DistillationConfig, distill
from hf_transfer.cli import results_table
from hf_transfer.config import parse_given
from hf_transfer.console import is_first_process, run
from hf_transfer.distill import DistillationRun

DEFAULTS = {
    "model": "lcnet_050",
    "pretrained": False,
    "dataset": "uoft-cs/cifar10",
    "num_train_epochs": 10,
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 64,
    "augment": "light",  # random crop and horizontal flip
    "objectives": ["SoftTargets(temperature=4.0, weight=0.9)"],
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
