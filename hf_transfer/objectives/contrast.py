"""CRD: the student's embedding of a row picks the teacher's out of thousands of others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from ..errors import TransferError
from ..objective import Schedule, Step
from ._layers import FEATURES, FeatureTerm, Layers, attended, pooled
from ._precision import full_precision


@full_precision
def crd(anchor: Tensor, bank: Tensor, ids: Tensor, drawn: Tensor, temperature: float, log_z: Tensor) -> Tensor:
    """Noise-contrastive loss of telling a row's own embedding from K others: -log h(+) - sum of log(1 - h(-)).

    h = e^s / (e^s + K / M), s being the inner product over the temperature, less the log of the normaliser Z.

    Source: Tian et al. 2020, "Contrastive Representation Distillation", arXiv:1910.10699, equations 10 and 19; Z is
    the authors' code's.

    Args:
        anchor: (N, D), length 1: rows in one network.
        bank: (M, D): all rows in the other network.
        ids: (N,), where in the bank the rows themselves are.
        drawn: (N, K), where in the bank those are that they are told from.
        temperature: > 0.
        log_z: 0-d, log of Z; 0 for the paper's equation.

    Returns:
        (N,).
    """
    scores = _scores(anchor, bank, ids, drawn, temperature) - log_z - math.log(drawn.shape[1] / len(bank))
    return -F.logsigmoid(scores[:, 0]) - F.logsigmoid(-scores[:, 1:]).sum(dim=1)


@full_precision
def _scores(anchor: Tensor, bank: Tensor, ids: Tensor, drawn: Tensor, temperature: float) -> Tensor:
    """(N, 1 + K) inner products over the temperature; all M are taken, as gathering K rows of D would cost more."""
    return (anchor @ bank.T).gather(1, torch.cat([ids[:, None], drawn], dim=1)) / temperature


def gathered(rows: Tensor) -> Tensor:
    """(processes * N, ...), the rows of all processes, which have equally many; each process's memory gets them all.

    Args:
        rows: (N, ...), this process's.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    found = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(found, rows.contiguous())
    return torch.cat(found)


class CRD(FeatureTerm):
    """Contrastive representation distillation with a memory of both networks. Tian et al. 2020, arXiv:1910.10699.

    Rows are known by their `example_id`, which says where in the memory they are. Both directions are summed: the
    student's embedding among the teacher's and the other way round. The memory is part of a checkpoint.

    Args:
        size: Rows of the memory: `example_id`s of the training data are below it (its length, where nothing was
            left out of it).
        layers: Which layer, one; the input of the classifier by default. See FeatureTerm.
        width: Of the embeddings.
        negatives: Drawn for each row, with replacement.
        temperature: > 0.
        momentum: Of the memory's rows, in [0, 1).
        weight: A number or a schedule; 0.8 is the authors'.
        name: The name it is logged under.

    Raises:
        TransferError: If an argument is out of its range; in training, if an `example_id` is missing or too large.
    """

    memory: Tensor  # (2, size, width): the student's and the teacher's embeddings
    log_z: Tensor  # (2,), NaN before the first batch

    def __init__(
        self,
        size: int,
        layers: Layers = FEATURES,
        width: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        weight: float | Schedule = 0.8,
        name: str | None = None,
    ) -> None:
        super().__init__(layers, weight, name)
        for argument, value in (("size", size), ("width", width), ("negatives", negatives)):
            if value < 1:
                raise TransferError(f"{argument} must be at least 1, got {value!r}.")
        if not temperature > 0 or not 0 <= momentum < 1:
            raise TransferError(
                f"temperature must be > 0 and momentum in [0, 1), got {temperature!r} and {momentum!r}."
            )
        self.size, self.width, self.negatives = size, width, negatives
        self.temperature, self.momentum = temperature, momentum
        bound = math.sqrt(3 / width)
        self.register_buffer("memory", torch.empty(2, size, width).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.full((2,), math.nan))
        self.embed = nn.ModuleList()

    def build(self) -> None:
        if len(self.pairs) != 1:
            raise TransferError(f"The term '{self.name}' compares one layer, got {[*map(str, self.pairs)]}.")
        pair = self.pairs[0]
        self.embed = nn.ModuleList(nn.Linear(width, self.width) for width in (pair.student_width, pair.teacher_width))

    def count(self, batch: Mapping[str, Any]) -> Tensor | None:
        ids = batch.get("example_id")
        if ids is not None and len(ids) and int(ids.max()) >= self.size:
            raise TransferError(
                f"The term '{self.name}' keeps {self.size} rows, and a row has example_id {int(ids.max())}. Valid: 0 "
                f"to {self.size - 1}; pass size=largest example_id + 1."
            )
        return super().count(batch)

    def forward(self, step: Step) -> Tensor:
        if step.example_id is None:
            raise TransferError(f"The term '{self.name}' needs the rows' `example_id`, and the batch has none.")
        ids = step.example_id
        rows = zip(self.embed, self.outputs(step, self.pairs[0]), strict=True)
        embedded = [F.normalize(embed(pooled(x, attended(step))).float(), dim=1) for embed, x in rows]
        drawn = torch.randint(self.size, (len(ids), self.negatives), device=ids.device)
        memory = self.memory.clone()  # changed below, before the backward that needs it
        losses = []
        for i in (0, 1):  # the student's among the teacher's, and the other way round
            task = (embedded[i], memory[1 - i], ids, drawn, self.temperature)
            if self.log_z[i].isnan():
                self._normalise(i, gathered(_scores(*task).detach()))
            losses.append(crd(*task, self.log_z[i]))
        self._remember(gathered(ids), torch.stack([gathered(rows.detach()) for rows in embedded]))
        return losses[0] + losses[1]

    def _normalise(self, i: int, scores: Tensor) -> None:
        """Z is set once: the mean of e^s over the first batch, times the number of rows."""
        self.log_z[i] = scores.flatten().logsumexp(dim=0) - math.log(scores.numel()) + math.log(self.size)

    @torch.no_grad()
    def _remember(self, ids: Tensor, embedded: Tensor) -> None:
        mixed = self.momentum * self.memory[:, ids] + (1 - self.momentum) * embedded  # (2, N, width)
        self.memory[:, ids] = F.normalize(mixed, dim=2)
