"""What student and teacher cost: parameters, multiply-accumulates, and how their times compare.

macs(student, batch) / macs(teacher, batch)
latency_ratio(student, batch, teacher, batch)          # LatencyRatio(ratio=0.21, low=0.20, high=0.22)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import TransferError
from ..evaluation.figure import MIN_VALUES, Figure
from ..objective import model_inputs

Inputs = Tensor | Mapping[str, Any]
WARM_UP = 3


class LatencyRatio(NamedTuple):
    """The student's time over the teacher's, and an interval that holds its median in at least 95 % of cases."""

    ratio: float
    low: float
    high: float


def parameters(model: nn.Module) -> int:
    """How many numbers the model's parameters hold; shared ones count once."""
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, inputs: Inputs) -> int:
    """Multiply-accumulates of one forward pass over all rows of `inputs`.

    Those of matrix products, convolutions, attention and recurrent layers, as PyTorch's FlopCounterMode counts them;
    look-ups, norms and activations are not counted, nor are kernels of other libraries. Causal attention counts whole.
    The model runs once, in eval mode and without gradients; afterwards its modes are what they were.

    Args:
        model: The network, not compiled.
        inputs: What it takes: a tensor, or a collated batch, of which `objective.model_inputs` are used.

    Returns:
        Half of the floating-point operations. Divide by the rows for the cost of one.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with _inference(model), _countable_kernels(), counter:
        _call(model, inputs)
    return counter.get_total_flops() // 2


def latency_ratio(
    student: nn.Module, student_inputs: Inputs, teacher: nn.Module, teacher_inputs: Inputs, *, rounds: int = 20
) -> LatencyRatio:
    """How long the student's forward pass takes, in units of the teacher's.

    Both run once a round, each first in turn, so that a machine that slows down slows both; the ratio is the median
    of the rounds' ratios, and the interval is that of the median by its order statistics. Both run in eval mode and
    without gradients, after three rounds that do not count; afterwards their modes are what they were.

    Args:
        student: The student, on the device where it shall be measured.
        student_inputs: A tensor or a collated batch on that device.
        teacher: The teacher.
        teacher_inputs: Its inputs, with as many rows.
        rounds: How many pairs are timed, >= 6.

    Returns:
        The ratio, below 1 where the student is faster, with the ends of its interval.

    Raises:
        TransferError: `rounds` < 6, which give no 95 % interval.
    """
    if rounds < MIN_VALUES:
        raise TransferError(f"rounds={rounds} is not valid: an interval needs at least {MIN_VALUES}, better 20.")
    with _inference(student), _inference(teacher):
        runs = [(student, student_inputs), (teacher, teacher_inputs)]
        ratios = []
        for i in range(-WARM_UP, rounds):
            order = (0, 1) if i % 2 == 0 else (1, 0)
            seconds = {which: _seconds(*runs[which]) for which in order}
            if i >= 0:
                ratios.append(seconds[0] / seconds[1])
    return LatencyRatio(*Figure.of(ratios))


def _seconds(model: nn.Module, inputs: Inputs) -> float:
    """Time of one forward pass, its work on an accelerator included."""
    tensors = [inputs] if torch.is_tensor(inputs) else list(inputs.values())
    devices = {x.device for x in tensors if torch.is_tensor(x) and x.device.type != "cpu"}
    for device in devices:
        torch.accelerator.synchronize(device)
    start = perf_counter()
    _call(model, inputs)
    for device in devices:
        torch.accelerator.synchronize(device)
    return perf_counter() - start


def _call(model: nn.Module, inputs: Inputs) -> Any:
    return model(inputs) if torch.is_tensor(inputs) else model(**model_inputs(inputs))


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; each module's own mode comes back."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _countable_kernels() -> Iterator[None]:
    """Only kernels that FlopCounterMode knows.

    torch 2.15 counts 0 for oneDNN's (and cuDNN's) recurrent layers and for the fast path of torch.nn's own
    transformer layers, older ones also for scaled_dot_product_attention on a CPU. Delete when
    tests/distillation/test_costs.py passes without it on the oldest torch that is supported.
    """
    attention, mha = torch.nn.attention, torch.backends.mha
    backends: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    enabled, fast_path = [backend.enabled for backend in backends], mha.get_fastpath_enabled()
    try:
        for backend in backends:
            backend.enabled = False
        mha.set_fastpath_enabled(False)
        with attention.sdpa_kernel(attention.SDPBackend.MATH):
            yield
    finally:
        for backend, before in zip(backends, enabled, strict=True):
            backend.enabled = before
        mha.set_fastpath_enabled(fast_path)
