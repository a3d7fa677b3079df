"""Random augmentation that can be replayed: a function of (seed, epoch, example_id) and of nothing else.

Libraries of augmentations draw from the global generators of `random`, numpy and torch. Here they are lent those for
the length of a call, seeded by the example, and the states are put back: what an example becomes does not depend on
the worker or process that loads it, nor on how much randomness was used before, and the model's dropout is not moved.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_MASK = (1 << 64) - 1


class EpochCounter:
    """The epoch as every worker process sees it: one integer in shared memory.

    Persistent workers hold copies of the dataset, made when they started; they see `set` because this is not copied.
    """

    def __init__(self) -> None:
        self._value = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def value(self) -> int:
        """The current epoch, counted from 0."""
        return int(self._value)

    def set(self, epoch: int) -> None:
        """Moves to an epoch, in this process and in every worker."""
        self._value[0] = epoch

    def __deepcopy__(self, memo: dict[int, Any]) -> EpochCounter:
        return self  # datasets deep-copies its transform in select(), shuffle() and the like: one counter serves all


class Replayable:
    """A transform of a dataset that may draw randomness by epoch; the base by which the trainer finds ours."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.epoch = EpochCounter()

    @property
    def random(self) -> bool:
        """Whether what it makes of a row depends on the epoch."""
        return True


def dataset_epoch(dataset: Any) -> EpochCounter | None:
    """The epoch counter of a prepared dataset, or of a torch Subset of one.

    Args:
        dataset: What `transforms.prepare` returned, also after select() or shuffle(); anything else has no counter.

    Returns:
        The counter to `set` at the start of each epoch; None if there is none.
    """
    transform = _transform_of(dataset)
    return None if transform is None else transform.epoch


def is_random(dataset: Any) -> bool:
    """Whether the rows of a prepared dataset differ from epoch to epoch, as they do under random augmentation."""
    transform = _transform_of(dataset)
    return transform is not None and transform.random


def _transform_of(dataset: Any) -> Replayable | None:
    from datasets import Dataset

    while isinstance(dataset, torch.utils.data.Subset):
        dataset = dataset.dataset
    if isinstance(dataset, Dataset):
        dataset = dataset.format["format_kwargs"].get("transform")
    return dataset if isinstance(dataset, Replayable) else None


def key(*parts: int) -> int:
    """One 64-bit seed from several integers, all of whose bits matter (splitmix64, Steele et al. 2014)."""
    state = 0
    for part in parts:
        state = (state + (part & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def seed_all(*parts: int) -> None:
    """Seeds the three global generators of the CPU by several integers; only inside `borrowed_generators`."""
    seed = key(*parts)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


@contextmanager
def borrowed_generators() -> Iterator[None]:
    """Puts the states of `random`, numpy and torch's CPU generator back on exit."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
