"""How good a model is: `evaluate.Metric` modules, and their streaming form for the Trainer.

Names load on first use: `StreamingMetrics` needs torch only, the modules need the `evaluate` library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_transfer.evaluation.metrics import (
        AUROC,
        Accuracy,
        BalancedAccuracy,
        EntityF1,
        MacroF1,
        MeanSquaredError,
        Pearson,
        Spearman,
        TopKAccuracy,
    )
    from hf_transfer.evaluation.streaming import StreamingMetrics, check_best_metric, compute_metrics_for

__all__ = [
    "AUROC",
    "Accuracy",
    "BalancedAccuracy",
    "EntityF1",
    "MacroF1",
    "MeanSquaredError",
    "Pearson",
    "Spearman",
    "StreamingMetrics",
    "TopKAccuracy",
    "check_best_metric",
    "compute_metrics_for",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "streaming" if name in ("StreamingMetrics", "check_best_metric", "compute_metrics_for") else "metrics"
    return getattr(import_module(f"{__name__}.{home}"), name)
