"""finetune(push_to_hub=True): the finished run folder is uploaded once; what would fail fails before training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_runs as tiny
from hub_server import HubServer
from huggingface_hub import constants
from transformers import TrainerCallback

from hf_transfer import TransferError, TransferTrainer, finetune, load_backbone

# huggingface_hub 2.4 itself uploads LFS files by httpx's deprecated `data=` (lfs._upload_single_part).
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer({"hf_write": "alice"}) as hub:
        yield hub


@pytest.fixture
def hub(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The Hub for calls in this process, with no repositories yet."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", server.endpoint)
    server.repositories.clear()
    server.requests.clear()
    return server


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.image_backbone(tmp_path_factory.mktemp("bases") / "vit", "test_vit")


def run(model: Any, folder: Path, **options: Any) -> Any:
    return finetune(model, tiny.digits(), output_dir=folder, **{**tiny.QUICK, **options})


def test_flag_pushes_the_finished_run_once(hub: HubServer, base: Path, tmp_path: Path) -> None:
    asked: list[int] = []

    class Watch(TrainerCallback):
        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            asked.append(len(hub.requests))

    build = TransferTrainer.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            TransferTrainer, "__init__", lambda self, *a, **k: (build(self, *a, **k), self.add_callback(Watch()))[0]
        )
        options = {"hub_token": "hf_write", "hub_model_id": "alice/digits", "hub_private_repo": True}
        run(base, tmp_path / "run", push_to_hub=True, **options)
    assert asked == [0]  # the Trainer neither made the repository nor pushed its checkpoints
    repository = hub.repositories["alice/digits"]
    assert repository.private
    assert sum(request.startswith("POST /api/models/alice/digits/commit/") for request in hub.requests) == 1
    files = hub.files("alice/digits")
    assert files["model.safetensors"] == (tmp_path / "run/model.safetensors").read_bytes()
    assert json.loads(files["results.json"]) == tiny.results(tmp_path / "run")
    assert "# run" in files["README.md"].decode() and "alice/digits" in files["README.md"].decode()
    assert not [path for path in files if path.startswith("checkpoint-") or path == "training_args.bin"]
    secret = "hf_write"
    assert secret not in (tmp_path / "run/results.json").read_text() + (tmp_path / "run/README.md").read_text()


def test_name_and_branch(hub: HubServer, base: Path, tmp_path: Path) -> None:
    """Without hub_model_id the repository is the folder's name, in the token's account."""
    run(base, tmp_path / "my-digits", push_to_hub=True, hub_token="hf_write", hub_revision="draft")
    assert "results.json" in hub.files("alice/my-digits", "draft")
    assert "results.json" not in hub.files("alice/my-digits", "main")


def test_result_push(hub: HubServer, base: Path, tmp_path: Path) -> None:
    result = run(base, tmp_path / "run")
    assert not hub.requests
    url = result.push_to_hub("alice/later", token="hf_write", private=False)
    assert url.startswith(hub.endpoint) and "alice/later" in url
    assert "model.safetensors" in hub.files("alice/later")


def test_adapter_of_a_model_on_the_hub(hub: HubServer, base: Path, tmp_path: Path) -> None:
    backbone = load_backbone(base, labels=[str(digit) for digit in range(10)])
    backbone.model.name_or_path = backbone.model.config._name_or_path = "alice/base"  # as if it came from there
    options = {"push_to_hub": True, "hub_token": "hf_write", "hub_model_id": "alice/adapter"}
    run(backbone, tmp_path / "run", tuning="lora", **options)
    config = json.loads(hub.files("alice/adapter")["adapter_config.json"])
    assert config["base_model_name_or_path"] == "alice/base"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hub_model_id": "alice/digits"}, "No token for the Hub. Run `hf auth login`"),
        ({"hub_token": "hf_write", "hub_model_id": "not a name"}, "'not a name' is not a repository id"),
        ({"hub_token": "hf_write", "tuning": "lora"}, "local model .*vit.*Push the base first"),
        ({"hub_token": "hf_write", "hub_strategy": "checkpoint"}, "hub_strategy='checkpoint'.*once, at the end"),
    ],
    ids=["no token", "bad id", "adapter of a local base", "strategy"],
)
def test_refused_before_training(
    hub: HubServer, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, said: str
) -> None:
    monkeypatch.setattr(TransferTrainer, "train", lambda *args, **kwargs: pytest.fail("it trained"))
    with pytest.raises(TransferError, match=f"(?s){said}"):
        run(base, tmp_path / "run", push_to_hub=True, **options)
    assert not hub.repositories and not (tmp_path / "run").exists()


def test_refused_offline(hub: HubServer, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(TransferTrainer, "train", lambda *args, **kwargs: pytest.fail("it trained"))
    with pytest.raises(TransferError, match=r"Cannot push to run: offline mode is on. Unset HF_HUB_OFFLINE"):
        run(base, tmp_path / "run", push_to_hub=True, hub_token="hf_write")
