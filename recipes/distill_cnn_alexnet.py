"""The classic exercise: a ResNet-18's features and predictions distilled into an AlexNet.

    accelerate launch recipes/finetune_cifar.py --image_size 96 --output_dir runs/resnet18-cifar10       # the teacher
    accelerate launch recipes/distill_cnn_alexnet.py --teacher runs/resnet18-cifar10
    python recipes/distill_cnn_alexnet.py --teacher runs/resnet18-cifar10 --dataset path/to/images_by_class \
        --objectives "Hint(layers='features', distance='cosine')" "AttentionTransfer(layers='last', weight=10.0)"

The two networks have nothing in common: the ResNet ends in 512 features, AlexNet's classifier reads 4,096, through a
linear map that is sized here and thrown away afterwards. The saved folder is an AlexNet that loads with transformers
(trust_remote_code=True, torchvision installed), or with hf_transfer. Nothing is selected on the test split.
"""

from hf_transfer import DistillationConfig, distill
from hf_transfer.cli import results_table
from hf_transfer.config import parse_given
from hf_transfer.console import is_first_process, run
from hf_transfer.distill import DistillationRun

DEFAULTS = {
    "model": "torchvision/alexnet",
    "dataset": "uoft-cs/cifar10",
    "image_size": 96,
    "num_train_epochs": 5,
    "learning_rate": 1e-4,
    "per_device_train_batch_size": 64,
    "augment": "light",
    "objectives": ["SoftTargets(temperature=4.0, weight=0.9)", "Hint(layers='features', weight=1.0)"],
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
