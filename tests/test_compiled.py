"""Under torch.compile training is the same, and where terms look at no value the network and they are whole graphs.

Compiled by AOTAutograd without inductor: same operations, seconds instead of minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import test_trainer as runs
import tiny_runs as tiny
import torch
from torch._dynamo.utils import counters

from hf_transfer import TransferTrainer, distill, finetune
from hf_transfer.objective import CosineSchedule, Objective
from hf_transfer.objectives import DANN, RKD, AttentionTransfer, CrossEntropy, Hint, SoftTargets

pytestmark = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="transformers asks what torch 2.7 has when it is compiled"
)
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def trained(folder: Path, terms: list[Objective], data: Any, **options: Any) -> Mapping[str, torch.Tensor]:
    model = runs.text_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    args = runs.config(folder, num_train_epochs=2, **options)
    TransferTrainer(model=model, args=args, train_dataset=data, objectives=terms).train()
    return runs.weights(model)


def assert_close(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)


CASES: dict[str, tuple[Callable[[], list[Objective]], dict[str, Any]]] = {
    "alone": (lambda: [CrossEntropy()], {}),
    "accumulated": (lambda: [CrossEntropy()], {"gradient_accumulation_steps": 2}),
    "scheduled": (lambda: [CrossEntropy(weight=CosineSchedule(1.0, 0.5))], {}),
}


@pytest.mark.parametrize("case", CASES)
def test_terms_on_logits_are_in_the_networks_graph(tmp_path: Path, case: str) -> None:
    terms, options = CASES[case]
    plain = trained(tmp_path / "plain", terms(), runs.rows(), **options)
    compiled = trained(tmp_path / "compiled", terms(), runs.rows(), **options, **COMPILED)
    assert_close(compiled, plain)
    assert not counters["graph_break"]
    assert 1 <= counters["stats"]["unique_graphs"] <= 2  # the schedule's first progress, and any other


def test_terms_that_look_at_values_train_as_ever(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", [CrossEntropy(), DANN()], runs.two_domains())
    compiled = trained(tmp_path / "compiled", [CrossEntropy(), DANN()], runs.two_domains(), **COMPILED)
    assert counters["stats"]["unique_graphs"]
    assert_close(compiled, plain)


def started(folder: Path) -> tuple[Path, Any, dict[str, Any]]:
    options = {**tiny.QUICK, "num_train_epochs": 2, "per_device_train_batch_size": 8, "augment": "none"}
    return tiny.image_backbone(folder / "start", labels=[str(i) for i in range(10)]), tiny.digits(40, 20), options


def test_the_head_of_a_cached_network_is_a_graph_of_its_own(tmp_path: Path) -> None:
    start, data, options = started(tmp_path)
    options |= {"tuning": "linear_probe", "cache": "always", "cache_dir": str(tmp_path / "caches")}
    plain = finetune(start, data, output_dir=tmp_path / "plain", **options)
    compiled = finetune(start, data, output_dir=tmp_path / "compiled", **options, **COMPILED)
    assert compiled.facts["cache"] == plain.facts["cache"] == "before timm_model.fc, 96 numbers a row"
    assert_close(compiled.model.state_dict(), plain.model.state_dict())
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]


def test_more_than_a_head_is_compiled_whole_and_not_cached(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"tuning": "partial", "train_blocks": 1, "cache": "auto", "num_train_epochs": 2, "max_steps": 2}
    with caplog.at_level("INFO"):
        result = finetune(
            tiny.text_backbone(tmp_path / "start"), tiny.sentences(), output_dir=tmp_path / "run",
            cache_dir=str(tmp_path / "caches"), **{**tiny.QUICK, **options}, **COMPILED,
        )  # fmt: skip
    assert result.facts.get("cache") is None and counters["stats"]["unique_graphs"]
    assert "torch_compile compiles the network whole" in caplog.text


STUDENTS: dict[str, Callable[[], list[Objective]]] = {
    "logits": lambda: [SoftTargets(temperature=4.0, weight=0.9)],
    "layers": lambda: [Hint(layers="last"), AttentionTransfer(layers="stages")],
    "features": lambda: [RKD()],
}


@pytest.mark.parametrize("case", STUDENTS)
def test_a_student_is_in_one_graph_with_what_its_teacher_says(tmp_path: Path, case: str) -> None:
    start, data, options = started(tmp_path)

    def student(name: str, **more: Any) -> Any:
        torch.manual_seed(0)  # projectors are random
        return distill(start, start, data, objectives=STUDENTS[case](), output_dir=tmp_path / name, **options, **more)

    plain, compiled = student("plain").model, student("compiled", **COMPILED).model
    assert_close(compiled.state_dict(), plain.state_dict())
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]
    assert not any(module._forward_hooks for module in compiled.modules())
