"""What trains: all of a network, its head, its last blocks, its biases, or adapters beside it.

    model = PartialFreeze(2).apply(model)       # or LoRA(r=8), LinearProbe(), ...
    print(plan(model, learning_rate=1e-3))

A Tuning is applied before the Trainer is made: its optimizer holds only what trains then. Applying another one later
starts from the whole network again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from .adapters import attach, is_adapted, lora_targets, merge
from .anatomy import Anatomy
from .errors import TransferError
from .freezing import BatchNormPolicy, block_names, parameters_inside, train_only
from .plans import Plan, PlanRow, plan

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

__all__ = [
    "TUNINGS",
    "BitFit",
    "FullFineTune",
    "GradualUnfreeze",
    "LinearProbe",
    "LoRA",
    "PartialFreeze",
    "Peft",
    "Plan",
    "PlanRow",
    "Tuning",
    "merge",
    "plan",
    "tuning_from_name",
]

TUNINGS = ("full", "linear_probe", "partial", "gradual", "bitfit", "lora")


@dataclass(frozen=True)
class Tuning:
    """What trains in a network.

    Args:
        batch_norm: "auto": BatchNorm runs in eval mode where it is frozen, in train mode elsewhere. "train": its
            statistics move everywhere. "eval": nowhere.
    """

    batch_norm: BatchNormPolicy = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        if self.batch_norm not in get_args(BatchNormPolicy):
            raise TransferError(
                f"batch_norm must be one of {list(get_args(BatchNormPolicy))}, got {self.batch_norm!r}."
            )

    def apply(self, model: nn.Module) -> nn.Module:
        """Sets what trains, and keeps what does not in eval mode.

        Args:
            model: A network without adapters; changed in place, whatever was frozen in it before.

        Returns:
            The network, or the peft.PeftModel around it.

        Raises:
            TransferError: If this tuning does not fit the network; it is then as it was.
        """
        anatomy = _anatomy(model)
        train_only(model, anatomy, self.trained(model, anatomy), self.batch_norm)
        return model

    def trained(self, model: nn.Module, anatomy: Anatomy) -> set[str]:
        """Names of the network's own parameters that this tuning trains."""
        raise NotImplementedError

    def phases(self, model: nn.Module) -> list[Tuning]:
        """The tunings to train with one after the other, on the same network, with a fresh Trainer for each."""
        return [self]


def _anatomy(model: nn.Module) -> Anatomy:
    if is_adapted(model):
        raise TransferError(
            "The network already carries adapters, and a tuning starts from a plain one. "
            "Fold them in first: model = hf_transfer.merge(model)."
        )
    return Anatomy.of(model)


def _in_groups(model: nn.Module, anatomy: Anatomy, lowest: int) -> set[str]:
    """Names of the parameters in a group and those above it."""
    return {name for name, _ in model.named_parameters() if anatomy.group(name) >= lowest}


class FullFineTune(Tuning):
    """Everything trains."""

    def trained(self, model: nn.Module, anatomy: Anatomy) -> set[str]:
        return _in_groups(model, anatomy, 0)


class LinearProbe(Tuning):
    """The head alone trains, on the features of a network that does not move."""

    def trained(self, model: nn.Module, anatomy: Anatomy) -> set[str]:
        return _in_groups(model, anatomy, anatomy.depth + 2)


@dataclass(frozen=True)
class PartialFreeze(Tuning):
    """The last blocks, the neck and the head train; the stem (embeddings, positions, class token) does not.

    Args:
        train_blocks: How many of the last blocks (an int, >= 1), what fraction of the blocks (a float in (0, 1], at
            least one block), or the names of blocks or modules, which then train in place of the last blocks.
    """

    train_blocks: int | float | Sequence[str] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        blocks = self.train_blocks
        if isinstance(blocks, str):
            object.__setattr__(self, "train_blocks", (blocks,))
        elif isinstance(blocks, bool) or not isinstance(blocks, int | float | Sequence):
            raise TransferError(f"train_blocks must be a number, a fraction or names, got {blocks!r}.")
        elif isinstance(blocks, int) and blocks < 1:
            raise TransferError(f"train_blocks must be at least 1, got {blocks}. LinearProbe trains no block.")
        elif isinstance(blocks, float) and not 0 < blocks <= 1:
            raise TransferError(
                f"A fraction of the blocks must be in (0, 1], got {blocks}. A number of them is an int."
            )
        elif isinstance(blocks, Sequence):
            if not blocks:
                raise TransferError("train_blocks names no block. LinearProbe trains no block.")
            object.__setattr__(self, "train_blocks", tuple(blocks))

    def trained(self, model: nn.Module, anatomy: Anatomy) -> set[str]:
        above = _in_groups(model, anatomy, anatomy.depth + 1)
        if isinstance(self.train_blocks, Sequence):
            return above.union(*(parameters_inside(model, anatomy, name) for name in self.train_blocks))
        number = self.train_blocks
        if isinstance(number, float):
            number = max(1, round(number * anatomy.depth))
        if number > anatomy.depth:
            raise TransferError(
                f"train_blocks is {number}, and {type(model).__name__} has {anatomy.depth} blocks: "
                f"{block_names(anatomy)}. Train at most that many, or everything (FullFineTune)."
            )
        return _in_groups(model, anatomy, anatomy.depth + 1 - number)


@dataclass(frozen=True)
class GradualUnfreeze(Tuning):
    """The head first, then more and more of the last blocks, then everything: ULMFiT (Howard & Ruder 2018,
    arXiv:1801.06146).

    Each of `phases(model)` is applied to the same network and trained by a Trainer of its own: an optimizer never
    learns of parameters that start to train later.

    Args:
        steps: The number of phases, >= 2 (the blocks are shared out evenly; a network with fewer blocks has fewer
            phases), or the number of the last blocks that train in each phase, rising; the word "all" is everything,
            the stem included. ULMFiT's own is range(depth + 1) and "all".
    """

    steps: int | Sequence[int | Literal["all"]] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.steps, bool) or not isinstance(self.steps, int | Sequence) or isinstance(self.steps, str):
            raise TransferError(f"steps must be a number or a list of numbers of blocks, got {self.steps!r}.")
        if isinstance(self.steps, int):
            if self.steps < 2:
                raise TransferError(f"Gradual unfreezing has at least 2 phases, got {self.steps}.")
            return
        object.__setattr__(self, "steps", tuple(self.steps))
        numbers = [step for step in self.steps if step != "all"]
        valid = all(isinstance(number, int) and number >= 0 for number in numbers) and "all" not in self.steps[:-1]
        if not self.steps or not valid or sorted(set(numbers)) != numbers:
            raise TransferError(f'steps must be rising numbers of blocks, the last may be "all"; got {self.steps!r}.')

    def phases(self, model: nn.Module) -> list[Tuning]:
        """The tunings of the phases for this network.

        Raises:
            TransferError: If a step asks for more blocks than there are.
        """
        depth = _anatomy(model).depth
        steps: Sequence[int | str]
        if isinstance(self.steps, int):
            shares = sorted({depth * phase // (self.steps - 1) for phase in range(self.steps - 1)})
            steps = [*shares, "all"]
        else:
            steps = self.steps
        tunings = [self._tuning(step) for step in steps]
        for tuning in tunings:
            tuning.trained(model, Anatomy.of(model))
        return tunings

    def _tuning(self, step: int | str) -> Tuning:
        if step == "all":
            return FullFineTune(batch_norm=self.batch_norm)
        if step == 0:
            return LinearProbe(batch_norm=self.batch_norm)
        return PartialFreeze(int(step), batch_norm=self.batch_norm)

    def apply(self, model: nn.Module) -> nn.Module:
        """Refuses: one optimizer cannot train all phases."""
        raise TransferError(
            "Gradual unfreezing is several trainings: for phase in tuning.phases(model): phase.apply(model), then "
            "train with a fresh Trainer. finetune(tuning=GradualUnfreeze()) does so."
        )


class BitFit(Tuning):
    """The biases and the head train (Ben Zaken et al. 2021, arXiv:2106.10199)."""

    def trained(self, model: nn.Module, anatomy: Anatomy) -> set[str]:
        biases = {name for name, _ in model.named_parameters() if name.endswith(("bias", "_bias"))}
        return biases | _in_groups(model, anatomy, anatomy.depth + 2)


@dataclass(frozen=True)
class LoRA(Tuning):
    """Low-rank adapters beside linear and convolutional layers, and the head (Hu et al. 2021, arXiv:2106.09685).

    Args:
        r: Rank of the adapters, >= 1.
        alpha: Their scale is alpha / r (alpha / sqrt(r) with `use_rslora`); 2 r if None.
        dropout: On the adapters' input, in [0, 1). Above 0 it costs more time than full fine-tuning does.
        targets: "all" linear layers and convolutions of blocks and neck, those in "attention", or names of layers:
            whole paths or their last parts ("query", "attn.qkv").
        use_dora: Weight-decomposed adapters (Liu et al. 2024, arXiv:2402.09353).
        use_rslora: Rank-stabilised scale (Kalajdzievski 2023, arXiv:2312.03732).
    """

    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | Sequence[str] = "all"
    use_dora: bool = False
    use_rslora: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise TransferError(f"The rank r must be a whole number >= 1, got {self.r!r}.")
        if self.alpha is not None and self.alpha <= 0:
            raise TransferError(f"alpha must be above 0, got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise TransferError(f"dropout must be in [0, 1), got {self.dropout}.")
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))

    def apply(self, model: nn.Module) -> nn.Module:
        """Wraps the network into a peft.PeftModel; see Tuning.apply."""
        from peft import LoraConfig

        anatomy = _anatomy(model)
        config = LoraConfig(
            r=self.r,
            lora_alpha=2 * self.r if self.alpha is None else self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=lora_targets(model, anatomy, self.targets),
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
        )
        return attach(model, anatomy, config, self.batch_norm)


@dataclass(frozen=True)
class Peft(Tuning):
    """Any method of the peft library.

    Args:
        config: A peft.PeftConfig. The head is added to its `modules_to_save` where it names none.
    """

    config: PeftConfig = field(kw_only=False)

    def apply(self, model: nn.Module) -> nn.Module:
        """Wraps the network into a peft.PeftModel; see Tuning.apply."""
        return attach(model, _anatomy(model), self.config, self.batch_norm)


def tuning_from_name(
    name: str, *, train_blocks: int | float | Sequence[str] | None = None, lora_r: int | None = None
) -> Tuning:
    """A tuning by the name that recipes and the command line use.

    Args:
        name: One of TUNINGS.
        train_blocks: For "partial"; see PartialFreeze.
        lora_r: For "lora"; the rank.

    Raises:
        TransferError: For an unknown name, or an option that the named tuning does not have.
    """
    if name not in TUNINGS:
        raise TransferError(f"Unknown tuning {name!r}. There are: {', '.join(TUNINGS)}.")
    for option, value, owner in (("train_blocks", train_blocks, "partial"), ("lora_r", lora_r, "lora")):
        if value is not None and name != owner:
            raise TransferError(f"{option} applies to tuning {owner!r}, not to {name!r}. Leave it out.")
    if name == "partial":
        return PartialFreeze() if train_blocks is None else PartialFreeze(train_blocks)
    if name == "lora":
        return LoRA() if lora_r is None else LoRA(r=lora_r)
    kinds: dict[str, type[Tuning]] = {
        "full": FullFineTune,
        "linear_probe": LinearProbe,
        "gradual": GradualUnfreeze,
        "bitfit": BitFit,
    }
    return kinds[name]()
