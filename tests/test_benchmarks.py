"""docs/benchmarks.md shows what the benchmarks measured, and the figures are the ones to reach."""

from __future__ import annotations

from statistics import mean
from typing import Any

import accuracy
import pytest
import report


@pytest.fixture
def measured() -> dict[str, Any]:
    found = accuracy.measured()
    if not found:
        pytest.skip(f"{accuracy.RESULTS.name} was not written; make bench")
    return found


def test_the_page_is_what_was_measured() -> None:
    """Mended by python benchmarks/report.py."""
    assert report.PAGE.read_text() == report.page()


def score(measured: dict[str, Any], name: str) -> float:
    if name not in measured:
        pytest.skip(f"{name} was not measured; python benchmarks/accuracy.py {name}")
    return 100 * mean(measured[name]["scores"])


@pytest.mark.parametrize(
    ("name", "least"), [("cifar_full", 74), ("cifar_probe", 65), ("sst2_full", 87), ("banking_full", 90)]
)
def test_the_figure_is_reached(measured: dict[str, Any], name: str, least: float) -> None:
    assert score(measured, name) >= least


@pytest.mark.parametrize(
    ("better", "worse", "by"),
    [
        ("cifar_full", "cifar_scratch", 40), ("cifar_partial", "cifar_probe", 0), ("cifar_lora", "cifar_probe", 0),
        ("sst2_lora", "sst2_full", -2), ("wnut_full", "wnut_probe", 0), ("xray_full", "xray_probe", 0),
        ("speech_full", "speech_probe", 0), ("kd_cifar_soft", "kd_cifar_labels", 3),
        ("kd_cifar_hint", "kd_cifar_soft", 0),
        ("kd_sst2_bilstm", "kd_sst2_bilstm_labels", 0),
    ],
)  # fmt: skip
def test_one_way_beats_another(measured: dict[str, Any], better: str, worse: str, by: float) -> None:
    assert score(measured, better) >= score(measured, worse) + by


@pytest.mark.parametrize(
    ("student", "other", "share"),
    [("kd_sst2_carve", "sst2_full", 0.97), ("kd_sst2_bilstm", "sst2_full", 0.9)],
)
def test_a_student_keeps_this_share_of_its_teacher(
    measured: dict[str, Any], student: str, other: str, share: float
) -> None:
    assert score(measured, student) >= share * score(measured, other)


def test_lora_on_text_trains_few_parameters(measured: dict[str, Any]) -> None:
    score(measured, "sst2_lora")
    run = measured["sst2_lora"]["runs"][0]
    assert run["trainable_parameters"] / run["total_parameters"] < 0.03


def test_domain_adversarial_training_beats_the_source_alone(measured: dict[str, Any]) -> None:
    found = measured["adapt"]["scores"]
    assert len(found["DANN"]) == 3 and mean(found["DANN"]) > mean(found["source only"])
