"""load_backbone() from the Hub, played by a server of our own: ids, timm names, adapters, the cache, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import backbone_zoo as zoo
import pytest
import torch
from hub_server import HubServer, Repository, _Refused
from peft import LoraConfig, get_peft_model

from hf_transfer import TransferError
from hf_transfer.backbones import load_backbone
from hf_transfer.hub import bundle
from hf_transfer.loading.failures import explained

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ASK = """
import json, sys, torch
torch.set_num_threads(1)
from hf_transfer import TransferError, load_backbone
said = {}
for key, (name, options) in json.load(open(sys.argv[1])).items():
    try:
        backbone = load_backbone(name, **options)
        with torch.no_grad():
            output = backbone.model(torch.load(f"{key}.pt"))
        said[key] = {"logits": output.logits.tolist(), "labels": backbone.labels, "name": backbone.name}
    except TransferError as error:
        said[key] = {"error": str(error)}
json.dump(said, open(sys.argv[2], "w"))
"""


class Gated:
    """A repository that answers every request for it with a refusal."""

    def __init__(self, status: int, code: str):
        self.refusal = _Refused(status, "Access to this model is restricted", code)

    @property
    def private(self) -> bool:
        raise self.refusal


def upload(hub: HubServer, repo: str, folder: Path, **replacements: str) -> None:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for old, new in replacements.items():
        files = {name: content.replace(old.encode(), new.encode()) for name, content in files.items()}
    hub.repositories[repo] = Repository(private=False)
    hub.repositories[repo].commit("main", files)


def ask(questions: dict, folder: Path, environment: dict[str, str]) -> dict[str, dict]:
    """Answers of load_backbone() in a process with that environment."""
    (folder / "questions.json").write_text(json.dumps(questions))
    environment = {**environment, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", ASK, "questions.json", "answers.json"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / "answers.json").read_text())


LOADED = {
    "named": ["resnet10t", {}],
    "text": ["alice/text", {"labels": ["x", "y", "z"]}],
    "adapter": ["alice/adapter", {}],
}
REFUSED = {
    "gated": ["big/gated", {}],
    "forbidden": ["big/forbidden", {}],
    "missing": ["alice/absent", {}],
    "near": ["timm/resnet10t.c4_in1k", {}],
    "revision": ["alice/text", {"revision": "v9"}],
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The logits to expect, what load_backbone() said online, and the cache that it left."""
    folder = tmp_path_factory.mktemp("hub")
    timm_folder = zoo.timm_folder(folder / "resnet")
    text_folder = zoo.bert_folder(folder / "text")
    named, text = load_backbone(timm_folder), load_backbone(text_folder)
    adapted = load_backbone(text_folder, labels=["p", "q"])
    adapted.model = get_peft_model(adapted.model, LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    bundle.save(adapted.model, folder / "adapter", adapted.processor)
    models = {"named": (named, zoo.images()), "text": (text, zoo.tokens()), "adapter": (adapted, zoo.tokens())}
    expected = {}
    for key, (backbone, inputs) in models.items():
        expected[key] = zoo.logits(backbone.model, inputs)
        torch.save(inputs, folder / f"{key}.pt")
    with HubServer({}) as hub:
        upload(hub, "timm/resnet10t.c3_in1k", timm_folder)
        upload(hub, "alice/text", text_folder)
        upload(hub, "alice/adapter", folder / "adapter", **{str(text_folder): "alice/text"})
        hub.repositories["big/gated"] = Gated(403, "GatedRepo")
        hub.repositories["big/forbidden"] = Gated(403, "")
        online = ask({**LOADED, **REFUSED}, folder, hub.environment(None, folder / "home"))
    return expected, online, folder / "home" / "hub"


LABELS = {"named": ["cat", "dog", "eel"], "text": ["x", "y", "z"], "adapter": ["p", "q"]}


@pytest.mark.parametrize("key", LOADED)
def test_ids_names_and_adapters_load_from_the_hub(answers, key: str):
    expected, online, _ = answers
    assert "error" not in online[key], online[key]
    torch.testing.assert_close(torch.tensor(online[key]["logits"]), expected[key])
    assert online[key]["labels"] == LABELS[key]


def test_a_bare_timm_name_is_its_hub_id(answers):
    assert answers[1]["named"]["name"] == "timm/resnet10t.c3_in1k"


@pytest.mark.parametrize("key", LOADED)
def test_what_was_loaded_once_loads_offline_from_the_cache(answers, key: str):
    expected, _, cache = answers
    name, options = LOADED[key]
    backbone = load_backbone(name, cache_dir=cache, **options)  # the tests run with HF_HUB_OFFLINE=1
    inputs = zoo.images() if key == "named" else zoo.tokens()
    torch.testing.assert_close(zoo.logits(backbone.model, inputs), expected[key])
    assert backbone.labels == LABELS[key]


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("gated", ["'big/gated' is gated", "/big/gated", "hf auth login"]),
        ("forbidden", ["'big/forbidden' is gated", "token="]),
        ("missing", ["'alice/absent' is neither a folder here nor a model on the Hub", "if it is private"]),
        ("near", ["neither a folder here nor a model on the Hub", "Near it in timm: ", "resnet10t.c3_in1k"]),
        ("revision", ["'alice/text' has no such revision"]),
    ],
)
def test_each_refusal_says_what_to_do(answers, key: str, parts: list[str]):
    said = answers[1][key]["error"]
    for part in parts:
        assert part in said


@pytest.mark.slow
def test_a_hub_that_does_not_answer(tmp_path: Path):
    with HubServer({}) as hub:
        environment = hub.environment(None, tmp_path / "home")
    said = ask({"gone": ["alice/text", {}]}, tmp_path, environment)["gone"]["error"]
    assert "'alice/text' is not in the local cache" in said
    assert f"the Hub at {environment['HF_ENDPOINT']} cannot be reached" in said


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch):
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    refused = LocalEntryNotFoundError("cannot find the file")
    refused.__cause__ = ConnectionError("Temporary failure in name resolution")
    said = r"'alice/text' is not in the local cache, and the Hub at .* cannot be reached \(Temporary failure"
    with pytest.raises(TransferError, match=said), explained("alice/text"):
        raise refused
