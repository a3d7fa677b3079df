"""Adapt across domains: a small network learns MNIST's digits and is used on USPS, with and without DANN.

    python recipes/adapt_digits.py --source ../shared/data/mnist --target ../shared/data/usps
    python recipes/adapt_digits.py                                       # both from the Hub
    accelerate launch recipes/adapt_digits.py --seeds 0 1 2 --max_steps 1000 --dann_weight 0.5

Each batch holds 64 labelled rows of MNIST and 64 unlabelled rows of USPS. Without DANN the target rows only pass
through; with it, a discriminator tries to tell the domains apart from the features, and the network learns to make
that impossible (Ganin et al. 2016, arXiv:1505.07818). No target label is used, in training or for choosing anything:
the model of the last step is scored on USPS's test split.
"""

import json
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path
from statistics import mean, stdev

from torch import Tensor, nn
from transformers import set_seed

from hf_transfer import Backbone, TransferConfig, TransferTrainer, load_data
from hf_transfer.console import is_first_process, run
from hf_transfer.data.collate import collator_for
from hf_transfer.data.splits import combine
from hf_transfer.data.transforms import prepare
from hf_transfer.evaluation import compute_metrics_for
from hf_transfer.objectives import DANN, CrossEntropy

IMAGE = {"input_size": (1, 28, 28), "mean": (0.5,), "std": (0.5,), "interpolation": "bilinear", "crop_pct": 1.0}


class DigitNet(nn.Module):
    """A LeNet with batch normalisation: two convolutions, one hidden layer of 128 features, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 5), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),  # (N, 32, 12, 12)
            nn.Conv2d(32, 48, 5), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(2),  # (N, 48, 4, 4)
            nn.Flatten(), nn.Linear(768, 128), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Linear(128, 10)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.classifier(self.body(pixel_values))}


def train(source, target, objectives, seed: int, options) -> float:
    """Trains on labelled source rows and unlabelled target rows; returns the accuracy on the target's test split."""
    set_seed(seed)
    labels = source.labels
    backbone = Backbone(DigitNet(), None, "image", "image-classification", "digit-net", labels, data_config=IMAGE)
    mixed = combine(source=source.splits["train"], target=target.splits["train"], columns=source.columns)
    trainer = TransferTrainer(
        model=backbone.model,
        args=TransferConfig(
            output_dir=f"{options.output_dir}/{'-'.join(term.name for term in objectives)}-seed{seed}",
            per_device_train_batch_size=128,
            max_steps=options.max_steps,
            learning_rate=1e-3,
            sampling="balanced_domains",  # 64 + 64 in every batch
            batch_eval_metrics=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=max(options.max_steps // 10, 1),
            seed=seed,
        ),
        train_dataset=prepare(mixed, backbone, source.columns, train=True, augment="none", seed=seed),
        data_collator=collator_for(backbone),
        compute_metrics=compute_metrics_for("image-classification", labels),
        objectives=objectives,
    )
    trainer.train()
    test = prepare(target.splits["test"], backbone, target.columns, train=False)
    return trainer.evaluate(test)["eval_accuracy"]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--source", default="ylecun/mnist", help="labelled data: Hub id or folder")
    parser.add_argument("--target", default="flwrlabs/usps", help="data of the other domain; its labels only score")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max_steps", type=int, default=1000)
    parser.add_argument("--dann_weight", type=float, default=1.0)
    parser.add_argument("--output_dir", default="runs/adapt_digits")
    options = parser.parse_args()

    source, target = load_data(options.source, validation=0), load_data(options.target, validation=0)
    found: dict[str, list[float]] = {}
    methods = {
        "source only": lambda: [CrossEntropy()],
        "DANN": lambda: [CrossEntropy(), DANN(weight=options.dann_weight)],
    }
    for name, terms in methods.items():
        scores = found[name] = [100 * train(source, target, terms(), seed, options) for seed in options.seeds]
        spread = f" +- {stdev(scores):.1f}" if len(scores) > 1 else ""
        if is_first_process():
            each = ", ".join(f"{score:.1f}" for score in scores)
            print(
                f"{name:12} {mean(scores):.1f}{spread} % of the target's test split  (seeds {options.seeds}: {each})"
            )
    if is_first_process():
        facts = {"scores": found, "seeds": options.seeds, "max_steps": options.max_steps, "dann": options.dann_weight}
        Path(options.output_dir).mkdir(parents=True, exist_ok=True)
        (Path(options.output_dir) / "results.json").write_text(json.dumps(facts, indent=2))


if __name__ == "__main__":
    run(main)
