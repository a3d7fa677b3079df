"""Fine-tune an image classifier: by default a timm ResNet-18 on CIFAR-10 from the Hub; any backbone, any images.

    accelerate launch recipes/finetune_cifar.py
    accelerate launch recipes/finetune_cifar.py --config recipes/configs/finetune_cifar_lora.yaml --learning_rate 1e-3
    accelerate launch recipes/finetune_cifar.py --model ../shared/weights/mobilenetv2_100.coral_tf2_in1k \
        --dataset ../shared/data/cifar10 --image_size 96 --max_train_samples 10000 --tuning full
    python recipes/finetune_cifar.py --model resnet18 --dataset path/to/images_by_class --tuning linear_probe
    python recipes/finetune_cifar.py --help                      # every flag, TrainingArguments' included

The tuning is full, linear_probe, partial (--train_blocks 2), gradual, bitfit or lora (--lora_r 16). What no flag and
no YAML file says takes a recommended value for the tuning (hf_transfer/recommended.py). The model of the last step is
kept: nothing is selected on the test split, which is looked at once. The run folder holds the model as an ordinary
checkpoint, README.md (its card) and results.json.
"""

from hf_transfer import finetune
from hf_transfer.cli import results_table
from hf_transfer.config import parse_given
from hf_transfer.console import is_first_process, run

DEFAULTS = {
    "model": "timm/resnet18.a1_in1k",
    "dataset": "uoft-cs/cifar10",
    "num_train_epochs": 3,
    "augment": "light",  # random crop and horizontal flip
    "label_smoothing_factor": 0.1,
}


def main() -> None:
    options, training = parse_given(defaults=DEFAULTS, description=__doc__)
    result = finetune(**vars(options), **training)
    if is_first_process():
        print(f"{result.plan}\n\n{results_table(result.folder)}\n\nSaved to {result.folder}")


if __name__ == "__main__":
    run(main)
