"""push() against a Hub on this machine: what arrives there, what does not, and that it loads into an empty cache."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import constants
from safetensors.torch import load

from hf_transfer.errors import TransferError
from hf_transfer.hub.card import CardFacts, write_card
from hf_transfer.hub.push import push

# huggingface_hub 2.4 itself uploads LFS files by httpx's deprecated `data=` (lfs._upload_single_part).
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

LABELS = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer({"hf_write": "alice", "hf_bob": "bob"}, readers={"hf_read": "alice"}) as server:
        yield server


@pytest.fixture
def online(hub, monkeypatch):
    """The Hub for calls in this process."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", hub.endpoint)
    return hub


def _model_folder(folder: Path, **facts: object) -> Path:
    """A folder that looks like a trained model's, with all that training leaves beside it."""
    (folder / "checkpoint-10").mkdir(parents=True)
    (folder / "runs").mkdir()
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "checkpoint-10/model.safetensors", "runs/log"):
        (folder / name).write_bytes(b"private")
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (folder / "trainer_state.json").write_text("{}")
    write_card(
        folder, CardFacts(name="m", task="text-classification", library="transformers", modality="text", **facts)
    )
    return folder


def _run(hub: HubServer, home: Path, program: str, *arguments: object, token: str | None = "hf_write") -> dict:
    """What a fresh process with an empty cache prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        env=hub.environment(token, home),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_what_arrives(online, tmp_path):
    folder = _model_folder(tmp_path / "m", dataset="stanfordnlp/sst2", metrics={"test": {"accuracy": 0.9}})
    (folder / "results.json").write_text(json.dumps({"model": f"{tmp_path}/bases/minilm", "n": [1]}))
    url = push(folder, "alice/arrives", token="hf_write", private=True)
    files = online.files("alice/arrives")
    assert set(files) == {
        ".gitattributes",
        ".eval_results/stanfordnlp--sst2.yaml",
        "README.md",
        "config.json",
        "model.safetensors",
        "results.json",
    }
    assert load(files["model.safetensors"])["weight"].tolist() == [1, 1]
    assert b'model="alice/arrives"' in files["README.md"]
    assert json.loads(files["results.json"]) == {"model": "minilm", "n": [1]}
    assert not any(str(tmp_path).encode() in content for content in files.values())
    repository = online.repositories["alice/arrives"]
    assert repository.private
    assert url == f"{online.endpoint}/alice/arrives/commit/{repository.branches['main']}"
    assert "<this model>" in (folder / "README.md").read_text()  # the folder itself stays as it is


def test_a_second_push_updates_and_a_branch_is_made(online, tmp_path):
    folder = _model_folder(tmp_path / "m")
    push(folder, "twice", token="hf_write")  # the token's own account
    before = dict(online.files("alice/twice"))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "new": True}))
    push(folder, "alice/twice", token="hf_write", revision="v2", commit_message="Second")
    assert online.files("alice/twice") == before
    assert b"new" in online.files("alice/twice", "v2")["config.json"]


@pytest.mark.parametrize(
    ("repo_id", "token", "message"),
    [
        ("alice/m", "hf_wrong", "does not accept the token"),
        ("alice/m", "hf_read", "may not write to alice/m"),
        ("bob/m", "hf_write", "may not write to bob/m"),
        ("not/a/repo", "hf_write", "'not/a/repo' is not a repository id"),
        ("alice/m m", "hf_write", "not a repository id"),
        ("alice/m", None, "No token"),
    ],
)
def test_refusals_are_one_clear_error(online, tmp_path, repo_id, token, message):
    with pytest.raises(TransferError, match=message):
        push(_model_folder(tmp_path / "m"), repo_id, token=token)
    assert repo_id not in online.repositories


def test_a_folder_that_cannot_be_pushed_is_refused_before_anything_is_created(online, tmp_path):
    requests = len(online.requests)
    folder = _model_folder(tmp_path / "m")
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text("no metadata")
    with pytest.raises(TransferError, match="has no card"):
        push(folder, "alice/x", token="hf_write")
    (folder / "README.md").write_text(card)
    (folder / "model.safetensors").unlink()
    with pytest.raises(TransferError, match=r"holds no model.*README\.md"):
        push(folder, "alice/x", token="hf_write")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    for base in (str(tmp_path / "base"), "../base", None):
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        with pytest.raises(TransferError, match="nobody else can load"):
            push(folder, "alice/x", token="hf_write")
    with pytest.raises(TransferError, match="No folder"):
        push(tmp_path / "absent", "alice/x", token="hf_write")
    assert len(online.requests) == requests


def test_offline_is_one_clear_error(tmp_path):
    with pytest.raises(TransferError, match="HF_HUB_OFFLINE"):  # as tests/conftest.py sets it
        push(_model_folder(tmp_path / "m"), "alice/m", token="hf_write")


MAKE_AND_PUSH = """
    import json, sys
    import torch
    from hf_transfer import LoRA, load_backbone
    from hf_transfer.hub.card import CardFacts, write_card
    from hf_transfer.hub.push import push
    from pathlib import Path

    torch.manual_seed(0)
    folder = Path(sys.argv[1])
    full = load_backbone("test_resnet", pretrained=False, labels=["cat", "dog", "owl"])
    torch.manual_seed(1)
    images = torch.randn(2, 3, 64, 64)
    full.model.train()(pixel_values=images)  # moves BatchNorm's statistics
    full.save(folder / "full")
    facts = dict(task="image-classification", labels=full.labels)
    write_card(folder / "full", CardFacts(name="full", library="timm", **facts))
    push(folder / "full", "alice/full")

    tuned = load_backbone("alice/full", labels=["ant", "bee"])
    tuned.model = LoRA(r=2).apply(tuned.model)
    with torch.no_grad():
        for name, parameter in tuned.model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.model.train()(pixel_values=images)
    tuned.save(folder / "lora")
    facts |= {"labels": tuned.labels, "base_model": "alice/full"}
    write_card(folder / "lora", CardFacts(name="lora", library="peft", **facts))
    push(folder / "lora", "alice/lora")

    logits = {}
    with torch.no_grad():
        for name, backbone in (("full", full), ("lora", tuned)):
            logits[name] = backbone.model.eval()(pixel_values=images).logits.tolist()
    print(json.dumps(logits))
"""
LOAD = """
    import json, sys
    from hf_transfer._torchvision import make_torchvision_importable
    make_torchvision_importable()
    import timm
    import torch
    from transformers import AutoConfig, AutoModelForImageClassification
    from hf_transfer import load_backbone

    torch.manual_seed(1)
    images = torch.randn(2, 3, 64, 64)
    config = AutoConfig.from_pretrained("alice/lora", subfolder="model_config")
    models = {
        "full transformers": AutoModelForImageClassification.from_pretrained("alice/full"),
        "full timm": timm.create_model("hf-hub:alice/full", pretrained=True),
        "full backbone": load_backbone("alice/full").model,
        "lora transformers": AutoModelForImageClassification.from_pretrained(
            "alice/lora", config=config, ignore_mismatched_sizes=True
        ),
        "lora backbone": load_backbone("alice/lora").model,
    }
    logits, labels = {}, {}
    with torch.no_grad():
        for name, model in models.items():
            output = model.eval()(images)
            logits[name] = getattr(output, "logits", output).tolist()
    labels = [load_backbone("alice/full").labels, load_backbone("alice/lora").labels]
    print(json.dumps([logits, labels]))
"""


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory) -> dict[str, list]:
    """Logits by name of a model and an adapter of it that another process made and pushed."""
    folder = tmp_path_factory.mktemp("made")
    return _run(hub, folder / "home", MAKE_AND_PUSH, folder)


def test_pushed_models_load_into_an_empty_cache_with_the_same_logits(hub, pushed, tmp_path, tmp_path_factory):
    loaded, labels = _run(hub, tmp_path / "home", LOAD, token=None)
    assert labels == [LABELS, ["ant", "bee"]]
    for name, logits in loaded.items():
        torch.testing.assert_close(torch.tensor(logits), torch.tensor(pushed[name.split()[0]]), msg=name)
    for name in ("full", "lora"):
        written = b"".join(hub.files(f"alice/{name}").values())
        assert str(tmp_path_factory.getbasetemp()).encode() not in written


def _run_examples(hub: HubServer, folder: Path, *repo_ids: str) -> list[str]:
    """What the examples of cards print, in a process with an empty cache and without this package."""
    codes = [hub.files(repo)["README.md"].decode().split("```python\n")[1].split("```")[0] for repo in repo_ids]
    torchvision = str(Path(__file__).parents[2] / "hf_transfer" / "_torchvision.py")  # a CPU torch may need it
    program = f"""
import json, os, runpy, sys
os.chdir({str(folder)!r})
runpy.run_path({torchvision!r})["make_torchvision_importable"]()
printed = []
for code in {codes!r}:
    exec(code, {{"print": lambda value: printed.append(str(value))}})
assert "hf_transfer" not in sys.modules
print(json.dumps(printed))
"""
    return _run(hub, folder / "home", program, token=None)


def test_the_cards_examples_run_without_this_package(hub, pushed, tmp_path):
    from PIL import Image

    Image.new("RGB", (80, 70), "red").save(tmp_path / "image.png")
    full, lora = _run_examples(hub, tmp_path, "alice/full", "alice/lora")
    assert full in LABELS
    assert lora in ("ant", "bee")


MAKE_TEXT_AND_PUSH = """
    import sys
    from pathlib import Path
    from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, BertTokenizer
    from hf_transfer import LoRA, load_backbone
    from hf_transfer.hub.bundle import save
    from hf_transfer.hub.card import CardFacts, write_card
    from hf_transfer.hub.push import push

    folder = Path(sys.argv[1])
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "sentence", "."]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    size = dict(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)

    def publish(name, model, library="transformers", **facts):
        save(model, folder / name, tokenizer)
        write_card(folder / name, CardFacts(name=name, library=library, modality="text", **facts))
        push(folder / name, f"alice/{name}")

    names = {0: "bad", 1: "good"}
    model = BertForSequenceClassification(BertConfig(**size, id2label=names, label2id={"bad": 0, "good": 1}))
    publish("classes", model, task="text-classification")
    number = BertForSequenceClassification(BertConfig(**size, num_labels=1, problem_type="regression"))
    publish("number", number, task="regression")
    publish("tags", BertForTokenClassification(BertConfig(**size)), task="token-classification")
    tuned = load_backbone("alice/classes", labels=["no", "yes", "maybe"])
    publish("adapter", LoRA(r=2).apply(tuned.model), "peft", task="text-classification", base_model="alice/classes")
    print("{}")
"""


@pytest.mark.slow
def test_examples_of_text_models_run(hub, tmp_path):
    _run(hub, tmp_path / "made", MAKE_TEXT_AND_PUSH, tmp_path / "models")
    printed = _run_examples(hub, tmp_path, *(f"alice/{name}" for name in ("classes", "number", "tags", "adapter")))
    assert "'label': 'good'" in printed[0] or "'label': 'bad'" in printed[0]
    assert printed[1].startswith("tensor([[")
    assert "'word': 'sentence'" in printed[2]
    assert printed[3] in ("no", "yes", "maybe")
