"""What a training step asks of every module and parameter of a network, found once a training and not at every step.

`model.train()`, `model.zero_grad()` and `model.parameters()` each walk the whole tree of modules: a millisecond a step
for a twelve-layer network, and more than the step itself for the head of a cached one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .freezing import held_in_eval


class Traversals:
    """The modules and parameters of a network that training touches at every step.

    Args:
        model: The network that is trained, with whatever wraps it. Modules and `requires_grad` are as they are now.

    Attributes:
        parameters: Those that train, in the order of `model.parameters()`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        held = held_in_eval(model)  # their own hooks say in which mode these run
        self._modes = [module for module in model.modules() if module not in held]

    def train(self) -> None:
        """As `model.train()`, which walks the network only if one of its modules is in eval mode."""
        for module in self._modes:
            if not module.training:
                self.model.train()
                return

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """As `torch.nn.utils.clip_grad_norm_`, which on a CPU multiplies by 1 too.

        Args:
            max_norm: > 0; may be infinite.

        Returns:
            The norm that the gradients had, 0-d.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients or gradients[0].device.type != "cpu":
            return nn.utils.clip_grad_norm_(self.parameters, max_norm)
        with torch.no_grad():
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in gradients]))
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            if factor.item() != 1:  # a NaN too
                for gradient in gradients:
                    gradient.mul_(factor)
        return norm
