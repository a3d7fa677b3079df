"""What a network's modules do in one forward pass in training mode: who calls whom, with what, and what is frozen.

Names do not tell where a network can be cut (a pooling layer has no parameters, a block may be called through a
container or past it); a recorded pass does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(eq=False)
class Call:
    """One call of a module.

    Attributes:
        name: The module's path.
        module: The module.
        index: Its place in the order in which calls began.
        parent: The call that it was made in; None for the network itself.
        given: Its argument, where that is one tensor and nothing else.
        first: Its first argument that is a tensor.
        output: What it returned.
        training: Whether it ran in training mode.
        children: The calls it made.
    """

    name: str
    module: nn.Module
    index: int
    parent: Call | None
    given: Tensor | None
    first: Tensor | None
    output: Any = None
    training: bool = False
    children: list[Call] = field(default_factory=list)

    @cached_property
    def frozen(self) -> bool:
        """Whether it gives the same at every call: nothing in it trains, is drawn at random, or keeps statistics."""
        if any(parameter.requires_grad for parameter in self.module.parameters()):
            return False
        if self.training and (is_random(self.module) or isinstance(self.module, _BatchNorm)):
            return False
        # what holds parameters may read its own mode, as attention does for its dropout
        if self.training and any(True for _ in self.module.parameters()):
            return False
        return all(child.frozen for child in self.children)

    def ancestors(self) -> list[Call]:
        """The calls around this one, innermost first."""
        return [] if self.parent is None else [self.parent, *self.parent.ancestors()]

    def inside(self) -> Iterator[Call]:
        """This call and all in it, in the order in which they began."""
        yield self
        for child in self.children:
            yield from child.inside()


def is_random(module: nn.Module) -> bool:
    """Whether a module drops something at random in training mode: dropout, drop path and their like."""
    rates = [getattr(module, name, 0.0) for name in ("p", "drop_prob", "prob")]
    return "drop" in type(module).__name__.lower() and any(rate is None or rate > 0 for rate in rates)


def trace(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Call, Any]:
    """Records one forward pass; the modes of the modules are the caller's to set.

    Args:
        model: The network.
        inputs: By name.

    Returns:
        The call of the network itself, which holds all others, and what it returned.
    """
    calls: list[Call] = []
    stack: list[Call] = []
    names = {module: name for name, module in model.named_modules()}

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
        given = args[0] if len(args) == 1 and not kwargs and torch.is_tensor(args[0]) else None
        call = Call(
            names[module], module, len(calls), stack[-1] if stack else None, given, tensors[0] if tensors else None
        )
        if stack:
            stack[-1].children.append(call)
        calls.append(call)
        stack.append(call)

    def end(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        call = stack.pop()
        call.output, call.training = output, module.training

    handles: list[Any] = []
    try:
        for module in names:
            handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            handles.append(module.register_forward_hook(end, with_kwargs=True))
        output = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls[0], output


@contextmanager
def mode_of(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The network in training or evaluation mode; each module's own mode and every buffer come back."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def only_tensor(output: Any) -> Tensor | None:
    """The tensor in what a module returned, where it is that or a tuple that holds no other."""
    if torch.is_tensor(output):
        return output
    if isinstance(output, (tuple, list)) and not hasattr(output, "_fields"):
        tensors = [item for item in output if item is not None]
        if len(tensors) == 1 and torch.is_tensor(tensors[0]):
            return tensors[0]
    return None
