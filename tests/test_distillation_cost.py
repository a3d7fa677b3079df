"""benchmarks/distillation_cost.py: what it computes, a run on tiny inputs, and the figures that it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import command
import distillation_cost as cost
import pytest
import results
import tiny_runs as tiny
import torch

from hf_transfer import load_backbone, load_data
from hf_transfer.data.transforms import prepare

CLASSES = ["0", "1", "2"]


@pytest.fixture
def measured() -> dict[str, Any]:
    if not cost.RESULTS.is_file():
        pytest.skip(f"{cost.RESULTS.name} was not written; python benchmarks/distillation_cost.py")
    return results.load(cost.RESULTS)


def test_a_round_on_tiny_inputs(tmp_path: Path) -> None:
    def case() -> Any:
        data = load_data(tiny.digits(train=30, classes=CLASSES), seed=0)
        networks = []
        for seed in range(2):
            torch.manual_seed(seed)
            networks.append(load_backbone("test_resnet", labels=CLASSES, pretrained=False, image_size=32, in_chans=1))
        rows = prepare(data.splits["train"], networks[0], data.columns, train=True)
        return cost.Case("tiny", *networks, rows.select(range(20)), 10)

    path = tmp_path / "cost.json"
    command.run({"tiny": case}, cost.measure, 1, path)
    found = results.load(path)["tiny"]
    assert found["steps"] == 2 and all(len(values) == 1 and values[0] > 0 for values in found["cpu"].values())
    assert found["checks"]["silent teacher, plain"] == found["checks"]["rounds"] == 0
    assert sum(line.startswith("| tiny |") for line in cost.table(path)) == len(cost.ROWS)


def test_a_case_without_its_data_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "SHARED", tmp_path / "nowhere")
    command.run({"image": cost.image}, cost.measure, 1, tmp_path / "cost.json")
    assert "image: skipped, it needs" in capsys.readouterr().err
    assert cost.table(tmp_path / "cost.json") == []


def test_a_live_teacher_is_compared_with_the_floor_of_its_round() -> None:
    seconds = {
        "plain": [2.0, 4.0], "cached": [2.0, 4.0], "stock": [2.0, 4.0], "live": [4.0, 8.0],
        "forward teacher": [3.0, 6.0], "forward student": [1.0, 2.0],
    }  # fmt: skip
    found = cost.figures({"cpu": seconds})
    assert found["floor"].value == 2.0 and found["live / plain / floor"].value == 1.0


@pytest.mark.parametrize("case", ["image", "text"])
def test_a_warm_cache_costs_nearly_nothing(measured: dict[str, Any], case: str) -> None:
    found = cost.figures(measured[case])
    assert found["cached / plain"].high <= 1.10 and found["cached / stock"].high <= 1.10


@pytest.mark.parametrize("case", ["image", "text"])
def test_a_live_teacher_costs_its_forward_pass(measured: dict[str, Any], case: str) -> None:
    assert cost.figures(measured[case])["live / plain / floor"].value <= 1.10
