"""Transfer learning for any image, text or audio backbone of the Hugging Face ecosystem.

Public names load on first use (PEP 562), so that `import hf_transfer` costs milliseconds and imports no framework.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hf_transfer._clash import DOWNLOADERS_NAMES, clash, refuse_shared_folder

refuse_shared_folder()

if TYPE_CHECKING:
    from hf_transfer.adapters import merge as merge
    from hf_transfer.anatomy import Anatomy as Anatomy
    from hf_transfer.anatomy import Taps as Taps
    from hf_transfer.backbones import Backbone as Backbone
    from hf_transfer.backbones import load_backbone as load_backbone
    from hf_transfer.data.sources import load_data as load_data
    from hf_transfer.distill import distill as distill
    from hf_transfer.distillation.config import DistillationConfig as DistillationConfig
    from hf_transfer.distillation.student import carve as carve
    from hf_transfer.distillation.trainer import DistillationTrainer as DistillationTrainer
    from hf_transfer.errors import TransferError as TransferError
    from hf_transfer.finetune import finetune as finetune
    from hf_transfer.frozen.probe import probe as probe
    from hf_transfer.objective import Objective as Objective
    from hf_transfer.objective import Step as Step
    from hf_transfer.plans import plan as plan
    from hf_transfer.runs import Result as Result
    from hf_transfer.trainer import TransferTrainer as TransferTrainer
    from hf_transfer.transfer_config import TransferConfig as TransferConfig
    from hf_transfer.tuning import BitFit as BitFit
    from hf_transfer.tuning import FullFineTune as FullFineTune
    from hf_transfer.tuning import GradualUnfreeze as GradualUnfreeze
    from hf_transfer.tuning import LinearProbe as LinearProbe
    from hf_transfer.tuning import LoRA as LoRA
    from hf_transfer.tuning import PartialFreeze as PartialFreeze
    from hf_transfer.tuning import Peft as Peft
    from hf_transfer.tuning import Tuning as Tuning

__version__ = "0.1.0"

_HOME = {  # public name -> the module that defines it
    "Anatomy": "anatomy",
    "Backbone": "backbones",
    "BitFit": "tuning",
    "DistillationConfig": "distillation.config",
    "DistillationTrainer": "distillation.trainer",
    "FullFineTune": "tuning",
    "GradualUnfreeze": "tuning",
    "LinearProbe": "tuning",
    "LoRA": "tuning",
    "Objective": "objective",
    "PartialFreeze": "tuning",
    "Peft": "tuning",
    "Result": "runs",
    "Step": "objective",
    "Taps": "anatomy",
    "TransferConfig": "transfer_config",
    "TransferError": "errors",
    "TransferTrainer": "trainer",
    "Tuning": "tuning",
    "carve": "distillation.student",
    "distill": "distill",
    "finetune": "finetune",
    "load_backbone": "backbones",
    "load_data": "data.sources",
    "merge": "adapters",
    "plan": "plans",
    "probe": "frozen.probe",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in DOWNLOADERS_NAMES:
        # ImportError, not AttributeError: `from hf_transfer import download`, as huggingface_hub < 1.0 has it, would
        # replace the message of the latter by its own.
        raise clash(f"hf_transfer.{name} does not exist")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


class _Package(ModuleType):
    """Keeps `hf_transfer.finetune` the function: importing the submodule of that name binds the module over it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
