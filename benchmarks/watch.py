"""A callback that takes the time of a Trainer's epochs, and of what train() did before them."""

from typing import Any

import transformers
from paired import Clock


class Watch(transformers.TrainerCallback):
    """Made right before train() is called.

    Attributes:
        setup: From its making to the start of the first epoch.
        epochs: From there to the end of the last.
    """

    setup: Clock
    epochs: Clock

    def __init__(self) -> None:
        self.start = Clock.now()

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        if "setup" not in vars(self):
            self.begin = Clock.now()
            self.setup = self.begin.since(self.start)

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.epochs = Clock.now().since(self.begin)
