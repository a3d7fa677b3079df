"""The card: what the Hub's own parsers read from it, what a reader finds in it, and what must not be in it."""

from __future__ import annotations

import getpass
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from hf_transfer.errors import TransferError
from hf_transfer.hub.card import CardFacts, write_card
from hf_transfer.hub.leaks import hub_id, local_paths, shown_name, without_paths

FACTS = CardFacts(
    name="resnet18-cifar10",
    task="image-classification",
    library="timm",
    base_model="timm/resnet18.a1_in1k",
    dataset="uoft-cs/cifar10",
    labels=["cat", "dog"],
    counts={"train": 10_000, "test": 2_000},
    tuning="full",
    trainable_parameters=1_000,
    total_parameters=11_181_642,
    hyperparameters={"learning_rate": 1e-3, "num_train_epochs": 3.0, "warmup_steps": None},
    metrics={"validation": {"accuracy": 0.7525}, "test": {"loss": 0.7, "accuracy": 0.75125, "auroc": 0.9}},
    selection="The last checkpoint.",
    seed=42,
    versions={"transformers": "5.23.0", "torch": "2.15.0"},
)


def _card(folder: Path, **changes: object) -> tuple[dict, str]:
    path = write_card(folder, replace(FACTS, **changes))
    card = ModelCard.load(path)
    assert path.read_text() == str(card)  # the Hub's parser reads it and writes the same
    return card.data.to_dict(), card.text


def test_metadata(tmp_path):
    data, _ = _card(tmp_path, license="apache-2.0", tags=["timm"])
    results = data.pop("model-index")
    assert data == {
        "base_model": "timm/resnet18.a1_in1k",
        "base_model_relation": "finetune",
        "datasets": ["uoft-cs/cifar10"],
        "library_name": "timm",
        "license": "apache-2.0",
        "pipeline_tag": "image-classification",
        "tags": ["transfer-learning", "hf-transfer-learning", "timm"],
    }
    assert results[0]["name"] == "resnet18-cifar10"
    by_split = {r["dataset"]["split"]: {m["type"]: m["value"] for m in r["metrics"]} for r in results[0]["results"]}
    assert by_split == {"validation": {"accuracy": 0.7525}, "test": {"loss": 0.7, "accuracy": 0.75125, "auroc": 0.9}}
    assert {(r["dataset"]["type"], r["task"]["type"]) for r in results[0]["results"]} == {
        ("uoft-cs/cifar10", "image-classification")
    }
    assert "license" not in _card(tmp_path)[0]


@pytest.mark.parametrize(
    ("changes", "pipeline_tag"),
    [
        ({"task": "causal-lm", "modality": "text"}, "text-generation"),
        ({"task": "regression", "modality": "text"}, "text-classification"),
        ({"task": "token-classification", "modality": "text"}, "token-classification"),
    ],
)
def test_pipeline_tag(tmp_path, changes, pipeline_tag):
    assert _card(tmp_path, library="transformers", **changes)[0]["pipeline_tag"] == pipeline_tag


def test_text_says_how_the_model_came_to_be(tmp_path):
    text = " ".join(_card(tmp_path)[1].split())
    for fact in (
        "fine-tuned from [timm/resnet18.a1_in1k](https://huggingface.co/timm/resnet18.a1_in1k)",
        "[uoft-cs/cifar10](https://huggingface.co/datasets/uoft-cs/cifar10)",
        "| train | 10,000 |",
        "`cat`, `dog`",
        "| test | 0.7512 | 0.7000 | 0.9000 |",
        "The last checkpoint. Seed 42.",
        "Trained 1,000 of 11,181,642 parameters (0.00894 %)",
        "| `learning_rate` | `0.001` |",
        "transformers 5.23.0",
        'timm.create_model("hf-hub:<this model>"',
    ):
        assert fact in text, fact
    assert "warmup_steps" not in text


def test_a_card_says_nothing_it_does_not_know(tmp_path):
    path = write_card(
        tmp_path, CardFacts(name="m", task="text-classification", library="transformers", modality="text")
    )
    card = ModelCard.load(path)
    assert card.text.count("##") == 1  # only how to use it
    assert "None" not in path.read_text()
    assert "eval_results" not in card.data.to_dict()


def test_from_scratch_names_no_base_model(tmp_path):
    data, text = _card(tmp_path, pretrained=False)
    assert "base_model" not in data
    assert "from scratch" in text


def test_test_score_on_data_of_the_hub_is_a_hub_result(tmp_path):
    _card(tmp_path)
    [file] = (tmp_path / ".eval_results").iterdir()
    assert file.name == "uoft-cs--cifar10.yaml"
    [entry] = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("uoft-cs/cifar10", "default", 0.75125)
    assert entry.notes == "accuracy on 2,000 examples of the test split"


@pytest.mark.parametrize("changes", [{"dataset": "digits"}, {"metrics": {"validation": {"accuracy": 0.7}}}])
def test_other_scores_are_not(tmp_path, changes):
    _card(tmp_path, **changes)
    assert not (tmp_path / ".eval_results").exists()


def test_nothing_local_leaks(tmp_path, monkeypatch):
    home = tmp_path / "home" / "alice"
    base, data, out = home / "models" / "resnet18", tmp_path / "data" / "xrays", tmp_path / "out"
    for folder in (base, data, out):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    write_card(
        out,
        replace(
            FACTS,
            name=str(out),
            base_model=str(base),
            dataset=str(data),
            library="peft",
            selection=f"The best of {home}/runs/7 on validation.",
            hyperparameters={"output_dir": str(out), "deepspeed": "~/ds.json", "config": "C:\\Users\\alice\\c.yaml"},
            versions={"torch": "2.15.0"},
        ),
    )
    written = "\n".join(p.read_text() for p in out.rglob("*") if p.is_file())
    for secret in (str(tmp_path), "/tmp", str(home), "alice", "~", "Users", platform.node()):
        assert secret not in written, secret
    if getpass.getuser() != "root":
        assert getpass.getuser() not in written
    assert "base_model" not in ModelCard.load(out / "README.md").data.to_dict()
    for kept in ("`resnet18`", "`xrays`", "The best of 7 on validation.", "`ds.json`", "`c.yaml`"):
        assert kept in written, kept


def test_a_folder_that_looks_like_a_hub_id_is_not_one(tmp_path, monkeypatch):
    (tmp_path / "models" / "resnet18").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("models/resnet18") is None
    assert hub_id("models/resnet50") == "models/resnet50"
    assert hub_id("hf-hub:timm/resnet18.a1_in1k") == "timm/resnet18.a1_in1k"
    for name in ("resnet18", "torchvision/alexnet", "./a/b", "../shared", "a/b/c", "/a/b", "~/a", "a b/c"):
        assert hub_id(name) is None, name
    assert shown_name("../shared/weights/mobilenet/") == "mobilenet"
    assert shown_name("torchvision/alexnet") == "alexnet"


def test_local_paths_are_found_and_addresses_are_not():
    text = "see https://huggingface.co/home/me, image/png, 1/2, ./runs/a, /home/me/x and 'file:///mnt/d/e', /data."
    assert local_paths(text) == ["/home/me/x", "file:///mnt/d/e"]
    assert without_paths("(/home/me/models/net/)") == "(net)"


def test_no_folder_is_one_clear_error(tmp_path):
    with pytest.raises(TransferError, match="No folder"):
        write_card(tmp_path / "absent", FACTS)


def test_a_failed_write_leaves_the_old_card_whole(tmp_path, monkeypatch):
    before = write_card(tmp_path, FACTS).read_text()

    def full_disk(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_card(tmp_path, replace(FACTS, seed=7))
    assert (tmp_path / "README.md").read_text() == before
