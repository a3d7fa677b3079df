"""DistillationTrainer: what a user passes, live and cached teachers, fidelity, resume, what is saved."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_runs as tiny
import torch
from torch.utils.data import IterableDataset

from hf_transfer import Backbone, DistillationConfig, DistillationTrainer, TransferError, load_backbone, load_data
from hf_transfer.data.collate import collator_for
from hf_transfer.data.transforms import prepare
from hf_transfer.distillation.cache import CachedTeacher
from hf_transfer.evaluation import compute_metrics_for
from hf_transfer.objectives import CRD, DKD, Hint, LogitMSE, LogitStandardization, SoftTargets

CLASSES = ["0", "1", "2"]


@pytest.fixture(scope="module")
def data() -> Any:
    return load_data(tiny.digits(classes=CLASSES), seed=0)


def network(seed: int, labels: list[str] | None = None, name: str = "test_resnet") -> Backbone:
    torch.manual_seed(seed)
    return load_backbone(name, labels=labels or CLASSES, pretrained=False, image_size=32, in_chans=1)


@pytest.fixture(scope="module")
def teacher() -> Backbone:
    return network(1)


def make(
    folder: Path, data: Any, student: Backbone, teacher: Any, terms: Any = None, augment: str = "light", **options: Any
) -> DistillationTrainer:
    rows = {name: prepare(split, student, data.columns, train=name == "train", augment=augment) for name, split in
            data.splits.items()}  # fmt: skip
    settings = {
        "output_dir": str(folder / "run"), "per_device_train_batch_size": 10, "num_train_epochs": 2,
        "learning_rate": 1e-3, "use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no",
        "logging_steps": 1, "batch_eval_metrics": True, "teacher_cache_dir": str(folder / "caches"),
        "teacher_cache": "never", "seed": 3,
    }  # fmt: skip
    return DistillationTrainer(
        model=student, teacher=teacher, objectives=terms, args=DistillationConfig(**{**settings, **options}),
        train_dataset=rows["train"], eval_dataset=rows["validation"], data_collator=collator_for(student),
        compute_metrics=compute_metrics_for("image-classification", student.labels),
    )  # fmt: skip


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def test_the_student_moves_to_its_teacher_and_the_teacher_stays(tmp_path: Path, data: Any, teacher: Backbone) -> None:
    before, student = weights(teacher.model), network(2)
    trainer = make(tmp_path, data, student, teacher, hard_weight=0.0, num_train_epochs=6, learning_rate=1e-2)
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    assert last["eval_kl"] < 0.5 * first["eval_kl"]
    same(weights(teacher.model), before)
    assert all(p.grad is None for p in teacher.model.parameters())
    assert trainer.model is student.model
    assert [term.name for term in trainer.objectives] == ["soft_targets"]


def test_labels_are_one_more_term_with_their_weight(tmp_path: Path, data: Any, teacher: Backbone) -> None:
    trainer = make(tmp_path, data, network(2), teacher, hard_weight=0.25, max_steps=1)
    assert [(t.name, t.weight) for t in trainer.objectives] == [("soft_targets", 0.9), ("cross_entropy", 0.25)]
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(0.9 * log["soft_targets"] + 0.25 * log["cross_entropy"], rel=1e-5)


def test_rows_without_labels_teach_too(tmp_path: Path, data: Any, teacher: Backbone) -> None:
    trainer = make(tmp_path, data, network(2), teacher, hard_weight=0.0, max_steps=2)
    trainer.train_dataset = trainer.train_dataset.remove_columns("labels")
    trainer.train()
    assert trainer.state.log_history[0]["soft_targets"] > 0


def test_a_student_that_is_its_teacher_agrees_with_it(tmp_path: Path, data: Any, teacher: Backbone) -> None:
    twin = Backbone(copy.deepcopy(teacher.model), *[getattr(teacher, n) for n in
                    ("processor", "modality", "task", "name", "labels", "data_config")])  # fmt: skip
    found = make(tmp_path, data, twin, teacher, baseline_score=0.0).evaluate()
    assert found["eval_agreement"] == 1.0
    assert found["eval_kl"] == pytest.approx(0.0, abs=1e-6)
    assert found["eval_student_accuracy"] == found["eval_teacher_accuracy"] == pytest.approx(found["eval_accuracy"])
    assert found["eval_gain_recovered"] == pytest.approx(1.0)


def test_two_evaluation_sets_that_number_their_rows_alike_are_told_apart(
    tmp_path: Path, data: Any, teacher: Backbone
) -> None:
    trainer = make(tmp_path, data, network(2), teacher)
    raw = data.splits["train"].remove_columns("example_id")
    low, high = (prepare(raw.select(rows), trainer.student, data.columns, train=False) for rows in ([0, 1], [7, 8]))
    scored = [trainer.evaluate(rows)["eval_teacher_nll"] for rows in (low, high)]
    alone = [make(tmp_path, data, network(2), teacher).evaluate(rows)["eval_teacher_nll"] for rows in (low, high)]
    assert scored == pytest.approx(alone)
    assert alone[0] != pytest.approx(alone[1])


def test_a_teacher_with_its_classes_in_another_order_is_put_right(
    tmp_path: Path, data: Any, teacher: Backbone
) -> None:
    order = [2, 0, 1]
    permuted = Backbone(copy.deepcopy(teacher.model), *[getattr(teacher, n) for n in
                        ("processor", "modality", "task", "name", "labels", "data_config")])  # fmt: skip
    permuted.labels = [CLASSES[i] for i in order]
    head = permuted.model.get_submodule(permuted.anatomy.classifiers[0])
    head.weight.data, head.bias.data = head.weight.data[order], head.bias.data[order]
    permuted.model.config.id2label = dict(enumerate(permuted.labels))
    trained = []
    for given in (teacher, permuted):
        trainer = make(tmp_path, data, network(2), given, max_steps=2)
        trainer.train()
        trained.append(weights(trainer.model))
    same(*trained, rtol=1e-5, atol=1e-6)


def test_warns_of_a_teacher_that_is_worse_than_its_student(
    tmp_path: Path, data: Any, teacher: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tmp_path, data, network(2), teacher)
    with caplog.at_level(logging.WARNING, logger="hf_transfer"):
        trainer._warn_of({"student_accuracy": 0.8, "teacher_accuracy": 0.7, "student_ece": 0.0, "teacher_ece": 0.0})
    assert "better than its teacher" in caplog.text


@pytest.mark.parametrize("augment", ["none", "light"])
def test_a_cached_teacher_teaches_what_the_live_one_does(
    tmp_path: Path, data: Any, teacher: Backbone, augment: str
) -> None:
    """Two views for two epochs: each row is seen under the augmentation that its live teacher would have seen."""
    trained = {}
    for mode in ("never", "always"):
        trainer = make(tmp_path, data, network(2), teacher, augment=augment, teacher_cache=mode, optim="sgd")
        trainer.train()
        trained[mode] = weights(trainer.model)
    assert isinstance(trainer.training_teacher, CachedTeacher)
    assert trainer.training_teacher.views == (1 if augment == "none" else 2)
    same(trained["always"], trained["never"], rtol=2e-2, atol=2e-3)  # kept in half precision
    logits = next((tmp_path / "caches").glob("*/shards/*.logits"))
    written = logits.stat().st_mtime_ns
    again = make(tmp_path, data, network(2), teacher, augment=augment, teacher_cache="auto", optim="sgd")
    again.train()
    assert logits.stat().st_mtime_ns == written  # a complete cache is found again, and used
    same(weights(again.model), trained["always"])


def test_a_cache_that_is_given_must_be_of_these_rows_as_they_are_seen(
    tmp_path: Path, data: Any, teacher: Backbone
) -> None:
    written = make(tmp_path, data, network(2), teacher, teacher_cache="always", max_steps=1)
    written.train()
    cache = written.training_teacher
    assert isinstance(cache, CachedTeacher)
    assert cache.cache.manifest.contents.about == f"{teacher.name}; {len(data.splits['train'])} rows, 1 view(s)"
    given = make(tmp_path, data, network(2), cache, max_steps=1)
    given.train()
    same(weights(given.model), weights(written.model))
    with pytest.raises(TransferError, match="another transform"):
        make(tmp_path, data, network(2), cache, augment="geometric", max_steps=1).train()
    mixed = make(tmp_path, data, network(2), cache, max_steps=1)
    mixed.data_collator = collator_for(mixed.student, mixup=0.5)
    with pytest.raises(TransferError, match="mixup and CutMix"):
        mixed.train()


def test_auto_measures_and_says_what_it_chose(
    tmp_path: Path, data: Any, teacher: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="hf_transfer"):
        make(tmp_path, data, network(2), teacher, teacher_cache="auto", max_steps=1).train()
    assert "Teacher live: the teacher takes" in caplog.text  # one step is no reason to ask about every row
    assert ", 1 view(s); " in caplog.text
    assert not (tmp_path / "caches").exists()


def test_what_cannot_be_cached_is_said_before_training(tmp_path: Path, data: Any, teacher: Backbone) -> None:
    with pytest.raises(TransferError, match=r"\['hint'\] read the teacher's layers"):
        make(tmp_path, data, network(2), teacher, [Hint()], teacher_cache="always").train()
    with pytest.raises(TransferError, match=r"\['logit_mse'\] need all logits"):
        make(tmp_path, data, network(2), teacher, [LogitMSE()], teacher_cache="always", teacher_cache_top_k=2).train()
    standard = [LogitStandardization(SoftTargets())]
    with pytest.raises(TransferError, match=r"\['standardized_soft_targets'\] need all logits"):
        make(tmp_path, data, network(2), teacher, standard, teacher_cache="always", teacher_cache_top_k=2).train()
    moving = [SoftTargets(temperature=lambda progress: 4 - progress)]
    with pytest.raises(TransferError, match=r"temperature of \['soft_targets'\] moves"):
        make(tmp_path, data, network(2), teacher, moving, teacher_cache="always", teacher_cache_top_k=2).train()
    trainer = make(tmp_path, data, network(2), teacher, teacher_cache="always")
    trainer.train_dataset = [trainer.train_dataset[i] for i in range(10)]
    with pytest.raises(TransferError, match=r"not a datasets\.Dataset"):
        trainer.train()


def test_the_largest_logits_teach_too(tmp_path: Path, data: Any, teacher: Backbone) -> None:
    trainer = make(tmp_path, data, network(2), teacher, [SoftTargets(2.0)], teacher_cache="always",
                   teacher_cache_top_k=2, max_steps=2)  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["soft_targets"] > 0


def test_layers_of_a_wider_teacher_are_compared_through_a_projector(tmp_path: Path, data: Any) -> None:
    wide = network(1, name="test_resnet")
    student = network(2, name="test_convnext")
    trainer = make(tmp_path, data, student, wide, [Hint(layers="last"), Hint(layers="features", name="pooled")],
                   max_steps=2, save_strategy="steps", save_steps=1)  # fmt: skip
    projectors = weights(trainer.learner.objectives)
    assert projectors
    trainer.train()
    moved = weights(trainer.learner.objectives)
    assert any(not torch.equal(moved[name], projectors[name]) for name in projectors)
    saved = torch.load(tmp_path / "run" / "checkpoint-2" / "transfer_state.pt", weights_only=True)
    assert set(saved["objectives"]) == set(moved)
    reloaded = load_backbone(tmp_path / "run" / "checkpoint-2")
    same(weights(reloaded.model), weights(trainer.model))  # the student alone: no teacher, no projector


@pytest.mark.parametrize("cache", ["never", "always"])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path: Path, data: Any, teacher: Backbone, cache: str) -> None:
    """With a memory bank, a projector, a schedule and views: bit for bit."""

    def terms() -> list[Any]:
        torch.manual_seed(0)
        layered = [] if cache == "always" else [Hint(layers="last", weight=lambda progress: 1 - progress)]
        bank = CRD(size=200, negatives=8, width=4)
        return [DKD(temperature=lambda progress: 4 - progress), bank, *layered]

    def run(name: str, stop: int | None, resume: bool) -> dict[str, torch.Tensor]:
        trainer = make(
            tmp_path, data, network(2), teacher, terms(), output_dir=str(tmp_path / name), num_train_epochs=3,
            save_strategy="steps", save_steps=7, teacher_cache=cache, teacher_cache_views=2,
        )  # fmt: skip
        if stop is not None:
            trainer.add_callback(StopAt(stop))
        torch.manual_seed(100 + resume)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.learner is not None
        return weights(trainer.learner)

    from invariants.test_resume import StopAt

    whole = run("whole", None, False)
    run("cut", 7, False)
    same(run("cut", None, True), whole)


def test_bad_arguments_are_refused_at_once(tmp_path: Path, data: Any, teacher: Backbone) -> None:
    for options, message in (
        ({"hard_weight": -1.0}, "hard_weight=-1.0"),
        ({"teacher_cache": "sometimes"}, "one of auto, always, never"),
        ({"teacher_cache_views": 0}, "teacher_cache_views=0"),
        ({"baseline_score": 55.0}, r"in \[0, 1\]"),
    ):
        with pytest.raises(TransferError, match=message):
            make(tmp_path, data, network(2), teacher, **options)
    with pytest.raises(TransferError, match="must be the student"):
        DistillationTrainer("resnet18", teacher, args=DistillationConfig(output_dir=str(tmp_path)))
    with pytest.raises(TransferError, match="3"):
        make(tmp_path, data, network(2), network(1, labels=["0", "1", "x"]))


def test_streamed_rows_have_a_live_teacher(tmp_path: Path, data: Any, teacher: Backbone) -> None:
    trainer = make(tmp_path, data, network(2), teacher, teacher_cache="auto", max_steps=2)

    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(rows)

    rows = trainer.train_dataset
    trainer.train_dataset = Stream()
    trainer.train()
    assert trainer.state.log_history[0]["soft_targets"] > 0
