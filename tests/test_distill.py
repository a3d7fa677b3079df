"""distill(): one call from a teacher, a student and data to a run folder, for every modality."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny_runs as tiny
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_transfer import LoRA, TransferError, distill, finetune, load_backbone
from hf_transfer.cli import results_table
from hf_transfer.distill import DistillationRun

CLASSES = ["0", "1", "2"]
QUICK: dict[str, Any] = {**tiny.QUICK, "teacher_cache": "never", "save_strategy": "no"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of three digits."""
    folder = tmp_path_factory.mktemp("images")
    return finetune(
        "test_resnet", tiny.digits(classes=CLASSES), pretrained=False, image_size=32, output_dir=folder, **tiny.QUICK
    ).folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of sentences, with two layers."""
    folder = tmp_path_factory.mktemp("texts")
    base = tiny.text_backbone(folder / "base")
    return finetune(base, tiny.sentences(), output_dir=folder / "run", **tiny.QUICK).folder


def test_a_run_folder_tells_of_student_and_teacher(images: Path, tmp_path: Path) -> None:
    data = tiny.digits(classes=CLASSES)
    plain = finetune("test_convnext", data, pretrained=False, image_size=32, output_dir=tmp_path / "a", **tiny.QUICK)
    result = distill(
        images, "test_convnext", data, pretrained=False, image_size=32, output_dir=tmp_path / "b",
        objectives=["SoftTargets(temperature=2.0, weight=0.9)", "Hint(layers='last')"], baseline=str(plain.folder),
        **QUICK,
    )  # fmt: skip
    facts = tiny.results(tmp_path / "b")
    assert facts["teacher"] == images.name
    assert "SoftTargets" in facts["objectives"][0] and "temperature=2.0" in facts["objectives"][0]
    for split in ("validation", "test"):
        scores = facts["metrics"][split]
        assert {"accuracy", "teacher_accuracy", "agreement", "kl", "student_ece", "teacher_nll"} <= scores.keys()
        before = plain.metrics[split]["accuracy"]
        gain = scores["teacher_accuracy"] - before
        expected = (scores["accuracy"] - before) / gain if gain > 0 else None
        assert scores["gain_recovered"] == (None if expected is None else pytest.approx(expected))
    assert facts["costs"]["macs_a_row"]["student"] < facts["costs"]["macs_a_row"]["teacher"]
    assert facts["costs"]["latency_student_to_teacher"]["ratio"] > 0
    temperature = facts["calibration"]["temperature"]
    assert result.model.config.calibration_temperature == temperature
    assert AutoConfig.from_pretrained(tmp_path / "b").calibration_temperature == temperature
    card = (tmp_path / "b" / "README.md").read_text()
    assert f"distilled from `{images.name}`" in card and "knowledge-distillation" in card
    assert f"{facts['costs']['macs_a_row']['student']:,}" in card and "config.calibration_temperature" in card
    assert "agreement" in results_table(tmp_path / "b")
    reloaded = load_backbone(tmp_path / "b")
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(tiny.logits(reloaded.model, pixel_values=x), tiny.logits(result.model, pixel_values=x))


@pytest.mark.parametrize("model", ["carve:1", "carve:1,0", "born-again", "bilstm"])
def test_a_student_made_from_its_teacher(texts: Path, tmp_path: Path, model: str) -> None:
    if model == "carve:1,0":
        with pytest.raises(TransferError, match="1, 0"):
            distill(texts, model, tiny.sentences(), output_dir=tmp_path, **QUICK)
        return
    result = distill(texts, model, tiny.sentences(), output_dir=tmp_path, **QUICK)
    assert result.metrics["test"]["agreement"] >= 0
    reloaded = load_backbone(tmp_path)
    assert reloaded.labels == list(tiny.LABELS)
    ids = torch.tensor([[2, 5, 6, 3]])
    mine, theirs = (tiny.logits(m, input_ids=ids, attention_mask=ids > 0) for m in (result.model, reloaded.model))
    torch.testing.assert_close(mine, theirs)
    if model.startswith("carve"):
        assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.num_hidden_layers == 1


def test_a_teacher_with_another_tokenizer_reads_the_same_texts(texts: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    other: PreTrainedTokenizerFast = tiny.tokenizer()
    other.add_tokens(["extra"])
    torch.manual_seed(3)
    BertModel(BertConfig(vocab_size=19, max_position_embeddings=24, **tiny._SIZE)).save_pretrained(tmp_path / "base")
    other.save_pretrained(tmp_path / "base")
    result = distill(texts, tmp_path / "base", tiny.sentences(), output_dir=tmp_path / "run", **QUICK)
    expected = tiny.results(texts)["metrics"]["test"]["accuracy"]
    assert result.metrics["test"]["teacher_accuracy"] == pytest.approx(expected)  # it read its own ids, not ours


@pytest.mark.parametrize(
    "options",
    [{}, {"chunk_tokens": 8}, {"chunk_tokens": 8, "teacher_cache": "always", "teacher_cache_top_k": 4}],
    ids=["whole", "chunked", "chunked from a cache"],
)
def test_a_language_model(tmp_path: Path, options: Any) -> None:
    teacher = tiny.language_model(tmp_path / "teacher")
    rows = datasets.Dataset.from_dict({"text": tiny.texts(12)})
    data = datasets.DatasetDict(train=rows, validation=rows)
    settings = {**QUICK, "teacher_cache_dir": str(tmp_path / "caches"), **options}
    result = distill(teacher, "carve:1", data, task="causal-lm", output_dir=tmp_path / "run", **settings)
    assert (tmp_path / "caches").exists() == ("teacher_cache" in options)
    assert {"perplexity", "kl", "agreement"} <= result.metrics["validation"].keys()


def test_words_and_numbers(tmp_path: Path) -> None:
    base = tiny.text_backbone(tmp_path / "base")
    for name, data in (("words", tiny.tagged_words()), ("numbers", tiny.ratings())):
        teacher = finetune(base, data, output_dir=tmp_path / name, **tiny.QUICK).folder
        result = distill(teacher, "carve:1", data, output_dir=tmp_path / f"{name}-student",
                         **QUICK)  # fmt: skip
        measure = "agreement" if name == "words" else "student_teacher_mse"
        assert result.metrics["validation"][measure] >= 0


def test_sound(tmp_path: Path) -> None:
    teacher = finetune(tiny.spectrogram_transformer(tmp_path / "base"), tiny.tones(), output_dir=tmp_path / "teacher",
                       label_column="label", **tiny.QUICK).folder  # fmt: skip
    result = distill(teacher, "carve:1", tiny.tones(), label_column="label", output_dir=tmp_path / "run", **QUICK)
    assert 0 <= result.metrics["test"]["agreement"] <= 1


def test_a_lora_student_and_several_teachers(texts: Path, tmp_path: Path) -> None:
    student = tiny.text_backbone(tmp_path / "base")
    result = distill([texts, texts], student, tiny.sentences(), tuning="lora", lora_r=2, output_dir=tmp_path / "run",
                     **QUICK)  # fmt: skip
    assert result.facts["teacher"] == f"{texts.name}, {texts.name}"
    one = distill(texts, student, tiny.sentences(), tuning="lora", lora_r=2, output_dir=tmp_path / "one", **QUICK)
    for name in ("kl", "teacher_nll"):  # two equal teachers are one
        assert result.metrics["test"][name] == pytest.approx(one.metrics["test"][name], rel=1e-4, abs=1e-6)
    assert (tmp_path / "run" / "adapter_config.json").exists()


def test_a_lora_student_of_its_own_base(texts: Path, tmp_path: Path) -> None:
    student = load_backbone(texts)
    student.model = LoRA(r=2).apply(student.model)
    from hf_transfer import DistillationConfig, DistillationTrainer
    from hf_transfer.distillation.teacher import AdapterOffTeacher

    trainer = DistillationTrainer(
        student, AdapterOffTeacher(student), args=DistillationConfig(output_dir=str(tmp_path), use_cpu=True)
    )
    assert trainer.teacher.backbone.model is trainer.model  # no second copy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "carve:many"}, "carve:3"),
        ({"objectives": ["SoftTarget"]}, "SoftTargets"),
        ({"baseline": "nowhere"}, "nowhere"),
        ({"metric_for_best_model": "agrement"}, "did you mean 'agreement'"),
        ({"cache": "always"}, "teacher_cache"),
        ({"tuning": "gradual"}, "several phases"),
        ({"temperature": 2.0}, "Unknown option 'temperature'"),
    ],
)
def test_bad_input_is_one_error_before_any_work(texts: Path, tmp_path: Path, options: Any, message: str) -> None:
    given = {"model": "carve:1", **options}
    with pytest.raises(TransferError, match=message):
        distill(texts, given.pop("model"), tiny.sentences(), output_dir=tmp_path / "run", **given, **QUICK)
    assert not (tmp_path / "run").exists()


def test_an_adapter_teaches_folded_into_its_base(tmp_path: Path) -> None:
    """Its head too, which the base lacks."""
    base = tiny.text_backbone(tmp_path / "base")
    adapter = finetune(base, tiny.sentences(), tuning="lora", lora_r=2, output_dir=tmp_path / "adapter",
                       **tiny.QUICK)  # fmt: skip
    result = distill(adapter.folder, "carve:1", tiny.sentences(), output_dir=tmp_path / "run", **QUICK)
    expected = adapter.metrics["test"]["accuracy"]
    assert result.metrics["test"]["teacher_accuracy"] == pytest.approx(expected)
    full = load_backbone(base, labels=list(tiny.LABELS), task="text-classification").model
    assert result.facts["costs"]["parameters"]["teacher"] == sum(p.numel() for p in full.parameters())


def test_one_backbone_as_both_learns_from_itself_with_the_adapter_off(
    texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = load_backbone(texts)
    with caplog.at_level(logging.INFO, logger="hf_transfer"):
        result = distill(base, base, tiny.sentences(), tuning="lora", lora_r=2, output_dir=tmp_path / "run", **QUICK)
    assert "the teacher is the student's own base, with the adapter off" in caplog.text
    assert result.metrics["test"]["teacher_accuracy"] == pytest.approx(
        tiny.results(texts)["metrics"]["test"]["accuracy"]
    )


def test_a_student_is_not_made_from_a_teacher_of_another_task(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="is for text-classification, and the data is for regression"):
        distill(texts, "carve:1", tiny.ratings(), output_dir=tmp_path / "run", **QUICK)


def test_a_baseline_speaks_for_its_own_splits_only(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "results.json").write_text('{"metrics": {"validation": {"accuracy": 0.25}}}')
    result = distill(texts, "carve:1", tiny.sentences(), output_dir=tmp_path / "run",
                     baseline=str(tmp_path / "plain"), **QUICK)  # fmt: skip
    assert "gain_recovered" in result.metrics["validation"] and "gain_recovered" not in result.metrics["test"]
    evaluated = [entry for entry in result.history if "eval_agreement" in entry]
    assert evaluated and all("eval_gain_recovered" in entry for entry in evaluated)  # during training too


def test_a_run_needs_a_teacher() -> None:
    with pytest.raises(TransferError, match="--teacher"):
        DistillationRun(model="resnet18", dataset="digits")
