"""Terms under FSDP2 train as under DDP: two processes without a GPU, whose parameters are cut in two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from invariants.fsdp_run import ALONE, CASES, STOP_AT, distillation, run
from invariants.training_step import tiny_model
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForSequenceClassification

from hf_transfer import TransferConfig, TransferError, fsdp, load_backbone
from hf_transfer.frozen.training import CachedTrainer
from hf_transfer.objectives import SoftTargets
from hf_transfer.runs import arguments as run_arguments

pytestmark = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_reshard_after_forward"), reason=f"torch {torch.__version__} is refused under FSDP"
)
SCRIPT = Path(__file__).with_name("fsdp_run.py")
launched = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Each process's results by strategy."""
    return {strategy: launch(folder, strategy) for strategy in ("ddp", "fsdp")}


def launch(folder: Path, *asked: str) -> list[dict[str, Any]]:
    """Each process's results, from one launch by torchrun and gloo. A process that waits for ever is killed."""
    root = SCRIPT.parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, str(SCRIPT), str(folder), *asked], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{asked[0]}-{rank}.pt", weights_only=True) for rank in (0, 1)]


def assert_same(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Two states with the same names and values, nested ones too."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        if torch.is_tensor(value):
            torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=name)
        else:
            assert_same(found[name], value, tolerance)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """The shortest proof; the others are slow."""
    cases = ("projector", "weights")
    found = launch(tmp_path, "fsdp", *cases)
    for case in cases:
        expected = run(case, CASES[case], tmp_path, "alone")
        for rank in found:
            assert_same(rank[case]["weights"], expected["weights"])


@launched
@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_of_ddp(results: Any, case: str) -> None:
    """And with them gradients, clipping, counts, and the optimizer's states. `stock` is the stock Trainer's own."""
    expected = results["ddp"][0][case]
    for rank in results["fsdp"]:
        assert_same(rank[case]["weights"], expected["weights"])
        for entry, other in zip(rank[case]["log"], expected["log"], strict=True):
            assert entry == pytest.approx(other, rel=1e-5, abs=1e-6)
        np.testing.assert_allclose(rank[case]["scores"], expected["scores"], atol=1e-6)


@launched
@pytest.mark.parametrize("case", ALONE)
def test_terms_on_layers_alone_train_as_in_one_process(results: Any, case: str, tmp_path: Path) -> None:
    expected = run(case, ALONE[case], tmp_path, "alone")
    assert_same(results["fsdp"][0][case]["weights"], expected["weights"])


@launched
def test_bfloat16_is_in_use(results: Any) -> None:
    half, full = (results["fsdp"][0][case]["weights"] for case in ("bfloat16", "checkpointing"))  # the same terms
    name = "model.classifier.weight"
    assert half[name].dtype == torch.float32
    assert (half[name] - full[name]).abs().max() > 1e-5


@launched
@pytest.mark.parametrize("life", ["life", "life in parts"])
def test_interrupted_and_resumed_is_uninterrupted(results: Any, life: str) -> None:
    for rank in results["fsdp"]:
        assert_same(rank[life]["resumed"], rank[life]["whole"], tolerance=0)


@launched
@pytest.mark.parametrize("life", ["life", "life in parts"])
def test_averages_evaluations_and_predictions_are_those_of_ddp(results: Any, life: str) -> None:
    expected = results["ddp"][0]["life"]
    for rank in results["fsdp"]:
        found = rank[life]
        assert found["model is the user's"] and found["best"] == expected["best"]
        np.testing.assert_allclose(found["evaluations"], expected["evaluations"], atol=1e-6)
        for name in ("unlabelled", "labelled"):
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)
        for name in ("whole", "again"):
            assert_same(found[name], expected[name])


@launched
def test_adapters_resume_and_load(results: Any, folder: Path) -> None:
    for rank in results["fsdp"]:
        assert_same(rank["adapter life"]["resumed"], rank["adapter life"]["whole"], tolerance=0)
        assert_same(rank["adapter life"]["whole"], results["ddp"][0]["adapter life"]["whole"])
    state = results["fsdp"][0]["adapter life"]["resumed"]
    loaded: Any = load_backbone(str(folder / "fsdp" / "adapters" / "saved"), task="text-classification")
    for name, value in loaded.model.state_dict().items():
        torch.testing.assert_close(value, state[f"model.{name}"], rtol=0, atol=0, msg=name)


@launched
def test_what_is_saved_is_the_user_s_model(results: Any, folder: Path) -> None:
    saved = folder / "fsdp" / "life" / "saved"
    network = AutoModelForSequenceClassification.from_pretrained(saved)
    for loaded in (network, load_backbone(str(saved), task="text-classification").model):
        assert type(loaded).__name__ == "BertForSequenceClassification"
        for name, value in loaded.state_dict().items():
            expected = results["fsdp"][0]["life"]["whole"][f"model.{name}"]
            torch.testing.assert_close(value, expected, rtol=0, atol=0, msg=name)


@launched
def test_a_checkpoint_has_the_user_s_names(results: Any, folder: Path) -> None:
    names = set(tiny_model("text").state_dict())
    checkpoint = folder / "fsdp" / "life" / "cut" / f"checkpoint-{STOP_AT}"
    assert set(torch.load(checkpoint / "pytorch_model_fsdp.bin", weights_only=True)) == names
    terms = torch.load(checkpoint / "transfer_state.pt", weights_only=True)["objectives"]
    assert terms and not names & set(terms)
    parts = folder / "fsdp" / "life-in-parts" / "cut" / f"checkpoint-{STOP_AT}" / "pytorch_model_fsdp_0"
    keys = FileSystemReader(parts).read_metadata().state_dict_metadata
    assert {key.removeprefix("model.") for key in keys} == names


@launched
def test_what_is_not_known_to_work_is_refused(results: Any) -> None:
    for rank in results["fsdp"]:
        messages = rank["refusals"]
        assert all(message.startswith("TransferError") for message in messages.values()), messages
        assert "evaluate it after train()" in messages["evaluation first"]
        assert "a copy of the base too, or a cache" in messages["base as teacher"]
        assert "needs one live teacher" in messages["two teachers in parts"]
        assert "teacher_cache='always': teacher_sharded=True" in messages["cache of a teacher in parts"]
        assert "save it, and load it anew" in messages["cut already"]
        assert "'norm'" in messages["weights as they are"] and "over_parts" in messages["weights as they are"]


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """accelerate's plugin with given options; it writes one of them into the environment."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "False")
    usual = {"fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "cpu_ram_efficient_loading": False}
    return lambda **options: FullyShardedDataParallelPlugin(**{**usual, **options})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"fsdp_version": 1}, "'version': 2"),
        ({"auto_wrap_policy": "NO_WRAP"}, "TRANSFORMER_BASED_WRAP"),
        ({"cpu_offload": True}, "cpu_offload"),
        ({"cpu_ram_efficient_loading": True}, "cpu_ram_efficient_loading"),
        ({"activation_checkpointing": True}, "activation_checkpointing"),
    ],
)
def test_options_of_fsdp_that_are_not_known_to_work(plugin: Any, options: Any, named: str, tmp_path: Path) -> None:
    args = TransferConfig(output_dir=str(tmp_path), use_cpu=True)
    assert fsdp.why_not(plugin(), args, tiny_model("text")) is None
    assert named in str(fsdp.why_not(plugin(**options), args, tiny_model("text")))


@pytest.mark.parametrize(
    ("name", "value"), [("torch_compile", True), ("auto_find_batch_size", True), ("channels_last", True)]
)
def test_arguments_that_are_not_known_to_work(plugin: Any, name: str, value: Any, tmp_path: Path) -> None:
    args = TransferConfig(output_dir=str(tmp_path), use_cpu=True)
    setattr(args, name, value)
    assert name in str(fsdp.why_not(plugin(), args, tiny_model("text")))


def test_an_older_torch_is_refused(plugin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FSDPModule, "set_reshard_after_forward")
    args = TransferConfig(output_dir=str(tmp_path), use_cpu=True)
    assert f"torch {torch.__version__}" in str(fsdp.why_not(plugin(), args, tiny_model("text")))


def test_batch_statistics_are_refused(plugin: Any, tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    args = TransferConfig(output_dir=str(tmp_path), use_cpu=True)
    assert "batch normalisation" in str(fsdp.why_not(plugin(), args, network))


def test_blocks_are_those_that_the_model_has(plugin: Any) -> None:
    """transformers' wrapper of timm's networks names itself as what is not to be split."""
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    from hf_transfer.objective import Learner
    from hf_transfer.trainer import _anatomy

    config = TimmWrapperConfig(architecture="test_vit", model_args={"img_size": 32}, num_labels=3)
    wrapped = TimmWrapperForImageClassification(config)
    for model, expected in (
        (wrapped, ["Block", "TimmWrapperForImageClassification"]),
        (tiny_model("text"), ["BertEmbeddings", "BertLayer", "BertForSequenceClassification"]),
    ):
        made = plugin()
        fsdp.plan_cut(made, Learner(model, [], _anatomy(model)))
        assert made.transformer_cls_names_to_wrap == expected


def test_a_network_that_goes_on_from_a_cut_is_refused() -> None:
    assert "cached activations" in str(CachedTrainer.why_no_fsdp(cast(Any, None)))


def test_a_teacher_in_parts_is_for_fsdp(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="teacher_sharded=True is for training under FSDP"):
        distillation(tmp_path, "alone", [SoftTargets(2.0)], teacher_sharded=True)


@pytest.mark.parametrize("given", ["argument", "launcher"])
def test_finetune_and_distill_refuse_it(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = {"output_dir": str(tmp_path), "use_cpu": True}
    if given == "argument":
        used["fsdp"] = True
    else:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TransferError, match="do not run under FSDP"):
        run_arguments(TransferConfig, used, {}, cast(Any, SimpleNamespace(splits={"validation": None})))
