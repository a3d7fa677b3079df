"""Teachers: how they run, what they answer with, and what is refused as a teacher."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import image_backbone, text_backbone
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from hf_transfer import load_backbone
from hf_transfer.backbones import Backbone
from hf_transfer.distillation.signal import TeacherSignal, TopLogits
from hf_transfer.distillation.teacher import (
    AdapterOffTeacher,
    EnsembleTeacher,
    LiveTeacher,
    Teacher,
    as_teacher,
    backbone_of,
)
from hf_transfer.errors import TransferError
from hf_transfer.objective import Step
from hf_transfer.objectives import DIST, DKD, JSD, MLKD, NKD, LogitMSE, LogitStandardization, SoftTargets
from hf_transfer.tuning import LoRA, Peft

LABELS = ("x", "y", "z")


def network(
    name: str = "test_resnet", labels: Sequence[str] | int = LABELS, size: int = 32, seed: int = 0
) -> Backbone:
    torch.manual_seed(seed)
    return load_backbone(
        name, labels=labels if isinstance(labels, int) else list(labels), pretrained=False, image_size=size
    )


def pixels(size: int = 32, n: int = 4) -> dict[str, Tensor]:
    x = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": x, "labels": torch.tensor([0, 1, 2, 0][:n]), "example_id": torch.arange(n)}


@torch.no_grad()
def answer(backbone: Backbone, x: Tensor) -> Tensor:
    return copy.deepcopy(backbone.model).eval()(pixel_values=x).logits


# ---- live -----------------------------------------------------------------------------------------------------------


def test_it_runs_in_eval_and_inference_mode_and_leaves_no_trace(caplog) -> None:
    teacher, student = network(seed=1), network()
    expected = answer(teacher, pixels()["pixel_values"])
    teacher.model.train()
    live = LiveTeacher(teacher, student)
    assert "came in train mode" in caplog.text
    teacher.model.train()  # whoever holds it may do so later
    before = copy.deepcopy(teacher.model.state_dict())
    logits = live(pixels()).logits
    torch.testing.assert_close(logits, expected)
    assert logits.is_inference()
    assert not logits.requires_grad
    after = teacher.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)  # BatchNorm's statistics too
    assert not isinstance(live, nn.Module)


@pytest.mark.parametrize(
    "term",
    [
        SoftTargets(),
        JSD(),
        LogitMSE(),
        DKD(),
        NKD(),
        DIST(),
        MLKD(),
        LogitStandardization(SoftTargets()),
    ],
    ids=lambda term: type(term).__name__,
)
def test_terms_learn_from_what_was_made_in_inference_mode(term) -> None:
    live = LiveTeacher(network(seed=1), network())
    signal, plain = live(pixels()), answer(network(seed=1), pixels()["pixel_values"])
    gradients = []
    for teacher in (signal, TeacherSignal(logits=plain)):
        logits = torch.linspace(-1, 1, 12).view(4, 3).requires_grad_()
        step = Step(nn.Identity(), {}, None, logits, labels=pixels()["labels"], teacher=teacher)
        term(step).sum().backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients)


def test_it_computes_in_its_own_dtype() -> None:
    teacher, student = network(seed=1), network()
    half = LiveTeacher(teacher, student, dtype=torch.bfloat16)
    logits = half(pixels()).logits
    assert logits.dtype == torch.bfloat16
    assert {p.dtype for p in teacher.model.parameters()} == {torch.float32}  # what the user holds stays as it was
    torch.testing.assert_close(logits.float(), answer(teacher, pixels()["pixel_values"]), rtol=0.1, atol=0.1)
    assert LiveTeacher(teacher, student).backbone is teacher
    with torch.autocast("cpu", torch.bfloat16):
        own = LiveTeacher(teacher, student)(pixels()).logits
    assert own.dtype == torch.float32
    torch.testing.assert_close(own, answer(teacher, pixels()["pixel_values"]))
    for dtype in (torch.int8, "bfloat16"):
        with pytest.raises(TransferError, match='valid are "auto" and a floating dtype'):
            LiveTeacher(teacher, student, dtype=dtype)


def test_compile_runs_the_compiled_network(monkeypatch) -> None:
    counter, real = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend=counter))
    teacher, student = network(seed=1), network()
    torch.testing.assert_close(
        LiveTeacher(teacher, student, compile=True)(pixels()).logits, answer(teacher, pixels()["pixel_values"])
    )
    assert counter.frame_count > 0
    with pytest.raises(TransferError, match="compile=True leaves out"):
        LiveTeacher(teacher, student, compile=True).watch(features=True)
    with pytest.raises(TransferError, match="do not go together"):
        LiveTeacher(teacher, student, compile=True, quantize=True)


def test_quantize_computes_in_int8_and_applies_to_linear_layers_on_the_cpu_only() -> None:
    teacher, student = network("test_vit", seed=1, size=160), network()
    live = LiveTeacher(teacher, student, quantize=True)
    kinds = {type(module).__module__ for module in live.backbone.model.modules()}
    assert any("quantized.dynamic" in kind for kind in kinds)
    assert all("quantized" not in type(module).__module__ for module in teacher.model.modules())
    batch = pixels()
    exact, got = LiveTeacher(teacher, student)(batch).logits, live(batch).logits
    assert not torch.equal(exact, got)
    assert (exact - got).abs().max() < 0.5 * exact.std()
    assert live.fingerprint() != LiveTeacher(teacher, student).fingerprint()
    live.watch([live.backbone.anatomy.blocks[0].name], features=True)
    assert live(batch).features.shape[0] == 4
    with pytest.raises(TransferError, match="computes on the CPU, and the teacher is to be placed on cuda"):
        live.to("cuda")
    with pytest.raises(TransferError, match=r"starts from float32, and the teacher is torch.bfloat16"):
        LiveTeacher(teacher, student, dtype=torch.bfloat16, quantize=True)
    with pytest.raises(TransferError, match="have none"):
        LiveTeacher(network(seed=1), student, quantize=True)
    adapted = replace(teacher, model=LoRA(r=2).apply(copy.deepcopy(teacher.model)))
    with pytest.raises(TransferError, match="merge them first"):
        LiveTeacher(adapted, student, quantize=True)


def test_it_sees_its_own_size_scale_and_class_order() -> None:
    student, teacher = network(), network("test_vit", ("z", "x", "y"), size=160, seed=1)
    assert teacher.data_config["input_size"] != student.data_config["input_size"]
    teacher.data_config["mean"] = (0.1, 0.2, 0.3)
    x = pixels()["pixel_values"]
    mean, std = (torch.tensor(student.data_config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    own_mean, own_std = (torch.tensor(teacher.data_config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    images = torch.nn.functional.interpolate(x * std + mean, (160, 160), mode="bicubic", antialias=True)
    expected = answer(teacher, (images - own_mean) / own_std)[:, [1, 2, 0]]
    live = LiveTeacher(teacher, student)
    torch.testing.assert_close(live(pixels()).logits, expected, rtol=1e-3, atol=1e-4)
    assert live.labels == list(LABELS)


def test_watch_says_what_the_signal_holds() -> None:
    teacher, student = network(seed=1), network()
    live = LiveTeacher(teacher, student)
    assert live(pixels()).contents() == ["logits"]
    name = teacher.anatomy.blocks[-1].name
    live.watch([name], features=True)
    signal = live(pixels())
    assert signal.contents() == ["logits", "features", name]
    weight, bias = teacher.model.get_submodule(teacher.anatomy.classifiers[0]).parameters()
    with torch.no_grad():
        torch.testing.assert_close(signal.features @ weight.T + bias, signal.logits)
    assert signal.hidden[name].shape[:2] == (4, teacher.anatomy.blocks[-1].width)
    live.watch()
    assert live(pixels()).contents() == ["logits"]
    assert not any(module._forward_hooks for module in teacher.model.modules())
    with pytest.raises(TransferError, match="no module named"):
        live.watch(["layer9"])


def test_the_fingerprint_is_of_all_that_changes_the_answer(tmp_path) -> None:
    student = network()
    folder = image_backbone(tmp_path / "saved", labels=LABELS)
    first = as_teacher(folder, student).fingerprint()
    assert first == as_teacher(folder, student).fingerprint()
    assert int(first, 16) >= 0

    def changed(**options: Any) -> str:
        teacher = load_backbone(folder)
        for name, tensor in [*teacher.model.named_parameters(), *teacher.model.named_buffers()]:
            if name.endswith(options.get("nudge", "nothing")):
                tensor.data.add_(1e-3)
        teacher = replace(teacher, labels=options.get("labels", teacher.labels))
        teacher.data_config["mean"] = options.get("mean", teacher.data_config["mean"])
        return LiveTeacher(teacher, student, dtype=options.get("dtype", "auto")).fingerprint()

    assert changed() == first
    others = [
        changed(nudge="fc.bias"),
        changed(nudge="running_var"),
        changed(dtype=torch.bfloat16),
        changed(labels=["y", "x", "z"]),
        changed(mean=(0.1, 0.2, 0.3)),
    ]
    assert len({first, *others}) == 6


def test_it_is_placed_where_it_is_told() -> None:
    live = LiveTeacher(network(seed=1), network())
    assert live.to("meta").device.type == "meta"
    assert live.to("meta") is live


def test_a_teacher_of_another_task_or_of_the_students_own_weights_is_refused() -> None:
    student = network()
    with pytest.raises(TransferError, match="was made for regression, the student 'test_resnet' for image-class"):
        LiveTeacher(network(labels=1), student)
    with pytest.raises(TransferError, match="share parameters"):
        LiveTeacher(replace(student), student)


# ---- the student's own base -----------------------------------------------------------------------------------------


def adapted_student() -> tuple[Backbone, Tensor]:
    """A LoRA student whose adapter and head have moved, and its base's logits."""
    base = network("test_vit", size=160, seed=1)
    expected = answer(base, pixels(160)["pixel_values"])
    student = replace(base, model=LoRA(r=2).apply(base.model))
    draw = torch.Generator().manual_seed(3)
    for parameter in student.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=draw))
    return student, expected


def test_a_lora_students_base_answers_with_the_adapter_off() -> None:
    student, expected = adapted_student()
    teacher = AdapterOffTeacher(student)
    assert teacher.backbone.model is student.model  # no second copy
    with torch.no_grad():
        assert not torch.allclose(student.model(pixel_values=pixels(160)["pixel_values"]).logits, expected, atol=0.1)
    torch.testing.assert_close(teacher(pixels(160)).logits, expected)
    teacher.watch(features=True)
    assert teacher(pixels(160)).features.shape[0] == 4


def test_the_student_is_as_it_was_after_each_answer() -> None:
    student, _ = adapted_student()
    model: Any = student.model
    model.train()
    frozen_adapter = next(p for name, p in model.named_parameters() if "lora_A" in name)
    frozen_adapter.requires_grad_(False)  # peft would turn it on again
    held = next(iter(model.modules())).get_submodule("base_model")
    held.eval()
    model(pixel_values=pixels(160)["pixel_values"]).logits.sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    modes = [module.training for module in model.modules()]
    trains = [p.requires_grad for p in model.parameters()]
    AdapterOffTeacher(student)(pixels(160))
    assert [module.training for module in model.modules()] == modes
    assert True in modes
    assert False in modes
    assert [p.requires_grad for p in model.parameters()] == trains
    now = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert now.keys() == grads.keys()
    assert all(torch.equal(now[name], grads[name]) for name in grads)  # gradients that were being accumulated
    _, expected = adapted_student()
    with torch.no_grad():
        assert not torch.allclose(model.eval()(pixel_values=pixels(160)["pixel_values"]).logits, expected, atol=0.1)
    model.train()
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="stop"), AdapterOffTeacher(student).answering():
        raise RuntimeError("stop")
    assert [module.training for module in model.modules()] == modes


def test_its_fingerprint_does_not_move_with_the_adapter() -> None:
    base = network("test_vit", size=160, seed=1)
    alone = LiveTeacher(base, copy.deepcopy(base)).fingerprint()
    student, _ = adapted_student()
    assert AdapterOffTeacher(student).fingerprint() == alone
    adapter = {id(p) for p in student.model.parameters() if p.requires_grad}
    next(p for p in student.model.parameters() if id(p) not in adapter).data.add_(1.0)
    assert AdapterOffTeacher(student).fingerprint() != alone


def test_a_base_that_never_learned_the_task_is_refused(tmp_path) -> None:
    with pytest.raises(TransferError, match="has no adapter to switch off"):
        AdapterOffTeacher(network())
    bert = load_backbone(text_backbone(tmp_path / "bert"), labels=["a", "b"], task="text-classification")
    student = replace(bert, model=LoRA(r=2).apply(bert.model))
    with pytest.raises(TransferError, match=r"starts with new weights in classifier.bias"):
        AdapterOffTeacher(student)


def test_a_base_that_trains_with_its_adapter_is_refused() -> None:
    student, _ = adapted_student()
    student.model.get_base_model().timm_model.norm.weight.requires_grad_(True)
    with pytest.raises(TransferError, match=r"base trains too \(1 tensors, first timm_model.norm.weight\)"):
        AdapterOffTeacher(student)


def test_a_learned_prompt_is_switched_off_too(tmp_path) -> None:
    from peft import PromptTuningConfig

    bert = load_backbone(text_backbone(tmp_path / "bert"), labels=["a", "b"], task="text-classification")
    bert.save(tmp_path / "tuned")
    base = load_backbone(tmp_path / "tuned")
    batch = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        expected = base.model(**batch).logits
    model = Peft(PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)).apply(base.model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1.0)
    torch.testing.assert_close(AdapterOffTeacher(replace(base, model=model))(batch).logits, expected)


# ---- ensembles ------------------------------------------------------------------------------------------------------


class Says(Teacher):
    """A teacher with fixed logits, by example_id."""

    def __init__(self, logits: Tensor, task: str | None = None, labels: list[str] | None = None) -> None:
        self.logits, self.task, self.labels = logits, task, labels
        self.asked: list[list[int]] = []

    def __call__(self, batch: Mapping[str, Tensor]) -> TeacherSignal:
        self.asked.append(batch["example_id"].tolist())
        return TeacherSignal(logits=self.logits[batch["example_id"]])

    def fingerprint(self) -> str:
        return str(self.logits.sum().item())

    def watch(self, layers: Sequence[str] = (), features: bool = False) -> None:
        raise AssertionError


class Largest(Says):
    def __call__(self, batch: Mapping[str, Tensor]) -> TeacherSignal:
        return TeacherSignal(top=TopLogits.of(self.logits, 1))


IDS = {"example_id": torch.arange(2)}


def said(*rows: Sequence[float]) -> Says:
    return Says(torch.tensor(rows, dtype=torch.float64))


def test_an_ensembles_logits_are_the_log_of_the_mean_probabilities() -> None:
    loud, quiet = said((60.0, 0.0, -60.0), (0.0, 9.0, 0.0)), said((0.0, 1.0, 2.0), (1.0, 0.0, 1.0))
    for weights, share in ((None, 0.5), ((3.0, 1.0), 0.75)):
        got = EnsembleTeacher([loud, quiet], weights)(IDS).logits
        expected = share * loud.logits.softmax(1) + (1 - share) * quiet.logits.softmax(1)
        torch.testing.assert_close(got.exp(), expected)
        torch.testing.assert_close(got.softmax(1), expected)  # a distribution already
        assert got.isfinite().all()
    tokens = Says(torch.randn(2, 5, 3, dtype=torch.float64))
    torch.testing.assert_close(EnsembleTeacher([tokens, tokens])(IDS).logits, tokens.logits.log_softmax(-1))


def test_quantities_are_averaged_themselves() -> None:
    one = EnsembleTeacher([said((1.0,), (2.0,)), said((3.0,), (6.0,))])(IDS).logits
    torch.testing.assert_close(one, torch.tensor([[2.0], [4.0]], dtype=torch.float64))
    pair = [Says(torch.tensor(rows), "regression") for rows in ([[1.0, 2.0]] * 2, [[3.0, 8.0]] * 2)]
    torch.testing.assert_close(EnsembleTeacher(pair, [1, 3])(IDS).logits, torch.tensor([[2.5, 6.5]] * 2))


def test_a_route_asks_one_teacher_a_row() -> None:
    first, second, third = (Says(torch.full((4, 2), float(i))) for i in range(3))
    ensemble = EnsembleTeacher([first, second, third], route_by="domain")
    logits = ensemble({"example_id": torch.arange(4), "domain": torch.tensor([2, 0, 2, 0])}).logits
    assert logits[:, 0].tolist() == [2.0, 0.0, 2.0, 0.0]
    assert (first.asked, second.asked, third.asked) == ([[1, 3]], [], [[0, 2]])
    with pytest.raises(TransferError, match="the batch has no such column; it has example_id"):
        ensemble(IDS)
    with pytest.raises(TransferError, match="3 is none of the 3 teachers"):
        ensemble({**IDS, "domain": torch.tensor([0, 3])})


def test_an_ensemble_refuses_what_it_cannot_do() -> None:
    a, b = said((0.0, 1.0), (1.0, 0.0)), said((0.0, 2.0), (1.0, 0.0))
    with pytest.raises(TransferError, match="at least one"):
        EnsembleTeacher([])
    with pytest.raises(TransferError, match=r"must be 2, each > 0"):
        EnsembleTeacher([a, b], [1.0, 0.0])
    with pytest.raises(TransferError, match="weights do not apply with route_by"):
        EnsembleTeacher([a, b], [1.0, 1.0], "domain")
    with pytest.raises(TransferError, match="different classes"):
        EnsembleTeacher([a, Says(b.logits, labels=["x", "y"])])
    with pytest.raises(TransferError, match=r"no one layer to compare with \(stage, features\)"):
        EnsembleTeacher([a, b]).watch(["stage"], features=True)
    EnsembleTeacher([a, b]).watch()
    few = Largest(a.logits)
    with pytest.raises(TransferError, match=r"one gave \['top'\]"):
        EnsembleTeacher([a, few])(IDS)
    prints = {EnsembleTeacher(*args).fingerprint() for args in (([a, b],), ([b, a],), ([a, b], [1, 2]), ([a],))}
    assert len(prints) == 4


# ---- whatever is called a teacher -----------------------------------------------------------------------------------


def test_a_folder_a_backbone_a_module_and_a_list_become_teachers(tmp_path, caplog) -> None:
    student = network(seed=5)
    folder = image_backbone(tmp_path / "saved", labels=LABELS)
    loaded = load_backbone(folder)
    expected = answer(loaded, pixels()["pixel_values"])
    for given in (folder, str(folder), loaded):
        torch.testing.assert_close(as_teacher(given, student)(pixels()).logits, expected)
    assert not caplog.text
    teacher = as_teacher(loaded.model, student)
    torch.testing.assert_close(teacher(pixels()).logits, expected)
    assert "came as a bare TimmWrapper" in caplog.text
    both = as_teacher([folder, loaded], student)
    assert isinstance(both, EnsembleTeacher)
    torch.testing.assert_close(both(pixels()).logits, expected.log_softmax(1))
    assert as_teacher(teacher, student) is teacher
    assert as_teacher(folder, student, dtype=torch.bfloat16)(pixels()).logits.dtype == torch.bfloat16
    with pytest.raises(TransferError, match=r"quantize=True cannot be applied to a LiveTeacher that is already made"):
        as_teacher(teacher, student, quantize=True)
    with pytest.raises(TransferError, match="teacher=3: valid are a folder"):
        as_teacher(3, student)


def test_a_fresh_head_is_refused_and_a_trained_one_is_not(tmp_path) -> None:
    folder = text_backbone(tmp_path / "bert")
    fresh = load_backbone(folder, labels=["a", "b"], task="text-classification")
    with pytest.raises(TransferError, match=r"new weights in classifier.bias, classifier.weight.*Fine-tune it"):
        as_teacher(fresh, copy.deepcopy(fresh))
    fresh.save(tmp_path / "tuned")
    student = load_backbone(tmp_path / "tuned")
    as_teacher(tmp_path / "tuned", student)
    renamed = load_backbone(image_backbone(tmp_path / "net"), labels=["p", "q"])
    with pytest.raises(TransferError, match=r"starts with new weights in timm_model\.fc"):
        as_teacher(renamed, network(labels=["p", "q"]))


def test_an_adapter_folder_is_merged_and_an_untrained_adapter_is_refused(tmp_path) -> None:
    base = text_backbone(tmp_path / "bert")
    backbone = load_backbone(base, labels=["a", "b"], task="text-classification")
    adapted = replace(backbone, model=LoRA(r=2).apply(backbone.model))
    student = load_backbone(base, labels=["a", "b"], task="text-classification")
    with pytest.raises(TransferError, match="starts with new weights in classifier"):
        as_teacher(adapted, student)
    for parameter in adapted.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    adapted.save(tmp_path / "adapter")
    teacher = as_teacher(tmp_path / "adapter", student)
    assert isinstance(teacher, LiveTeacher)
    assert not any("lora" in name for name, _ in teacher.backbone.model.named_modules())
    batch = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        expected = adapted.model.eval()(**batch).logits
    torch.testing.assert_close(teacher(batch).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(as_teacher(adapted, student)(batch).logits, expected)


def test_a_lora_student_or_its_base_as_teacher_is_the_base_alone() -> None:
    student, expected = adapted_student()
    for given in (student, student.model, student.model.get_base_model()):
        teacher = as_teacher(given, student)
        assert isinstance(teacher, AdapterOffTeacher)
        torch.testing.assert_close(teacher(pixels(160)).logits, expected)
    with pytest.raises(TransferError, match="compile=True cannot be applied to a student's own base"):
        as_teacher(student, student, compile=True)


def test_backbone_of_reads_what_a_network_says_of_itself(tmp_path) -> None:
    import timm

    made = load_backbone(text_backbone(tmp_path / "bert"), labels=["a", "b"], task="text-classification")
    found = backbone_of(made.model, made.processor)
    assert (found.task, found.modality, found.labels) == ("text-classification", "text", ["a", "b"])
    assert made.model.config.architectures == load_backbone(tmp_path / "bert").model.config.architectures
    image = network()
    adapted = backbone_of(LoRA(r=2).apply(copy.deepcopy(image.model)))
    assert (adapted.task, adapted.labels) == (image.task, image.labels)
    assert adapted.data_config == image.data_config
    bare = timm.create_model("test_resnet", num_classes=3).eval()
    found = backbone_of(bare)
    assert (found.task, found.modality, found.labels) == ("image-classification", "image", None)
    assert found.data_config["input_size"] == (3, 160, 160)
    live = LiveTeacher(found, network(labels=3))
    assert live(pixels()).logits.shape == (4, 3)
    with pytest.raises(TransferError, match="Linear has neither a transformers configuration nor"):
        backbone_of(nn.Linear(1, 1))


def test_any_module_reads_the_students_images_as_they_are() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    teacher = as_teacher(module, network(labels=3))
    batch = pixels()
    torch.testing.assert_close(teacher(batch).logits, module(batch["pixel_values"]).detach())


def test_a_list_loads_each_and_logs_nothing_wrong(tmp_path, caplog) -> None:
    with caplog.at_level(logging.INFO, "hf_transfer"):
        folder: Path = image_backbone(tmp_path / "saved", labels=("z", "y", "x"))
        as_teacher([folder, folder], network())
    assert caplog.text.count("matched by name") == 2
