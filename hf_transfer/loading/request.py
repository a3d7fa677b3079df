"""What was asked of load_backbone(), checked, in one value that every source reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TransferError

if TYPE_CHECKING:
    import torch

TASKS = (
    "image-classification",
    "text-classification",
    "token-classification",
    "audio-classification",
    "causal-lm",
    "regression",
)

# Arguments that say where files come from: the configuration, the weights and the processor all take them.
_HUB = frozenset({"cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token"})
# Arguments of PreTrainedModel.from_pretrained that are not overrides of the configuration.
_LOADING = frozenset(
    {
        "attn_implementation",
        "device_map",
        "dtype",
        "experts_implementation",
        "key_mapping",
        "max_memory",
        "offload_buffers",
        "offload_folder",
        "quantization_config",
        "tp_plan",
        "use_safetensors",
        "variant",
        "weights_only",
    }
)


@dataclass(frozen=True)
class Request:
    """One call of load_backbone().

    Args:
        name: Hub id, folder, timm name or `torchvision/...` name.
        labels: New label names in id order, a number of outputs, or None to keep the model's own.
        task: One of `TASKS`, or None to infer it.
        pretrained: Whether to load weights; else the network starts at random, offline where the name needs no Hub.
        image_size: Side of the square images in pixels, or None to keep the model's own.
        in_chans: Channels of the images, or None to keep the model's own.
        options: Everything else that was passed: where to fetch from, how to load, overrides of the configuration.
    """

    name: str
    labels: tuple[str, ...] | int | None = None
    task: str | None = None
    pretrained: bool = True
    image_size: int | None = None
    in_chans: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def checked(cls, name: str, labels: Sequence[str] | int | None, task: str | None, **rest: Any) -> Request:
        """A request whose arguments make sense by themselves; otherwise raises TransferError."""
        if task is not None and task not in TASKS:
            raise TransferError(f"task={task!r} is unknown. Use one of: {', '.join(TASKS)}.")
        request = cls(name, _checked_labels(labels), task, **rest)
        for key in ("image_size", "in_chans"):
            value = getattr(request, key)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise TransferError(f"{key}={value!r} must be a positive whole number, or None for the model's own.")
        if task == "causal-lm" and labels is not None:
            raise TransferError(
                "labels do not apply to task='causal-lm': the vocabulary is the output. Leave them out."
            )
        if request.output_count == 1 and task is not None and task != "regression":
            raise TransferError(
                f"labels={labels!r} gives task={task!r} one class, and nothing to tell apart. "
                "Name at least two classes, or use task='regression' for one number."
            )
        return request

    @property
    def folder(self) -> Path | None:
        """The local folder that the name is, if it is one."""
        path = Path(self.name)
        return path if path.is_dir() else None

    @property
    def label_names(self) -> list[str] | None:
        """The new names in id order, or None where none were given."""
        return list(self.labels) if isinstance(self.labels, tuple) else None

    @property
    def output_count(self) -> int | None:
        """Width of the new head, or None to keep the model's own."""
        return len(self.labels) if isinstance(self.labels, tuple) else self.labels

    @property
    def hub_options(self) -> dict[str, Any]:
        """Where files come from."""
        return {key: value for key, value in self.options.items() if key in _HUB}

    @property
    def loading_options(self) -> dict[str, Any]:
        """How weights are loaded."""
        return {key: value for key, value in self.options.items() if key in _LOADING}

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype asked for, or None for that of the weights."""
        import torch

        dtype = self.options.get("dtype", "auto")
        return None if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype

    @property
    def trust_remote_code(self) -> bool | None:
        """Whether code that comes with the model may run; None asks."""
        return self.options.get("trust_remote_code")

    @property
    def overrides(self) -> dict[str, Any]:
        """What is left: overrides of the configuration (transformers) or arguments of the network (timm)."""
        taken = _HUB | _LOADING | {"trust_remote_code"}
        return {key: value for key, value in self.options.items() if key not in taken}


def _checked_labels(labels: Sequence[str] | int | None) -> tuple[str, ...] | int | None:
    if labels is None:
        return None
    if isinstance(labels, int) and not isinstance(labels, bool):
        if labels < 1:
            raise TransferError(f"labels={labels} must be a positive number of outputs, or a list of names.")
        return labels
    if (
        isinstance(labels, str)
        or not isinstance(labels, Sequence)
        or not all(isinstance(name, str) for name in labels)
    ):
        raise TransferError(f"labels={labels!r} must be a list of names in id order, a number of outputs, or None.")
    if not labels:
        raise TransferError("labels=[] names no class. Give the names in id order, or None for the model's own.")
    twice = sorted({name for name in labels if list(labels).count(name) > 1})
    if twice:
        raise TransferError(f"labels names {', '.join(map(repr, twice))} more than once. Names must differ.")
    return tuple(labels)
