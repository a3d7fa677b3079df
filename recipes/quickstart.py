"""Transfer learning in five minutes, without a download: digits 0-4 teach a network, ten labels a class teach it 5-9.

    make quickstart                        # or: python recipes/quickstart.py
    python recipes/quickstart.py --seed 1 --labels 5

The data is scikit-learn's handwritten digits (8 x 8 pixels, real handwriting). A small network is pretrained on the
digits 0-4, then transferred to 5-9 in four ways, next to the same network from scratch. All five get the same rows,
the same number of steps and the same augmentation; each keeps its last step; the test split is looked at once.
"""

import logging
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from itertools import count
from pathlib import Path

import datasets
import torch
import transformers
from datasets import DatasetDict

from hf_transfer import TransferError, finetune, load_data
from hf_transfer.console import run
from hf_transfer.data.splits import few_shot, keep_classes

KNOWN, NEW = ["0", "1", "2", "3", "4"], ["5", "6", "7", "8", "9"]
WAYS = {
    "from scratch": {"pretrained": False, "learning_rate": 3e-3},
    "linear probe": {"tuning": "linear_probe", "learning_rate": 3e-2},
    "partial freeze": {"tuning": "partial", "train_blocks": 2, "learning_rate": 3e-3},
    "LoRA": {"tuning": "lora", "lora_r": 8, "learning_rate": 1e-2},
    "full": {"tuning": "full", "learning_rate": 3e-3},
}


def new_folder() -> Path:
    """The first runs/quickstart-N that does not exist."""
    return next(path for n in count(1) if not (path := Path(f"runs/quickstart-{n}")).exists())


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="test_resnet", help="a timm network; this one has 0.4 M parameters")
    parser.add_argument("--labels", type=int, default=10, help="labelled rows a class of the new task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output_dir", type=Path, help="where the runs go; a new folder runs/quickstart-N if not given"
    )
    options = parser.parse_args()
    logging.getLogger("hf_transfer").setLevel(logging.WARNING)  # six runs: the table says enough
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # a network this small gains nothing by more, which wait for each other on busy cores
    folder = options.output_dir or new_folder()
    if (folder / "pretrained").exists():
        raise TransferError(f"{folder} holds an earlier run: delete it, or pass another --output_dir.")

    digits = load_data("digits", validation=0, seed=options.seed).splits
    shared = {
        "image_size": 32, "augment": "geometric", "seed": options.seed, "validation": 0, "disable_tqdm": True,
        "per_device_train_batch_size": 32, "save_strategy": "no", "logging_strategy": "no",
    }  # fmt: skip

    print("Pretraining on the digits 0-4 ...", flush=True)
    known = DatasetDict({split: keep_classes(rows, KNOWN) for split, rows in digits.items()})
    pretrained = finetune(
        options.model, known, pretrained=False, max_steps=300, learning_rate=3e-3, mixup=0.4,
        output_dir=folder / "pretrained", **shared,
    )  # fmt: skip
    print(f"... {pretrained.metrics['test']['accuracy']:.1%} of its own test rows right\n", flush=True)

    new = DatasetDict({split: keep_classes(rows, NEW) for split, rows in digits.items()})
    new["train"] = few_shot(new["train"], options.labels, seed=options.seed)
    print(f"The digits 5-9 with {options.labels} labels a class, scored on {len(new['test'])} test rows")
    print(f"{'':16}{'accuracy':>10}{'trained':>12}{'of':>12}  parameters", flush=True)
    for name, way in WAYS.items():
        run_folder = folder / name.replace(" ", "-")
        result = finetune(pretrained.folder, new, max_steps=30, output_dir=run_folder, **shared, **way)
        print(
            f"{name:16}{result.metrics['test']['accuracy']:>10.1%}"
            f"{result.plan.trainable:>12,}{result.plan.total:>12,}",
            flush=True,
        )

    print(f"""
Each run is a folder in {folder}: an ordinary checkpoint, its card (README.md), results.json.
Next:
  hf-transfer report {folder}/full
  python recipes/finetune_cifar.py --model timm/resnet18.a1_in1k --dataset path/to/images_by_class --tuning lora
  python recipes/finetune_text.py --help""")


if __name__ == "__main__":
    run(main)
