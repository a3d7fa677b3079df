"""What a tuning decided, in numbers: parameters trained and learning rate of every group."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from .anatomy import Anatomy
from .learning_rates import group_rates

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class PlanRow:
    """One group of a network.

    Attributes:
        name: "stem", the block's name, "neck" or "head".
        trainable: Parameters that train.
        total: Parameters, adapters included.
        learning_rate: The rate of those that train; None where none do or none was given.
    """

    name: str
    trainable: int
    total: int
    learning_rate: float | None = None

    @property
    def trained(self) -> bool:
        """Whether anything in the group trains."""
        return self.trainable > 0


@dataclass(frozen=True)
class Plan:
    """What trains, group by group, input to output. `str(plan)` is a table.

    Attributes:
        rows: Stem, every block, neck, head.
    """

    rows: tuple[PlanRow, ...]

    @property
    def trainable(self) -> int:
        """Parameters that train."""
        return sum(row.trainable for row in self.rows)

    @property
    def total(self) -> int:
        """Parameters, adapters included; a head that an adapter trains a copy of is counted once."""
        return sum(row.total for row in self.rows)

    @property
    def blocks_trained(self) -> tuple[str, ...]:
        """Names of the blocks in which something trains."""
        return tuple(row.name for row in self.rows[1:-2] if row.trained)

    def __str__(self) -> str:
        lines = [("group", "trainable", "total", "learning rate")]
        for (trained, _), run in groupby(self._numbered(), key=lambda item: (item[1].trained, item[0])):
            rows = [row for _, row in run]
            rates = sorted({row.learning_rate for row in rows if row.learning_rate is not None})
            lines.append(
                (
                    rows[0].name if len(rows) == 1 else f"{rows[0].name} .. {rows[-1].name} ({len(rows)} blocks)",
                    f"{sum(row.trainable for row in rows):,}" if trained else "frozen",
                    f"{sum(row.total for row in rows):,}",
                    " .. ".join(f"{rate:.3g}" for rate in dict.fromkeys([rates[0], rates[-1]])) if rates else "-",
                )
            )
        share = 100 * self.trainable / max(self.total, 1)
        lines.append(("all", f"{self.trainable:,}", f"{self.total:,}", f"{share:.2f} % trains"))
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in lines)

    def _numbered(self) -> list[tuple[str, PlanRow]]:
        """Each row with its kind: neighbouring blocks that do the same share a line of the table."""
        kinds = ["stem", *["block"] * (len(self.rows) - 3), "neck", "head"]
        return [(kind, row) for kind, row in zip(kinds, self.rows, strict=True) if row.total or kind == "head"]


def plan(
    model: nn.Module,
    *,
    learning_rate: float | None = None,
    head_learning_rate: float | None = None,
    layer_decay: float | None = None,
) -> Plan:
    """Counts what trains in a network as it is now.

    Args:
        model: Any network, tuned or not, with adapters or not.
        learning_rate: As for `learning_rates.parameter_groups`; the plan has no rates if None.
        head_learning_rate: Likewise.
        layer_decay: Likewise.

    Returns:
        The Plan.

    Raises:
        TransferError: For a rate out of its range.
    """
    anatomy = Anatomy.of(model)
    groups = anatomy.depth + 3
    rates: list[float | None] = [None] * groups
    if learning_rate is not None:
        rates = list(
            group_rates(
                anatomy.depth,
                learning_rate=learning_rate,
                head_learning_rate=head_learning_rate,
                layer_decay=layer_decay,
            )
        )
    trainable, total = [0] * groups, [0] * groups
    for name, parameter in model.named_parameters():
        if "original_module" in name.split("."):
            continue  # the frozen twin that peft keeps of a module it trains a copy of
        group = anatomy.group(name)
        total[group] += parameter.numel()
        trainable[group] += parameter.numel() if parameter.requires_grad else 0
    return Plan(
        tuple(
            PlanRow(
                anatomy.group_name(group), trainable[group], total[group], rates[group] if trainable[group] else None
            )
            for group in range(groups)
        )
    )
