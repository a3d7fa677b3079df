"""Training from a prefix cache is the uncached training: same model, same logs, ordinary checkpoints."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch

from hf_transfer import TransferError, finetune, load_backbone
from hf_transfer.objective import Objective
from hf_transfer.tuning import LinearProbe, PartialFreeze

IMAGES = {"pixel_values": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))}
IDS = torch.randint(4, 18, (4, 9), generator=torch.Generator().manual_seed(3))
QUICK = {**tiny_runs.QUICK, "learning_rate": 0.03, "logging_steps": 1, "seed": 5, "max_grad_norm": 0.5}


def start(kind: str, folder: Path) -> tuple[Path, Any, dict[str, torch.Tensor]]:
    """A saved backbone, data, and inputs to compare logits on."""
    if kind == "bert":
        return tiny_runs.text_backbone(folder), tiny_runs.sentences(24), {"input_ids": IDS}
    names = [str(digit) for digit in range(10)]
    return tiny_runs.image_backbone(folder, kind, names), tiny_runs.digits(40, 20), IMAGES


def run(folder: Path, output: str, data: Any, **options: Any) -> Any:
    images = {} if "text" in data["train"].column_names else {"augment": "none"}
    given = {**QUICK, "num_train_epochs": 2, "per_device_train_batch_size": 8, **images, **options}
    caches = str(folder.parent / "caches")
    return finetune(folder, data, output_dir=folder.parent / output, cache_dir=caches, **given)


def largest_difference(a: Any, b: Any, inputs: dict[str, torch.Tensor]) -> float:
    return float((tiny_runs.logits(a, **inputs) - tiny_runs.logits(b, **inputs)).abs().max())


def losses(result: Any) -> list[float]:
    return [entry[key] for entry in result.history for key in ("loss", "eval_loss") if key in entry]


@pytest.mark.parametrize("tuning", [LinearProbe(), PartialFreeze(1)], ids=["probe", "partial"])
@pytest.mark.parametrize("kind", ["test_resnet", "test_vit", "bert"])
def test_cached_equals_uncached(kind: str, tuning: Any, tmp_path: Path) -> None:
    folder, data, inputs = start(kind, tmp_path / "start")
    before = load_backbone(folder, labels=10 if kind != "bert" else 2).model
    live = run(folder, "live", data, tuning=tuning, cache="never")
    cached = run(folder, "cached", data, tuning=tuning, cache="always")
    assert len(list((tmp_path / "caches").iterdir())) == 2  # train and validation
    assert largest_difference(live.model, cached.model, inputs) < 1e-5
    assert losses(cached) == pytest.approx(losses(live), abs=1e-5)
    for split, values in live.metrics.items():
        assert cached.metrics[split] == pytest.approx(values, abs=1e-5)
    if kind != "bert":  # whose new head is random
        assert largest_difference(before, cached.model, inputs) > 1e-3  # it did learn
    again = load_backbone(cached.folder)
    assert largest_difference(again.model, cached.model, inputs) == 0


def test_channels_last_round_alike_on_both_sides_of_the_cut(tmp_path: Path) -> None:
    """A map crosses, and Adam would make full steps of what is nothing but rounding."""
    folder = tiny_runs.image_backbone(tmp_path / "start", "test_efficientnet", [str(digit) for digit in range(10)])
    options = {"tuning": PartialFreeze(1), "num_train_epochs": 4, "learning_rate": 1e-3, "channels_last": True}
    data = tiny_runs.digits(36, 20)
    run(folder, "other", data, cache="always", **{**options, "channels_last": False})  # whose cache is another
    live = run(folder, "live", data, cache="never", **options)
    cached = run(folder, "cached", data, cache="always", **options)
    assert cached.facts["cache"].startswith("before timm_model.blocks.4, 48x2x2")
    assert cached.facts["counts"]["train"] % 8 == 0  # batches of another size round otherwise too
    assert losses(cached) == losses(live)
    assert largest_difference(live.model, cached.model, IMAGES) == 0


def calls_of(model: Any, layer: str) -> list[int]:
    """Rows of each call of a layer, as they come."""
    rows: list[int] = []
    model.get_submodule(layer).register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    return rows


def test_frozen_layers_run_once_a_row(tmp_path: Path) -> None:
    """For the sample of the cut and for each row of train and validation; at the end the network is scored whole."""
    data = tiny_runs.digits(40, 20)
    backbone = load_backbone(tiny_runs.image_backbone(tmp_path / "start"), labels=[str(i) for i in range(10)])
    rows = calls_of(backbone.model, "timm_model.layer4")
    options = {**QUICK, "augment": "none", "num_train_epochs": 6, "tuning": "linear_probe"}
    result = finetune(backbone, data, output_dir=tmp_path / "run", cache="always", cache_dir=str(tmp_path), **options)
    counts = result.facts["counts"]
    final = counts["validation"] + counts["test"]
    assert sum(rows) - final - counts["train"] - counts["validation"] <= 7 * 4  # looking for the cut
    assert result.facts["cache"].startswith("before timm_model.fc")


def test_a_cache_is_read_by_later_runs_and_not_by_other_weights(tmp_path: Path) -> None:
    folder, data, _ = start("bert", tmp_path / "start")
    run(folder, "a", data, tuning="linear_probe", cache="always")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "caches").rglob("*.activations")}
    run(folder, "b", data, tuning="linear_probe", cache="always", learning_rate=0.1, seed=6)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "caches").rglob("*.activations")} == written
    run(folder, "c", data, tuning="partial", train_blocks=1, cache="always")
    assert len(list((tmp_path / "caches").iterdir())) == 4


def test_views_replay_the_augmentation(tmp_path: Path) -> None:
    """With as many views as epochs training is the uncached one, augmentation and all; with fewer it is another."""
    folder, data, inputs = start("test_resnet", tmp_path / "start")
    options = {"tuning": "partial", "train_blocks": 1, "num_train_epochs": 3, "augment": "light"}
    live = run(folder, "live", data, cache="never", **options)
    all_views = run(folder, "3", data, cache="always", cache_views=8, **options)
    fewer = run(folder, "2", data, cache="always", cache_views=2, **options)
    assert {path.name.split("-")[3] for path in (tmp_path / "caches").iterdir()} == {"1", "2", "3"}
    assert largest_difference(live.model, all_views.model, inputs) < 1e-5
    assert losses(all_views) == pytest.approx(losses(live), abs=1e-5)
    an_epoch = len(losses(live)) // 3
    assert losses(fewer)[: 2 * an_epoch] == pytest.approx(losses(live)[: 2 * an_epoch], abs=1e-5)
    assert largest_difference(live.model, fewer.model, inputs) > 1e-4


def test_resumed_from_an_ordinary_checkpoint(tmp_path: Path) -> None:
    folder, data, inputs = start("bert", tmp_path / "start")
    options = {"tuning": "partial", "train_blocks": 1, "cache": "always", "save_strategy": "epoch"}
    whole = run(folder, "whole", data, **options)
    checkpoint = sorted((tmp_path / "whole").glob("checkpoint-*"))[0]
    assert set(load_backbone(checkpoint).model.state_dict()) == set(whole.model.state_dict())
    resumed = run(folder, "again", data, **options, resume_from_checkpoint=str(checkpoint))
    assert largest_difference(whole.model, resumed.model, inputs) == 0


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2e-2), ("float16", 2e-3)])
def test_half_precision_on_disk(dtype: str, bound: float, tmp_path: Path) -> None:
    folder, data, inputs = start("bert", tmp_path / "start")
    live = run(folder, "live", data, tuning="linear_probe", cache="never")
    half = run(folder, "half", data, tuning="linear_probe", cache="always", cache_dtype=dtype)
    full = run(folder, "full", data, tuning="linear_probe", cache="always")
    assert 0 < largest_difference(live.model, half.model, inputs) < bound
    sizes = {d: sum(path.stat().st_size for path in (tmp_path / "caches").glob(f"*-{d}/shards/*.activations"))
             for d in (dtype, "float32")}  # fmt: skip
    assert sizes["float32"] == 2 * sizes[dtype]
    assert full.folder.exists()


def test_auto_takes_the_cheaper_way_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from hf_transfer.frozen import choice

    folder, data, _ = start("bert", tmp_path / "start")
    said = []
    for prefix in (10.0, 0.0):
        costs = choice.Costs(live=prefix, writing=prefix, reading=1e-3, epochs=2, size=1 << 20, free=1 << 30)
        monkeypatch.setattr(choice._Plan, "_costs", lambda self, *sizes, costs=costs: (costs, "measured"))
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="hf_transfer.frozen.choice"):
            run(folder, f"{prefix}", data, tuning="partial", train_blocks=1, learning_rate=0.01 + prefix)
        said.append(caplog.text)
        (tmp_path / "caches").rename(tmp_path / "gone") if prefix else None
    assert "computed once: measured: 20.0 s live over 2 epochs, 10.0 s with a cache of 1.0 MiB" in said[0]
    assert "rows x 1 view(s) x" in said[0]
    assert "MiB free in" in said[0]
    assert "Frozen layers run live: measured: 0.0 s live over 2 epochs, 0.0 s with a cache" in said[1]
    assert not (tmp_path / "caches").exists()


def test_costs_are_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A hundred epochs of loading and computing cost more than one; a single epoch costs what a cache does."""
    folder, data, _ = start("bert", tmp_path / "start")
    with caplog.at_level(logging.INFO, logger="hf_transfer.frozen.choice"):
        run(folder, "one", data, tuning="linear_probe", num_train_epochs=1)
        assert "Frozen layers run live: 1 epoch(s) show no version of a row twice." in caplog.text
        run(folder, "many", data, tuning="linear_probe", num_train_epochs=100, eval_strategy="no", logging_steps=99)
    found = re.search(
        r"computed once: loading takes ([\d.]+) ms a batch and the frozen layers ([\d.]+) ms", caplog.text
    )
    assert found is not None
    assert float(found[1]) > 0
    assert float(found[2]) > 0


def test_measured_batches_are_not_computed_again(tmp_path: Path) -> None:
    """cache="auto" computes each row once, those by which it decides among them."""
    data = tiny_runs.digits(40, 20)
    backbone = load_backbone(tiny_runs.image_backbone(tmp_path / "start"), labels=[str(i) for i in range(10)])
    rows = calls_of(backbone.model, "timm_model.layer4")
    options = {**QUICK, "augment": "none", "num_train_epochs": 20, "tuning": "linear_probe", "eval_strategy": "no"}
    options |= {"per_device_train_batch_size": 4, "logging_steps": 1000}
    result = finetune(backbone, data, output_dir=tmp_path / "run", cache_dir=str(tmp_path / "caches"), **options)
    assert "cache" in result.facts
    counts = result.facts["counts"]
    final = counts["validation"] + counts["test"]
    assert sum(rows) - final - counts["train"] <= 7 * 4  # looking for the cut


def test_auto_caches_the_views_that_are_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, data, _ = start("test_resnet", tmp_path / "start")
    options = {"tuning": "linear_probe", "num_train_epochs": 20, "augment": "light", "cache_views": 3}
    with caplog.at_level(logging.INFO, logger="hf_transfer.frozen.choice"):
        cached = run(folder, "run", data, eval_strategy="no", logging_steps=500, **options)
    assert re.search(
        r"before timm_model.fc, 96 numbers a row: 36 rows x 3 view\(s\) x 392 bytes, .* MiB free", caplog.text
    )
    assert "Frozen layers are computed once: loading takes" in caplog.text
    assert cached.facts["cache"].startswith("before timm_model.fc")
    assert [path.name.split("-")[3] for path in (tmp_path / "caches").iterdir()] == ["3"]


class Foreign(Objective):
    """A term of the user's own."""

    def forward(self, step: Any) -> torch.Tensor:
        return step.logits.logsumexp(-1).mean()


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("test_resnet", {"augment": "light"}, "augmented at random.*cache_views=4"),
        ("test_resnet", {"mixup": 0.2}, "mixup and CutMix"),
        ("bert", {"tuning": "full"}, "nothing is frozen below"),
        ("bert", {"tuning": "lora", "lora_r": 2}, "PeftModel wraps"),
        ("bert", {"cache_max_bytes": 100, "max_steps": 12}, "more than cache_max_bytes allows"),
        ("bert", {"sampling": "balanced_classes"}, "sampling='balanced_classes'"),
        ("bert", {"objectives": [Foreign()]}, "may read the inputs"),
    ],
    ids=["augmented", "mixup", "full", "lora", "too large", "sampling", "foreign term"],
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_auto_says_why_not(
    kind: str, options: dict[str, Any], why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, data, _ = start(kind, tmp_path / "start")
    given = {"tuning": "linear_probe", "max_steps": 1, "eval_strategy": "no", **options}
    with caplog.at_level(logging.INFO, logger="hf_transfer.frozen.choice"):
        run(folder, "run", data, **given)
    assert re.search(f"Frozen layers run live: .*{why}", caplog.text)
    assert not (tmp_path / "caches").exists()


def test_always_is_an_error_where_there_can_be_none(tmp_path: Path) -> None:
    folder, data, _ = start("bert", tmp_path / "start")
    with pytest.raises(TransferError, match="cache='always' cannot be: nothing is frozen below"):
        run(folder, "run", data, tuning="full", cache="always")
    with pytest.raises(TransferError, match="cache='sometimes' is not valid: it must be one of auto, always, never"):
        run(folder, "run", data, cache="sometimes")
    with pytest.raises(TransferError, match="cache_views=0 is not valid"):
        run(folder, "run", data, cache_views=0)


def test_two_processes_share_a_cache_and_train_as_without(tmp_path: Path) -> None:
    tests = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    script = str(Path(__file__).with_name("cached_processes.py"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, str(tmp_path)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for rank in ranks:
        assert rank["trainers"] == ["TransferTrainer", "CachedTrainer"]
        assert rank["shards"] == 2
        assert rank["moved"] > 1e-3
        assert rank["difference"] < 1e-5
        assert rank["metrics"][0] == pytest.approx(rank["metrics"][1], abs=1e-5)
    assert torch.equal(ranks[0]["logits"], ranks[1]["logits"])


def test_whole_batches_are_those_made_row_by_row(tmp_path: Path) -> None:
    """Where nothing but labels, ids and activations is needed; tokens only where they are read."""
    from hf_transfer.config import RunConfig
    from hf_transfer.data.collate import collator_for
    from hf_transfer.data.sources import load_data
    from hf_transfer.data.transforms import prepare
    from hf_transfer.frozen.choice import cached_data
    from hf_transfer.frozen.rows import CachedBatch, CachedRows
    from hf_transfer.objectives import CrossEntropy
    from hf_transfer.transfer_config import TransferConfig

    for kind in ("test_resnet", "bert"):
        folder, splits, _ = start(kind, tmp_path / kind)
        data = load_data(splits)
        backbone = load_backbone(folder, labels=data.labels)
        LinearProbe().apply(backbone.model)
        rows = prepare(data.splits["train"], backbone, data.columns, train=False)
        run_config = RunConfig(model="", dataset="", cache="always", cache_dir=str(tmp_path / "caches"))
        for counted in ("no", "all"):
            args = TransferConfig(output_dir=str(tmp_path), use_cpu=True, include_num_input_tokens_seen=counted)
            collator = collator_for(backbone)
            cached = cached_data(backbone, {"train": rows}, collator, args, [CrossEntropy()], run_config)
            assert cached is not None and cached.cut.steps is not None
            chosen = cached.train.__getitems__([5, 0, 3])
            assert isinstance(chosen, CachedBatch) is (counted == "no" or kind != "bert")
            slow = CachedRows(rows.select_columns(["labels", "example_id", *INPUTS[kind]]), cached.train.cache, 0)
            one, other = cached.collator(chosen), cached.collator(slow.__getitems__([5, 0, 3]))
            for name in ("labels", "example_id", "prefix_activation"):
                assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name])


INPUTS = {"test_resnet": [], "bert": ["input_ids", "attention_mask"]}
