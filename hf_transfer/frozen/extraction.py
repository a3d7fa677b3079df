"""Running the frozen part of a network over many rows, in batches that suit the machine (batch_sizes.py).

A batch of another size rounds otherwise, and so does another order of channels. Where a vector crosses the cut, linear
layers behind it pass that on as it is. Behind a map Adam makes a step of full size of a gradient that is nothing but
rounding (measured: logits 1e-2 apart after 9 steps), so there batches are those of training, whole: bit for bit equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..batch_sizes import in_parts, longest_first, rows_at_once, rows_loaded
from ..data.columns import EXAMPLE_ID, values
from ..objective import model_inputs
from .cut import Cut
from .trust import alike

if TYPE_CHECKING:
    from ..data.collate import Collator


class Extractor:
    """Computes what crosses a cut.

    Args:
        cut: Where the network is cut; it is on the device of `args`.
        collator: Of the rows' batches.
        args: The Trainer's arguments.
        sample: A collated batch of a few rows.
    """

    def __init__(self, cut: Cut, collator: Collator, args: Any, sample: Mapping[str, Any]) -> None:
        self.cut, self.collator, self.args = cut, collator, args
        self.dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self._device = args.device
        self._on_cpu = args.device.type == "cpu"
        self._as_trained = len(cut.shape) > 1 and cut.sizes[1] is None
        self._channels_last = False
        if self._may_be_channels_last():
            inputs = self._placed(sample)
            with self._running() as run:
                usual = run(inputs)
            self._channels_last = True
            with self._running() as run:
                self._channels_last = alike(run(self._placed(sample)), usual)

    def _may_be_channels_last(self) -> bool:
        """On a CPU convolutions are 1.2 to 1.4 times as fast so (measured), on a GPU those of its matrix units."""
        convolves = any(isinstance(module, nn.Conv2d) for module in self.cut.model.modules())
        return convolves and not self._as_trained and (self._on_cpu or self.dtype is not None)

    def batches(self, rows: Any, there: np.ndarray, mine: np.ndarray | None = None) -> list[list[int]]:
        """The positions of the rows that this process is to compute, a list a batch.

        Args:
            rows: A prepared dataset.
            there: (K,) example_ids that no process need compute; the same on all.
            mine: (L,) example_ids that this process has computed.
        """
        ids = np.asarray(values(rows, EXAMPLE_ID))
        order = longest_first(rows)
        order = order[~np.isin(ids[order], there)]
        own = order[self.args.process_index :: self.args.world_size]
        if mine is not None:
            own = own[~np.isin(ids[own], mine)]
        size = self.args.train_batch_size
        if not self._as_trained:
            size = rows_loaded(self._device, size)
        batches = [own[start : start + size].tolist() for start in range(0, len(own), size)]
        middle = len(batches) // 2  # first the batches of typical length, as it is the first that are measured
        return batches[middle:] + batches[:middle]

    def loaded(self, rows: Any, batches: list[list[int]]) -> Iterable[dict[str, Any]]:
        """Collated batches.

        Args:
            rows: A prepared dataset.
            batches: Positions in it.
        """
        return torch.utils.data.DataLoader(
            rows, batch_sampler=batches, collate_fn=self.collator, num_workers=self.args.dataloader_num_workers
        )

    @contextmanager
    def running(self) -> Iterator[Callable[[Mapping[str, Any]], Tensor]]:
        """Within it the network is in eval mode, and the function runs it up to the cut, without gradient.

        The function takes a collated batch, and gives what crosses, (N, ...), on the device.
        """
        with self._running() as run:
            yield lambda batch: self._in_parts(run, self._placed(batch))

    @contextmanager
    def _running(self) -> Iterator[Callable[[Mapping[str, Any]], Tensor]]:
        autocast = nullcontext() if self.dtype is None else torch.autocast(self._device.type, self.dtype)
        layout = _channels_last(self.cut.model) if self._channels_last else nullcontext()
        with layout, self.cut.capturing() as capture, autocast:
            yield capture

    def _placed(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        inputs = {name: x.to(self._device) if torch.is_tensor(x) else x for name, x in model_inputs(batch).items()}
        if self._channels_last:
            for name, x in inputs.items():
                if torch.is_tensor(x) and x.dim() == 4:
                    inputs[name] = x.contiguous(memory_format=torch.channels_last)
        return inputs

    def _in_parts(self, run: Callable[[Mapping[str, Any]], Tensor], inputs: Mapping[str, Any]) -> Tensor:
        """Runs so many rows at a time that no module's output is too large."""
        rows = len(next(x for x in inputs.values() if torch.is_tensor(x)))
        each = self.cut.largest
        if self.cut.sizes[1] is not None:
            each = each * inputs["attention_mask"].shape[1] // self.cut.sizes[1]
        at_once = rows_at_once(self._device, each)
        if at_once >= rows or self._as_trained:
            return run(inputs)
        return torch.cat([run(part) for part in in_parts(inputs, at_once)])


@contextmanager
def _channels_last(model: nn.Module) -> Iterator[None]:
    """Convolutions' weights in channels-last order; afterwards the very tensors that were there before."""
    weights = [(parameter, parameter.data) for parameter in model.parameters() if parameter.dim() == 4]
    for parameter, data in weights:
        parameter.data = data.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for parameter, data in weights:
            parameter.data = data
