"""AlexNet, VGG and Inception as models of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.error import URLError

import backbone_zoo as zoo
import pytest
import torch
import torchvision
from transformers import AutoConfig, AutoModelForImageClassification

from hf_transfer import TransferError
from hf_transfer.backbones import load_backbone
from hf_transfer.torchvision_models import ARCHITECTURES


@pytest.mark.parametrize(("name", "side"), [("alexnet", 64), ("vgg11_bn", 32), ("inception_v3", 75)])
def test_each_family_is_torchvisions_network(name: str, side: int):
    backbone = load_backbone(f"torchvision/{name}", labels=["x", "y"], pretrained=False)
    options = {"aux_logits": False, "init_weights": False} if name == "inception_v3" else {}
    network = getattr(torchvision.models, name)(weights=None, num_classes=2, **options).eval()
    network.load_state_dict(backbone.model.network.state_dict())
    x = zoo.images(side=side)
    torch.testing.assert_close(zoo.logits(backbone.model, x), network(x).detach())
    assert backbone.data_config["input_size"] == (3, 299, 299) if name == "inception_v3" else (3, 224, 224)


def test_it_saves_loads_and_is_fine_tuned_again_like_any_other(tmp_path: Path):
    first = load_backbone("torchvision/alexnet", labels=["x", "y"], pretrained=False, in_chans=1, image_size=64)
    first.save(tmp_path / "a")
    again = load_backbone(tmp_path / "a")
    assert again.labels == ["x", "y"]
    assert again.data_config == first.data_config
    assert again.data_config["input_size"] == (1, 64, 64)
    x = zoo.images(1, 64)
    torch.testing.assert_close(zoo.logits(again.model, x), zoo.logits(first.model, x))
    stock = AutoModelForImageClassification.from_pretrained(tmp_path / "a")  # registered: no trust_remote_code
    torch.testing.assert_close(zoo.logits(stock, x), zoo.logits(first.model, x))
    second = load_backbone(tmp_path / "a", labels=["p", "q", "r"])
    assert zoo.logits(second.model, x).shape == (2, 3)
    body = {key: value for key, value in second.model.state_dict().items() if "classifier.6" not in key}
    for key, value in body.items():
        torch.testing.assert_close(value, first.model.state_dict()[key])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_on_it_loads_again(tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    load_backbone("torchvision/alexnet", labels=2, pretrained=False).save(tmp_path / "base")
    backbone = load_backbone(tmp_path / "base", labels=["p", "q", "r"])
    config = LoraConfig(target_modules=["classifier.4"], modules_to_save=["classifier.6"], init_lora_weights=False)
    backbone.model = get_peft_model(backbone.model, config)
    backbone.save(tmp_path / "adapter")
    again = load_backbone(tmp_path / "adapter")
    x = zoo.images(side=64)
    assert again.labels == ["p", "q", "r"]
    torch.testing.assert_close(zoo.logits(again.model, x), zoo.logits(backbone.model, x))


def test_the_folder_brings_its_code(tmp_path: Path):
    load_backbone("torchvision/alexnet", labels=2, pretrained=False).save(tmp_path)
    code = (tmp_path / "torchvision_models.py").read_text()
    assert "from ." not in code and "import hf_transfer" not in code and "from hf_transfer" not in code
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["auto_map"]["AutoModelForImageClassification"].startswith("torchvision_models.")
    assert AutoConfig.from_pretrained(tmp_path).architecture == "alexnet"


def test_loss_and_gradient_are_those_of_cross_entropy():
    backbone = load_backbone("torchvision/alexnet", labels=2, pretrained=False)
    labels = torch.tensor([0, 1])
    output = backbone.model(zoo.images(side=64), labels=labels)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in backbone.model.parameters())


class Weights:
    """Stands for torchvision's: what it offers without a download."""

    url = "https://download.pytorch.org/models/alexnet.pth"
    meta = {"categories": [f"class {i}" for i in range(998)] + ["crane", "crane"]}  # noqa: RUF012

    def __init__(self, error: Exception | None = None):
        torch.manual_seed(3)
        self.network, self.error = torchvision.models.alexnet(weights=None).eval(), error

    def get_state_dict(self, **_):
        if self.error is not None:
            raise self.error
        return dict(self.network.state_dict())


@pytest.fixture
def weights(monkeypatch) -> Weights:
    weights = Weights()
    monkeypatch.setattr("hf_transfer.loading.torchvision_weights._weights", lambda _: weights)
    return weights


def test_pretrained_weights_are_torchvisions(weights: Weights):
    backbone = load_backbone("torchvision/alexnet")
    x = zoo.images(side=64)
    torch.testing.assert_close(zoo.logits(backbone.model, x), weights.network(x).detach())
    assert backbone.labels[0] == "class 0"
    assert backbone.labels[-2:] == ["crane (998)", "crane (999)"]


def test_a_new_head_and_one_channel_keep_the_pretrained_body(weights: Weights):
    backbone = load_backbone("torchvision/alexnet", labels=["x", "y"], in_chans=1)
    pretrained, adapted = weights.network.state_dict(), backbone.model.network.state_dict()
    torch.testing.assert_close(adapted["features.0.weight"], pretrained["features.0.weight"].sum(1, keepdim=True))
    torch.testing.assert_close(adapted["classifier.4.weight"], pretrained["classifier.4.weight"])
    assert adapted["classifier.6.weight"].shape == (2, 4096)
    assert backbone.data_config["input_size"] == (1, 224, 224)


def test_weights_that_cannot_be_fetched(monkeypatch):
    failing = Weights(URLError("no network"))
    monkeypatch.setattr("hf_transfer.loading.torchvision_weights._weights", lambda _: failing)
    with pytest.raises(
        TransferError, match=r"could not be fetched from https://.*no network.*TORCH_HOME.*pretrained=F"
    ):
        load_backbone("torchvision/alexnet")


def test_unknown_names_and_options():
    with pytest.raises(TransferError, match=r"'torchvision/alexnett' is not offered; near it: alexnet\."):
        load_backbone("torchvision/alexnett", pretrained=False)
    with pytest.raises(TransferError, match=r"of: " + ", ".join(ARCHITECTURES)):
        load_backbone("torchvision/resnet18", pretrained=False)
    with pytest.raises(TransferError, match=r"dropuot: unknown option"):
        load_backbone("torchvision/alexnet", pretrained=False, dropuot=0.1)
    with pytest.raises(TransferError, match=r"cannot do task='text-classification'"):
        load_backbone("torchvision/alexnet", pretrained=False, task="text-classification")
