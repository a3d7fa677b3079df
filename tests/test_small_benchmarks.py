"""The benchmarks of speed on inputs so small that they take seconds, and the arithmetic of their figures."""

from __future__ import annotations

import copy
import mmap
import sys
from pathlib import Path
from typing import Any

import accelerator
import command
import cost_curves
import datasets
import evaluation_cost
import frozen_arms
import frozen_training
import import_time
import input_pipeline
import memory
import memory_formats
import paired
import peers
import pytest
import results
import tiny_runs as tiny
import torch
import trainer_cost
from paired import UnequalWork

from hf_transfer import load_backbone, load_data
from hf_transfer.tuning import FullFineTune, LinearProbe, PartialFreeze, Tuning

CLASSES = ["0", "1", "2"]
on_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc/self")


@pytest.fixture(autouse=True)
def no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting garbage takes its time in a process as large as this."""
    monkeypatch.setattr(paired.gc, "collect", lambda *generation: 0)


# ---- frozen layers ------------------------------------------------------------------------------------------------


def images(tuning: Tuning, **options: Any) -> frozen_training.Case:
    data = load_data(tiny.digits(train=30, test=20, classes=CLASSES), seed=0)
    torch.manual_seed(0)
    backbone = load_backbone("test_resnet", labels=CLASSES, pretrained=False, image_size=32)
    return frozen_training._case("digits", backbone, data, tuning, 20, batch_size=10, optim="sgd", **options)


def texts(folder: Path, tuning: Tuning, **options: Any) -> frozen_training.Case:
    data = load_data(tiny.sentences(20))
    torch.manual_seed(0)
    backbone = load_backbone(tiny.text_backbone(folder), labels=list(tiny.LABELS))
    return frozen_training._case("texts", backbone, data, tuning, 20, batch_size=10, **options)


def test_frozen_image_layers(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    case = images(PartialFreeze(1), epochs=(2,), plain_epochs=1, targets=(3.0,))
    command.run({"x": lambda: case}, frozen_training.measure, 1, path)
    found = results.load(path)["x"]
    assert found["checks"]["plain, cached"] <= frozen_training.EQUAL
    assert found["rows"] == 20 and set(found["accuracy"]) == {"plain", "cached 2"}
    assert any("2 (from 1) | plain Trainer |" in line for line in frozen_training.table(path))
    assert [line.target for line in frozen_training.judged(path)] == [3.0]


def test_frozen_text_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_arms, "PADDED", 16)  # the tiny network knows 24 positions
    case = texts(tmp_path / "model", LinearProbe(), epochs=(1, 2), plain_epochs=1, targets=(10.0, 50.0))
    found = frozen_training.measure(case, 1)
    assert {"plain", "plain, short", "cached 1", "cached 2"} <= set(found["cpu"])
    assert {"plain, cached 1", "plain, short, cached 1"} <= set(found["checks"])  # compared after the epochs timed
    assert datasets.is_caching_enabled()


def test_frozen_layers_that_were_not_frozen_are_noticed() -> None:
    """The plain arm trains everything, the cached one the head."""
    case = images(LinearProbe(), epochs=(1,), plain_epochs=1, targets=(1.0,), learning_rate=0.1)
    held_out = frozen_arms.HeldOut(case)
    whole = images(FullFineTune(), epochs=(1,), plain_epochs=1, targets=(1.0,), learning_rate=0.1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UnequalWork, match="plain and cached end"):
        patch.setattr(frozen_training, "plain", lambda _, *rest: frozen_arms.plain(whole, *rest))
        frozen_training.compare(case, 1, held_out)


def test_the_plain_arm_is_lengthened_by_its_own_epochs() -> None:
    seconds = {"plain": [5.0], "plain epochs": [4.0], "cached 10": [3.0], "cached 20": [4.5]}
    found = {"plain_epochs": 10, "cpu": seconds}
    assert frozen_training.speedups(found, 10)["plain"].value == 5 / 3
    assert frozen_training.speedups(found, 20)["plain"].value == (5 + 4) / 4.5


# ---- evaluation, import -------------------------------------------------------------------------------------------


@on_linux
def test_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    case = evaluation_cost.Case(rows=200, classes=20, batch_size=32, growth=(50, 100), stock_growth=(50,))
    command.run({"x": lambda: case}, evaluation_cost.measure, 1, path)
    found = results.load(path)["x"]
    assert max(found["checks"].values()) <= evaluation_cost.EQUAL
    assert set(found["peak_mib"]["ours"]) == {"50", "100"}
    assert len(evaluation_cost.judged(path)) == 1 and evaluation_cost.table(path)


def test_the_metrics_that_are_compared_are_not_trivial() -> None:
    torch.manual_seed(0)
    layer = evaluation_cost.Layer(20)
    found = evaluation_cost.bare(layer, evaluation_cost.Rows(100, layer), 20, 32)
    assert 0.1 < found["accuracy"] < found["top5_accuracy"] < 1


@on_linux
def test_the_peak_of_memory_is_what_a_work_holds_at_once() -> None:
    def work() -> None:
        for _ in range(3):
            # Asked of the system, not of the C library: that one places two tensors in turn in two holes of its
            # heap, where earlier tests have left some, and keeps both (seen in a whole run: 64 MiB for 32)
            with mmap.mmap(-1, 2**25) as block:
                block[:: mmap.PAGESIZE] = bytes(2**25 // mmap.PAGESIZE)  # every page is touched

    assert memory.peak(work) == pytest.approx(32, abs=4)


def test_import(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    modules = {"hf_transfer": "json", "transformers": "decimal", "torch": "decimal", "python": "sys"}
    command.run({"import": lambda: modules}, import_time.measure, 1, path)
    assert len(import_time.judged(path)) == 2 and import_time.table(path)


def test_distillation_beside_timm(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    networks = ("test_resnet", "test_resnet")
    command.run(
        {"x": lambda: peers.distillation(rows=8, size=32, batch_size=4, networks=networks)}, peers.measure, 1, path
    )
    found = results.load(path)["x"]
    assert found["checks"]["timm, ours"] <= 1e-5 and "timm" in found["peers"]
    assert any("| timm " in line for line in peers.table(path))


@pytest.mark.parametrize(("case", "needed"), [("embeddings", "sentence_transformers"), ("classifier", "setfit")])
def test_a_peer_that_is_not_installed_is_left_out(
    case: str, needed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, needed, None)  # as if it were not installed
    command.run({case: peers.CASES[case]}, peers.measure, 1, tmp_path / "x.json")
    assert f"{case}: skipped, import of {needed}" in capsys.readouterr().err
    assert peers.table(tmp_path / "x.json") == []


# ---- curves, GPU --------------------------------------------------------------------------------------------------


@on_linux
def test_a_curve(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    tiny_one: dict[str, Any] = {"classes": 3, "batch_size": 4, "tuning": LinearProbe()}
    points = {n: cost_curves.Training(rows=4 * n, views=n, epochs=n, **tiny_one) for n in (1, 2)}
    command.run({"x": lambda: cost_curves.Curve("views", "tiny", points)}, cost_curves.measure, 1, path)
    found = results.load(path)["x"]
    assert set(found["peak_mib"]) == {"1", "2"} and "2 epochs" in found["cpu"]
    assert any(line.startswith("| views: 1, 2 | tiny |") for line in cost_curves.table(path))


@pytest.mark.slow
def test_a_curve_of_processes() -> None:
    points = {n: cost_curves.Training(rows=16, batch_size=8, processes=n) for n in (1, 2)}
    found = cost_curves.measure(cost_curves.Curve("processes", "tiny", points, part=""), 1)
    assert found["by"] == "wall" and len(found["wall"]["2"]) == 1


def test_the_exponent_is_that_of_a_power() -> None:
    sizes = [1, 2, 8]
    found = {"by": "cpu", "sizes": sizes, "part": "epochs", "cpu": {f"{n} epochs": [3.0 * n**1.5] for n in sizes}}
    assert cost_curves.exponent(found).value == pytest.approx(1.5)


GPU_CASES = {
    "fine-tuning": lambda setting: accelerator.fine_tuning("test_resnet", "tiny", setting, 3),
    "distillation": lambda setting: accelerator.distillation(("test_resnet", "test_resnet"), "tiny", setting, 3),
    "head": lambda setting: accelerator.cached_head("test_resnet", "tiny", setting, 3),
}


@pytest.mark.parametrize("name", GPU_CASES)
def test_the_gpu_s_cases_on_a_cpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "GRAPH", {"torch_compile": True, "torch_compile_backend": "eager"})  # in seconds
    path, setting = tmp_path / "x.json", accelerator.Setting(32, 4, 2, device="cpu", precise=True)
    command.run({"x": lambda: GPU_CASES[name](setting)}, accelerator.measure, 1, path)
    found = results.load(path)["x"]
    assert set(found["wall"]) == ({"ours", "graph", "bare"} if name == "head" else {"ours", "bare"})
    assert all(len(seconds) == 1 for seconds in found["wall"].values())
    assert found["macs_a_row"] is None if name == "head" else found["macs_a_row"] > 1e5
    assert accelerator.share(found, "ours") is None and len(accelerator.table(path)) > 8


def test_the_bare_loop_of_the_gpu_distils(monkeypatch: pytest.MonkeyPatch) -> None:
    """As DistillationTrainer does: the same weights in the end."""
    setting, kept = accelerator.Setting(32, 4, 2, device="cpu", precise=True), []
    case = accelerator.distillation(("test_resnet", "test_resnet"), "tiny", setting, 3)
    monkeypatch.setattr(accelerator, "deepcopy", lambda model: kept.append(copy.deepcopy(model)) or kept[-1])
    for arm in case.arms.values():
        arm(1)
    students = [model for model in kept if model.training]
    assert len(kept) == 4 and len(students) == 2
    for one, other in zip(students[0].parameters(), students[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_the_share_of_the_matrix_rate() -> None:
    wall = {"ours": [2.0]}
    found = {"device": "NVIDIA H200", "steps": 10, "batch_size": 100, "macs_a_row": 10**9, "wall": wall}
    assert accelerator.rows_a_second(found, "ours").value == 500
    assert accelerator.share(found, "ours") == pytest.approx(500 * 6e9 / 989e12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_cases_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.run(accelerator.CASES, accelerator.measure, 1, tmp_path / "x.json")
    assert capsys.readouterr().err.count("skipped, it needs a GPU") == len(accelerator.CASES)
    assert accelerator.table(tmp_path / "x.json") == []


# ---- what the Trainer costs ---------------------------------------------------------------------------------------


def test_the_trainer_beside_a_bare_loop(tmp_path: Path) -> None:
    """Both end with the same weights bit for bit."""
    path, case = tmp_path / "x.json", trainer_cost.resnet(32, 4, 3, str(tmp_path))
    command.run({"x": lambda: case}, trainer_cost.measure, 2, path)
    found = results.load(path)["x"]
    assert found["checks"]["trainer, bare"] == 0 and len(found["cpu"]["bare"]) == 2
    assert trainer_cost.judged(path)[0].target == 1.05 and "ResNet-18" in "\n".join(trainer_cost.table(path))


def test_a_trainer_that_takes_other_steps_is_noticed(tmp_path: Path) -> None:
    case, other = (trainer_cost.resnet(32, 4, steps, str(tmp_path)) for steps in (3, 2))
    mixed = trainer_cost.Case(case.label, 1.05, 3, {"trainer": case.arms["trainer"], "bare": other.arms["bare"]})
    with pytest.raises(UnequalWork, match="trainer and bare"):
        trainer_cost.measure(mixed, 1)


def test_stored_images_beside_others(tmp_path: Path) -> None:
    path, case = tmp_path / "x.json", input_pipeline.loading("photographs", input_pipeline.photographs(4), 48, 4.0)
    command.run({"x": lambda: case, "crop": lambda: input_pipeline.resizing(28, 32)}, input_pipeline.measure, 1, path)
    assert set(results.load(path)["x"]["cpu"]) == {"plain", "live", "stored"}
    assert [line.target for line in input_pipeline.judged(path)] == [4.0]
    assert any("kernel / matrices" in line for line in input_pipeline.table(path))


def test_both_memory_formats(tmp_path: Path) -> None:
    path, case = tmp_path / "x.json", memory_formats.Case("lcnet_050", 32, 2)
    command.run({"x": lambda: case}, memory_formats.measure, 1, path)
    found = results.load(path)["x"]
    assert found["recommended"] and found["checks"]["first, last"] < 1e-3
    assert any("| yes |" in line for line in memory_formats.table(path))
