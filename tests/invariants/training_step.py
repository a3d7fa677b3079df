"""One optimizer step of tiny models on 16 fixed rows; writes the gradients taken. Run by test_gradients.py.

    python tests/invariants/training_step.py OUT 16x1 4x4
    torchrun --nproc_per_node 2 tests/invariants/training_step.py OUT 8x1 4x2

A cut BxA is a batch of B rows a process, accumulated A times.
"""

from __future__ import annotations

import os
import sys
import tempfile

import torch

from hf_transfer._torchvision import make_torchvision_importable

make_torchvision_importable()

from datasets import Dataset  # noqa: E402
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification  # noqa: E402

from hf_transfer import Backbone, DistillationConfig, DistillationTrainer, TransferConfig, TransferTrainer  # noqa: E402
from hf_transfer.objectives import DANN, L2SP, CrossEntropy, Hint, SoftTargets  # noqa: E402

ROWS, CLASSES = 16, 3


def tiny_model(modality: str, width: int = 16) -> torch.nn.Module:
    """A network without dropout or batch statistics, so that only the cut of the batch could make a difference."""
    torch.manual_seed(0)
    size = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": CLASSES}
    if modality == "text":
        return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=16, **size, **still))
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=3, **size, **still))


def rows(modality: str) -> Dataset:
    """16 rows; 5 target rows without a label, unevenly spread, so that micro-batches count different numbers."""
    generator = torch.Generator().manual_seed(1)
    domain = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1])
    labels = torch.randint(0, CLASSES, (ROWS,), generator=generator).masked_fill(domain == 1, -100)
    columns = {"labels": labels.tolist(), "domain": domain.tolist(), "example_id": list(range(ROWS))}
    if modality == "text":
        columns["input_ids"] = torch.randint(0, 50, (ROWS, 12), generator=generator).tolist()
    else:
        columns["pixel_values"] = torch.randn(ROWS, 3, 8, 8, generator=generator).tolist()
    return Dataset.from_dict(columns)


def terms(name: str) -> list:
    """The terms by name; `dann` owns a discriminator, `distil` a projector, `none` leaves the model's own loss."""
    torch.manual_seed(2)
    if name == "distil":
        return [SoftTargets(temperature=2.0, weight=0.9), Hint(layers="last", weight=0.5)]
    return (
        [CrossEntropy(), DANN(weight=0.5, schedule=lambda progress: 0.7), L2SP(weight=0.1)] if name == "dann" else []
    )


def backbone(model: torch.nn.Module, modality: str) -> Backbone:
    """The network with what a teacher and its student must know of each other."""
    image = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
    data_config = image if modality == "image" else None
    return Backbone(model, None, modality, f"{modality}-classification", "tiny", ["a", "b", "c"], data_config)


def make_trainer(model: torch.nn.Module, owned: list, objectives: str, modality: str, **options) -> TransferTrainer:
    """The Trainer; for `distil` with a wider teacher."""
    if objectives != "distil":
        return TransferTrainer(
            model=model, objectives=owned, args=TransferConfig(**options["args"]), **options["rest"]
        )
    args = DistillationConfig(**options["args"], hard_weight=0.1, teacher_cache="never")
    teacher = backbone(tiny_model(modality, width=24), modality)
    return DistillationTrainer(backbone(model, modality), teacher, owned, args, **options["rest"])


def gradient(modality: str, objectives: str, batch: int, accumulation: int) -> dict:
    """The gradient of one step (SGD at rate 1 moves by it), and its log."""
    model = tiny_model(modality)
    data = rows(modality)
    if objectives == "none":  # the model's own loss averages over the rows of a micro-batch: all must be labelled
        data = data.remove_columns(["labels", "domain"]).add_column("labels", [i % CLASSES for i in range(ROWS)])
    with tempfile.TemporaryDirectory() as folder:
        args = {
            "output_dir": folder,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "max_steps": 1,
            "learning_rate": 1.0,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_steps": 1,
        }
        owned = terms(objectives)
        trainer = make_trainer(model, owned, objectives, modality, args=args, rest={"train_dataset": data})
        watched = torch.nn.ModuleList([model, *owned])
        before = {name: p.detach().clone() for name, p in watched.named_parameters()}
        trainer.train()
        moved = {name: before[name] - p.detach() for name, p in watched.named_parameters()}
        return {"gradient": moved, "log": next(entry for entry in trainer.state.log_history if "loss" in entry)}


def main() -> None:
    out, *cuts = sys.argv[1:]
    torch.set_num_threads(1)
    results = {}
    for cut in cuts:
        batch, accumulation = map(int, cut.split("x"))
        for modality in ("image", "text"):
            for objectives in ("none", "dann", "distil"):
                results[cut, modality, objectives] = gradient(modality, objectives, batch, accumulation)
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(results, out)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
