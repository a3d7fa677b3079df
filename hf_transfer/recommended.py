"""Recommended training arguments by modality and tuning, for what the user leaves open.

They are starting points, not optima; what of them was measured, and at which rate, stands in docs/benchmarks.md.
Everything else is TrainingArguments' own default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_SHARED: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # a share of training
    "logging_steps": 50,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "report_to": "none",
}

_BY_MODALITY: dict[str, dict[str, Any]] = {
    "image": {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 128, "weight_decay": 0.01},
    "text": {
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "weight_decay": 0.01,
        "train_sampling_strategy": "group_by_length",
    },
    "audio": {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 32, "weight_decay": 0.01},
}

_LEARNING_RATE: dict[str, dict[str, float]] = {
    "image": {"full": 5e-4, "partial": 1e-3, "gradual": 5e-4, "linear_probe": 1e-3, "lora": 5e-4, "bitfit": 2e-3},
    "text": {"full": 1e-4, "partial": 2e-4, "gradual": 1e-4, "linear_probe": 5e-3, "lora": 1e-3, "bitfit": 2e-3},
    "audio": {"full": 5e-5, "partial": 1e-4, "gradual": 5e-5, "linear_probe": 1e-3, "lora": 5e-4, "bitfit": 1e-3},
}


def training_defaults(modality: str, tuning: str, model: nn.Module | None = None) -> dict[str, Any]:
    """The training arguments that are used where the user gives none.

    Args:
        modality: "image", "text" or "audio".
        tuning: A tuning's name; of an unnamed one (a Tuning of the user's own) the full fine-tune's rate is used.
        model: The network that is trained, for what depends on its architecture.
    """
    from .memory_formats import channels_last_pays

    rates = _LEARNING_RATE[modality]
    found = {**_SHARED, **_BY_MODALITY[modality], "learning_rate": rates.get(tuning, rates["full"])}
    if modality == "image" and model is not None and channels_last_pays(model):
        found["channels_last"] = True
    return found
