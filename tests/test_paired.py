"""benchmarks/paired.py and results.py: what is timed, what is compared, what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import paired
import pytest
import torch
from paired import Clock, Outcome, Same, UnequalWork, interleave, largest_difference, ratio, timed
from results import Judged, load, markdown, measured_on, save

from hf_transfer.evaluation.figure import Figure


def arms(calls: list[str], **results: Any) -> dict[str, paired.Arm]:
    """Arms that note their calls, and whose n-th call takes n seconds."""

    def arm(name: str) -> paired.Arm:
        def run() -> Outcome:
            calls.append(name)
            seconds = calls.count(name)
            return Outcome(results[name], {"": Clock(seconds, 2 * seconds), "setup": Clock(1, 1)})

        return run

    return {name: arm(name) for name in results}


@pytest.fixture(autouse=True)
def collected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A note for each collection of garbage, which takes its time in a process as large as this."""
    notes: list[int] = []
    monkeypatch.setattr(paired.gc, "collect", lambda: notes.append(1))
    return notes


def test_every_arm_runs_once_a_round_in_an_order_of_the_seed(collected: list[int]) -> None:
    orders = []
    for seed in (0, 0, 1):
        calls: list[str] = []
        found = interleave(arms(calls, a=1, b=1, c=1), label="x", rounds=5, warm_up=2, seed=seed)
        by_round = [calls[i : i + 3] for i in range(0, len(calls), 3)]
        assert len(by_round) == 7 and all(sorted(each) == ["a", "b", "c"] for each in by_round)
        assert len({tuple(each) for each in by_round}) > 1
        assert found.cpu["a"] == [3, 4, 5, 6, 7]  # those of the warm-up are left out
        assert found.wall["b"] == [6, 8, 10, 12, 14] and found.cpu["c setup"] == [1] * 5
        assert list(found.cpu) == list(found.wall) == ["a", "a setup", "b", "b setup", "c", "c setup"]
        orders.append(calls)
    assert orders[0] == orders[1] != orders[2]
    assert len(collected) == sum(map(len, orders))  # before each arm


def test_a_figure_is_of_the_rounds_ratios() -> None:
    found = {"cpu": {"a": [2.0, 40.0, 4.0], "b": [1.0, 10.0, 1.0]}}  # the second round was slow for both
    assert ratio(found, "a", "b") == Figure(4.0, 2.0, 4.0)


def test_unequal_arms_are_refused_in_the_first_round() -> None:
    calls: list[str] = []
    with pytest.raises(UnequalWork, match=r"x: a and b end 0\.5 apart, and may 0\.1"):
        interleave(arms(calls, a=1.0, b=1.5), label="x", same=[Same("a", "b", 0.1)])
    assert len(calls) == 2
    found = interleave(arms(calls, a=1.0, b=1.5), label="x", same=[Same("a", "b", 0.6)])
    assert found.apart == {"rounds": 0.0, "a, b": 0.5}


def test_without_a_warm_up_arms_are_compared_too() -> None:
    with pytest.raises(UnequalWork):
        interleave(arms([], a=1.0, b=1.5), label="x", rounds=1, warm_up=0, same=[Same("a", "b", 0.1)])


def test_an_arm_that_gives_something_else_in_another_round_is_refused() -> None:
    counter = iter(range(100))
    with pytest.raises(UnequalWork, match="rounds of a end 1 apart, and may 0"):
        interleave({"a": timed(lambda: next(counter))}, label="x")


def test_results_differ_by_their_largest_part() -> None:
    one = {"logits": torch.tensor([1.0, 2.0]), "accuracy": 0.5}
    assert largest_difference(one, {"logits": torch.tensor([1.0, 2.25]), "accuracy": 0.5}) == 0.25
    assert largest_difference(one, {"logits": torch.tensor([1.0]), "accuracy": 0.5}) == float("inf")
    assert largest_difference(one, {"accuracy": 0.5}) == float("inf")
    assert largest_difference(float("nan"), float("nan")) == float("inf")


def test_an_arm_is_timed_with_its_children() -> None:
    import subprocess
    import sys

    code = "sum(i * i for i in range(2_000_000))"
    outcome = timed(lambda: subprocess.run([sys.executable, "-c", code], check=True).returncode)()
    assert outcome.clocks[""].cpu > 0.01 and outcome.result == 0


def test_cases_stand_beside_each_other_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert load(path) == {}
    save(path, "a", {"label": "A"})
    save(path, "b", {"label": "B"})
    save(path, "a", {"label": "A2"})
    cases = load(path)
    assert [case["label"] for case in cases.values()] == ["A2", "B"]
    assert cases["a"]["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert measured_on(cases.values()).count("thread(s) of") == 1  # both were measured on the same


def test_a_table() -> None:
    assert markdown(["a", "b"], [[1, Figure(1.0, 1.0, 1.0)]]) == [
        "| a | b |",
        "|---|---|",
        "| 1 | 1.00 [1.00, 1.00] |",
    ]


@pytest.mark.parametrize(
    ("sense", "target", "reached"),
    [("<=", 3.0, "yes"), ("<=", 2.5, "by the median"), ("<=", 1.9, "no"),
     (">=", 1.0, "yes"), (">=", 1.5, "by the median"), (">=", 2.1, "no")],
)  # fmt: skip
def test_a_target_is_reached_by_the_worse_end_of_the_interval(sense: Any, target: float, reached: str) -> None:
    assert Judged("job", "against", sense, target, Figure(2.0, 1.0, 3.0)).reached == reached
