"""benchmarks/trainer_cost.py: its arms do equal work, on small inputs, and so did those whose figures it wrote."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "trainer_cost.py"


@pytest.fixture(scope="module")
def cost() -> Any:
    spec = importlib.util.spec_from_file_location("trainer_cost", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["trainer_cost"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_bare_loop_ends_with_the_same_weights_bit_for_bit(cost: Any, tmp_path: Path) -> None:
    found = cost.measure(cost.resnet(32, 4, 3, str(tmp_path)), 3)
    assert found["apart"] == 0 and len(found["cpu"]["bare"]) == 3
    value, low, high = cost.ratios(found)
    assert low <= value <= high


def test_a_bare_evaluation_finds_the_same_metrics(cost: Any, tmp_path: Path) -> None:
    found = cost.measure(cost.evaluation(300, 64, str(tmp_path), classes=12), 3)
    assert found["apart"] <= 1e-6


def test_unequal_work_is_no_measurement(cost: Any, tmp_path: Path) -> None:
    case = cost.evaluation(300, 64, str(tmp_path), classes=12)
    other = cost.evaluation(200, 64, str(tmp_path), classes=12)
    mixed = cost.Case(case.label, case.target, 300, {"trainer": case.arms["trainer"], "bare": other.arms["bare"]})
    with pytest.raises(SystemExit, match="the arms end"):
        cost.measure(mixed, 3)


def test_what_was_written_was_of_equal_work(cost: Any) -> None:
    if not cost.RESULTS.is_file():
        pytest.skip(f"{cost.RESULTS.name} was not written; python benchmarks/trainer_cost.py")
    measured = json.loads(cost.RESULTS.read_text())
    for name, found in measured["cases"].items():
        assert found["apart"] <= (1e-6 if name == "evaluation" else 0), name
    assert len(cost.table()) > 8
