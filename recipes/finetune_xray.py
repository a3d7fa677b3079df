"""Fine-tune on imbalanced medical images: pneumonia in chest X-rays, scored by AUROC.

    accelerate launch recipes/finetune_xray.py
    python recipes/finetune_xray.py --model ../shared/weights/mobilenetv2_100.coral_tf2_in1k \
        --dataset ../shared/data/pneumonia
    python recipes/finetune_xray.py --model resnet18 --pretrained false --dataset path/to/xrays_by_class

The rare class is weighted up in the loss (--sampling balanced_classes would draw it more often instead). A flipped
chest is not a chest, so augmentation shifts and turns only. Accuracy says little where one class rules: look at auroc
and balanced_accuracy. The epoch with the best validation AUROC is kept; test is looked at once.
"""

from hf_transfer import finetune
from hf_transfer.cli import results_table
from hf_transfer.config import parse_given
from hf_transfer.console import is_first_process, run

DEFAULTS = {
    "model": "timm/resnet18.a1_in1k",
    "dataset": "mmenendezg/pneumonia_x_ray",  # Kermany et al. 2018; 4,187 to train on, 1,045 to choose by, 624 to test
    "image_size": 96,
    "augment": "geometric",
    "class_weights": "balanced",
    "num_train_epochs": 5,
    "load_best_model_at_end": True,
    "metric_for_best_model": "auroc",
}


def main() -> None:
    options, training = parse_given(defaults=DEFAULTS, description=__doc__)
    result = finetune(**vars(options), **training)
    if is_first_process():
        print(f"{result.plan}\n\n{results_table(result.folder)}\n\nSaved to {result.folder}")


if __name__ == "__main__":
    run(main)
