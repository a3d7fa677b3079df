"""The harness of all benchmarks here: arms that do equal work, taken in turn in one process.

    arms = {"plain": timed(train_plainly), "cached": timed(train_from_cache)}
    found = interleave(arms, label="probe", same=[Same("plain", "cached", 1e-3)])
    ratio(found.facts(), "plain", "cached")         # the median of the rounds' ratios with its 95 % interval

Every round runs every arm once, in an order drawn anew from a seed, after rounds that do not count and with Python's
garbage collected in between. A ratio is of two arms of one round, so that a machine that slows down slows both; the
figure is the median of the rounds' ratios (hf_transfer.evaluation.figure). CPU time is of the process and its finished
children, and disregards other work on the machine; wall time is kept beside it.

That the arms do equal work is checked by what they give back: numbers or tensors, which may differ by a stated
tolerance and no more. A measurement of unequal work raises UnequalWork, and is not written.
"""

import gc
import random
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hf_transfer.evaluation.figure import Figure

ROUNDS, WARM_UP, SEED = 7, 1, 0


class UnequalWork(RuntimeError):
    """Two arms that should give the same gave something else: their times cannot be compared."""


@dataclass(frozen=True)
class Clock:
    """Seconds of CPU time of the process and its finished children, and of wall time."""

    cpu: float
    wall: float

    @classmethod
    def now(cls) -> "Clock":
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return cls(time.process_time() + children.ru_utime + children.ru_stime, time.perf_counter())

    def since(self, start: "Clock") -> "Clock":
        return Clock(self.cpu - start.cpu, self.wall - start.wall)

    def plus(self, other: "Clock") -> "Clock":
        return Clock(self.cpu + other.cpu, self.wall + other.wall)


@dataclass(frozen=True)
class Outcome:
    """What an arm did in one round.

    Attributes:
        result: What is compared with the other rounds and arms: numbers, tensors, or mappings of them.
        clocks: The times it took, by name: "" is the arm itself, "setup" becomes "<arm> setup".
    """

    result: Any
    clocks: Mapping[str, Clock]


Arm = Callable[[], Outcome]


def timed(work: Callable[[], Any]) -> Arm:
    """An arm that is timed as a whole, and whose result is what it returns."""

    def arm() -> Outcome:
        start = Clock.now()
        result = work()
        return Outcome(result, {"": Clock.now().since(start)})

    return arm


@dataclass(frozen=True)
class Same:
    """Two arms whose results are to be equal.

    Attributes:
        one: An arm.
        other: Another.
        tolerance: The most by which they may differ, as the measurement's `distance` says.
    """

    one: str
    other: str
    tolerance: float


@dataclass(frozen=True)
class Measured:
    """What a measurement found.

    Attributes:
        cpu: Seconds of CPU time by arm (and part of it), one a round.
        wall: Of wall time.
        apart: How far results differ: between rounds of one arm ("rounds"), and between arms ("one, other").
        results: By arm, of its first round.
    """

    cpu: dict[str, list[float]] = field(default_factory=dict)
    wall: dict[str, list[float]] = field(default_factory=dict)
    apart: dict[str, float] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What of it is kept in a file."""
        return {"checks": self.apart, "cpu": self.cpu, "wall": self.wall}


def largest_difference(one: Any, other: Any) -> float:
    """The largest absolute difference between two results of the same shape; infinite where one is not a number."""
    if isinstance(one, Mapping):
        if one.keys() != other.keys():
            return float("inf")
        return max((largest_difference(value, other[name]) for name, value in one.items()), default=0.0)
    a, b = torch.as_tensor(one, dtype=torch.float64), torch.as_tensor(other, dtype=torch.float64)
    if a.shape != b.shape:
        return float("inf")
    found = float((a - b).abs().max()) if a.numel() else 0.0
    return found if found == found else float("inf")


def interleave(
    arms: Mapping[str, Arm],
    *,
    label: str,
    rounds: int = ROUNDS,
    warm_up: int = WARM_UP,
    seed: int = SEED,
    repeats: float = 0.0,
    same: Sequence[Same] = (),
    distance: Callable[[Any, Any], float] = largest_difference,
) -> Measured:
    """Times arms in turn.

    Args:
        arms: By name.
        label: What is measured, for messages.
        rounds: How often each arm runs; at least 6 for a 95 % interval.
        warm_up: Rounds before these that do not count.
        seed: Of the order of arms.
        repeats: The most by which an arm's results may differ from round to round.
        same: Which arms are to give the same.
        distance: Between two results.

    Raises:
        UnequalWork: If results differ by more than they may.
    """
    order, names = random.Random(seed), list(arms)
    found = Measured(apart={"rounds": 0.0})
    for i in range(-warm_up, rounds):
        told = []
        for name in order.sample(names, len(names)):
            gc.collect()
            outcome = arms[name]()
            _compare_rounds(found, name, outcome.result, repeats, distance, label)
            if i >= 0:
                _keep(found, name, outcome.clocks)
            told.append(
                f"{name} {max(clock.cpu for clock in outcome.clocks.values()):.2f}"
            )  # the whole, not its parts
        if i <= -warm_up:  # once, as early as can be
            _compare_arms(found, same, distance, label)
        print(f"{label}: round {i + 1} of {rounds}: {', '.join(sorted(told))} s of CPU", file=sys.stderr, flush=True)
    return replace(found, cpu=_in_order(found.cpu, names), wall=_in_order(found.wall, names))


def _in_order(seconds: Mapping[str, list[float]], arms: Sequence[str]) -> dict[str, list[float]]:
    """By arm as they were given, rather than as they first ran."""
    return {name: seconds[name] for arm in arms for name in seconds if name == arm or name.startswith(f"{arm} ")}


def _keep(found: Measured, arm: str, clocks: Mapping[str, Clock]) -> None:
    for part, clock in clocks.items():
        name = f"{arm} {part}".strip()
        found.cpu.setdefault(name, []).append(round(clock.cpu, 5))
        found.wall.setdefault(name, []).append(round(clock.wall, 5))


def _compare_rounds(
    found: Measured, arm: str, result: Any, tolerance: float, distance: Callable[[Any, Any], float], label: str
) -> None:
    apart = distance(result, found.results.setdefault(arm, result))
    found.apart["rounds"] = max(found.apart["rounds"], apart)
    if not apart <= tolerance:
        raise UnequalWork(f"{label}: rounds of {arm} end {apart:.3g} apart, and may {tolerance:g}.")


def _compare_arms(found: Measured, same: Sequence[Same], distance: Callable[[Any, Any], float], label: str) -> None:
    for pair in same:
        apart = distance(found.results[pair.one], found.results[pair.other])
        found.apart[f"{pair.one}, {pair.other}"] = apart
        if not apart <= pair.tolerance:
            raise UnequalWork(
                f"{label}: {pair.one} and {pair.other} end {apart:.3g} apart, and may {pair.tolerance:g}."
            )


def each_round(found: Mapping[str, Any], kind: str = "cpu") -> list[dict[str, float]]:
    """A case's seconds, round by round and by name.

    Args:
        found: `Measured.facts()`, as it was or read from a file.
        kind: "cpu" or "wall".
    """
    seconds = found[kind]
    return [dict(zip(seconds, values, strict=True)) for values in zip(*seconds.values(), strict=True)]


def ratio(found: Mapping[str, Any], over: str, under: str, kind: str = "cpu") -> Figure:
    """The seconds of one name over those of another.

    Args:
        found: `Measured.facts()`, as it was or read from a file.
        over: An arm, or "<arm> <part>".
        under: Another.
        kind: "cpu" or "wall".
    """
    return Figure.of(each[over] / each[under] for each in each_round(found, kind))
