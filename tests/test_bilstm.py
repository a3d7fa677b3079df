"""The BiLSTM as a model of transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_transfer import load_backbone
from hf_transfer.anatomy import Anatomy
from hf_transfer.bilstm import BiLstmConfig, BiLstmForSequenceClassification

SIZES = {"vocab_size": 30, "embedding_size": 6, "hidden_size": 8, "num_hidden_layers": 2, "classifier_size": 5}


def network(**options: Any) -> Any:
    torch.manual_seed(0)
    config = BiLstmConfig(**{**SIZES, "pad_token_id": 0, "initializer_range": 1.0, **options})
    return BiLstmForSequenceClassification(config).eval()


def text(*lengths: int, left: bool = False) -> dict[str, torch.Tensor]:
    """Texts of these lengths, padded on one side to two more than the longest."""
    width = max(lengths) + 2
    ids, mask = torch.zeros(2, len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        at = slice(width - length, None) if left else slice(length)
        ids[row, at] = 1 + (torch.arange(length) * (row + 3)) % 29
        mask[row, at] = 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits


def by_hand(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """One text without padding through torch's two-layer LSTM, in float64."""
    lstm = torch.nn.LSTM(6, 4, num_layers=2, bidirectional=True, batch_first=True).double()
    for number, layer in enumerate(model.bilstm.layers):
        for key, value in layer.lstm.named_parameters():
            getattr(lstm, key.replace("_l0", f"_l{number}")).data.copy_(value)
    x = lstm(model.bilstm.embeddings.weight[ids][None].double())[0][0]  # (T, H)
    pooled = torch.cat([x.max(dim=0).values, x.mean(dim=0)])
    hidden = torch.relu(model.dense.weight.double() @ pooled + model.dense.bias)
    return model.classifier.weight.double() @ hidden + model.classifier.bias


@pytest.mark.parametrize("left", [False, True])
def test_padding_on_either_side_does_not_show(left: bool):
    model, inputs = network(num_labels=3), text(5, 1, 7, left=left)
    rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    expected = torch.stack([by_hand(model, ids[mask.bool()]) for ids, mask in rows])
    torch.testing.assert_close(logits(model, inputs).double(), expected, rtol=1e-5, atol=1e-6)


def test_without_a_mask_all_are_tokens_and_an_empty_text_is_finite():
    model = network()
    inputs = {"input_ids": torch.tensor([[3, 0, 5]])}
    torch.testing.assert_close(
        logits(model, inputs)[0].double(), by_hand(model, inputs["input_ids"][0]), rtol=1e-5, atol=1e-6
    )
    assert logits(model, {**inputs, "attention_mask": torch.zeros(1, 3)}).isfinite().all()


def test_loss_and_gradient_are_those_of_cross_entropy():
    model, labels = network(), torch.tensor([0, 1, 1])
    output = model(**text(4, 2, 6), labels=labels)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    output.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_it_saves_loads_and_is_fine_tuned_again_like_any_other(tmp_path: Path):
    model, inputs = network(num_labels=3), text(5, 3)
    model.save_pretrained(tmp_path)
    again = load_backbone(tmp_path)
    assert (again.task, again.modality, again.outputs) == ("text-classification", "text", 3)
    torch.testing.assert_close(logits(again.model, inputs), logits(model, inputs), rtol=0, atol=0)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path)  # registered: no trust_remote_code
    torch.testing.assert_close(logits(stock, inputs), logits(model, inputs), rtol=0, atol=0)
    second = load_backbone(tmp_path, labels=["p", "q"])
    assert logits(second.model, inputs).shape == (2, 2)
    assert second.model.fresh_parameters == ("classifier.bias", "classifier.weight")
    for key, value in model.state_dict().items():
        assert key.startswith("classifier.") or torch.equal(second.model.state_dict()[key], value)


def test_the_folder_brings_its_code(tmp_path: Path):
    network().save_pretrained(tmp_path)
    code = (tmp_path / "bilstm.py").read_text()
    assert "from ." not in code and "import hf_transfer" not in code and "from hf_transfer" not in code
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["auto_map"]["AutoModelForSequenceClassification"].startswith("bilstm.")


@pytest.mark.slow
def test_it_loads_where_this_package_is_not(tmp_path: Path):
    model, inputs = network(), text(5, 3)
    model.save_pretrained(tmp_path / "model")
    torch.save((inputs, logits(model, inputs)), tmp_path / "expected.pt")
    program = (
        "import sys, torch; sys.modules['hf_transfer'] = None\n"
        "from transformers import AutoModelForSequenceClassification as A\n"
        "inputs, expected = torch.load('expected.pt')\n"
        "model = A.from_pretrained('model', trust_remote_code=True)\n"
        "assert torch.equal(model(**inputs).logits, expected)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=300)


def test_anatomy_and_freezing_know_it():
    from hf_transfer.tuning import LinearProbe, PartialFreeze

    model = network()
    anatomy = Anatomy.of(model)
    assert anatomy.stem == ("bilstm.embeddings",)
    assert [block.name for block in anatomy.blocks] == ["bilstm.layers.0", "bilstm.layers.1"]
    assert anatomy.classifiers == ("classifier",)
    assert {anatomy.group(name) for name, _ in model.dense.named_parameters("dense")} == {4}
    PartialFreeze(1).apply(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith(("bilstm.layers.1.", "dense.", "classifier.")) for name in trained)
    probed = LinearProbe().apply(network())
    assert not any(parameter.requires_grad for parameter in probed.bilstm.parameters())


def test_new_layers_start_small_enough_to_learn():
    torch.manual_seed(0)
    model = BiLstmForSequenceClassification(BiLstmConfig(vocab_size=500, embedding_size=40, hidden_size=64))
    assert model.bilstm.embeddings.weight.std().item() == pytest.approx(0.1, rel=0.05)
    for weight in model.bilstm.layers[0].lstm.parameters():
        assert weight.abs().max().item() <= 32**-0.5  # torch's uniform bound for 32 units a direction
        assert weight.std().item() == pytest.approx((32 * 3) ** -0.5, rel=0.2)
    with pytest.raises(ValueError, match=r"hidden_size=7 must be even"):
        network(hidden_size=7)


def test_a_run_trains_it(tmp_path: Path):
    import tiny_runs as tiny

    from hf_transfer import finetune
    from hf_transfer.distillation.student import bilstm_student

    teacher = load_backbone(tiny.text_backbone(tmp_path / "teacher"), labels=list(tiny.LABELS))
    student = bilstm_student(teacher, hidden_size=8, embedding_size=8)
    before = student.model.bilstm.layers[0].lstm.weight_hh_l0.detach().clone()
    result = finetune(student, tiny.sentences(), output_dir=tmp_path / "run", **tiny.QUICK)
    assert not torch.equal(student.model.bilstm.layers[0].lstm.weight_hh_l0, before)
    assert load_backbone(result.folder).labels == list(tiny.LABELS)
