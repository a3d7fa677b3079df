"""Saving: what is written loads without us, whole or not at all, and never over another model unasked."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import backbone_zoo as zoo
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import BertConfig, BertModel

from hf_transfer import TransferError
from hf_transfer.backbones import load_backbone
from hf_transfer.hub import bundle
from hf_transfer.loading.heads import start_anew

# peft 0.21 asks transformers 5.23 by the old name; delete when peft reads is_activation_checkpointing
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def lora(model, targets, **options) -> PeftModel:
    """A LoRA adapter away from zero, on weights that stay."""
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, **options))
    generator = torch.Generator().manual_seed(2)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return adapted.eval()


def timm_adapter(tmp_path: Path, **options):
    """An adapter on a convolutional base with other classes, whose BatchNorm statistics have moved."""
    backbone = load_backbone(zoo.timm_folder(tmp_path / "base"), labels=["p", "q", "r", "s", "t"], **options)
    backbone.model = lora(backbone.model, r".*layer\d\.0\.conv1", modules_to_save=["fc"])
    for name, buffer in backbone.model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(0.3)
    return backbone


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- what is saved loads without us ---------------------------------------------------------------------------------

WITHOUT_US = """
import timm
from peft import PeftModel
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, AutoTokenizer
from transformers import AutoModelForSequenceClassification, CLIPImageProcessor

model = AutoModelForImageClassification.from_pretrained("vit")
said["vit"] = {
    "wrapped": logits(model, inputs["vit"]),
    "direct": logits(timm.create_model("local-dir:vit", pretrained=True), inputs["vit"]),
    "labels": model.config.id2label,
    "size": AutoImageProcessor.from_pretrained("vit").data_config["input_size"],
}
model = AutoModelForSequenceClassification.from_pretrained("text")
said["text"] = {
    "logits": logits(model, inputs["text"]),
    "labels": model.config.id2label,
    "ids": AutoTokenizer.from_pretrained("text")("good film")["input_ids"],
}
model = AutoModelForImageClassification.from_pretrained("torchvision", trust_remote_code=True)
model.save_pretrained("torchvision-again")  # by its own code, which must travel on
model = AutoModelForImageClassification.from_pretrained("torchvision-again", trust_remote_code=True)
said["torchvision"] = {
    "logits": logits(model, inputs["torchvision"]),
    "crop": AutoImageProcessor.from_pretrained("torchvision").crop_size["height"],
}
config = AutoConfig.from_pretrained("adapter", subfolder="model_config")
options = {"config": config, "ignore_mismatched_sizes": True}
base = json.load(open("adapter/adapter_config.json"))["base_model_name_or_path"]
said["adapter"] = {
    "one line": logits(AutoModelForImageClassification.from_pretrained("adapter", **options), inputs["adapter"]),
    "peft": logits(
        PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(base, **options), "adapter"),
        inputs["adapter"],
    ),
    "labels": config.id2label,
    "size": AutoImageProcessor.from_pretrained("adapter").data_config["input_size"],
}
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Logits of the models saved here, by name; and what a process without this package said of their folders."""
    folder = tmp_path_factory.mktemp("elsewhere")
    vit = load_backbone(
        "vit_tiny_patch16_224", labels=["x", "y"], pretrained=False, depth=2, image_size=64, in_chans=1
    )
    text = load_backbone(zoo.bert_folder(folder / "bert"), labels=["x", "y"])
    alexnet = load_backbone("torchvision/alexnet", labels=2, pretrained=False, in_chans=1, image_size=64)
    adapter = timm_adapter(folder)
    inputs = {
        "vit": zoo.images(1, 64),
        "text": zoo.tokens(),
        "torchvision": zoo.images(1, 64),
        "adapter": zoo.images(3, 32),
    }
    expected = {}
    for name, backbone in {"vit": vit, "text": text, "torchvision": alexnet, "adapter": adapter}.items():
        if name != "adapter":
            zoo.randomized(backbone.model)
        backbone.save(folder / name)
        expected[name] = zoo.logits(backbone.model, inputs[name])
    return expected, zoo.run_without_us(WITHOUT_US, inputs, folder)


def test_a_timm_folder_loads_in_transformers_and_timm_without_us(elsewhere):
    expected, said = elsewhere
    torch.testing.assert_close(torch.tensor(said["vit"]["wrapped"]), expected["vit"])
    torch.testing.assert_close(torch.tensor(said["vit"]["direct"]), expected["vit"])
    assert said["vit"]["labels"] == {"0": "x", "1": "y"}
    assert said["vit"]["size"] == [1, 64, 64]


def test_a_text_folder_loads_in_transformers_without_us(elsewhere):
    expected, said = elsewhere
    torch.testing.assert_close(torch.tensor(said["text"]["logits"]), expected["text"])
    assert said["text"]["labels"] == {"0": "x", "1": "y"}
    assert said["text"]["ids"] == [4, 6]


def test_a_torchvision_folder_loads_in_transformers_without_us(elsewhere):
    expected, said = elsewhere
    torch.testing.assert_close(torch.tensor(said["torchvision"]["logits"]), expected["torchvision"])
    assert said["torchvision"]["crop"] == 64


def test_a_timm_adapter_loads_in_peft_and_transformers_without_us(elsewhere):
    expected, said = elsewhere
    torch.testing.assert_close(torch.tensor(said["adapter"]["one line"]), expected["adapter"])
    torch.testing.assert_close(torch.tensor(said["adapter"]["peft"]), expected["adapter"])
    assert list(said["adapter"]["labels"].values()) == ["p", "q", "r", "s", "t"]
    assert said["adapter"]["size"] == [3, 176, 176]


def test_a_full_folder_names_no_local_path(tmp_path: Path):
    for make in (zoo.bert_folder, zoo.timm_folder, zoo.vit_folder, zoo.wav2vec2_folder, zoo.gpt2_folder):
        backbone = load_backbone(make(tmp_path / make.__name__))
        backbone.save(tmp_path / "run", overwrite=True)
        for name, content in contents(tmp_path / "run").items():
            assert str(tmp_path).encode() not in content, name


def test_a_wrapper_made_by_hand_is_described_by_its_network(tmp_path: Path):
    import timm
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    wrapper = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="mobilenetv2_035", num_labels=2))
    bundle.save(zoo.randomized(wrapper), tmp_path / "run")
    direct = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    torch.testing.assert_close(zoo.logits(direct, zoo.images()), zoo.logits(wrapper, zoo.images()))
    assert load_backbone(tmp_path / "run").data_config["input_size"] == (3, 224, 224)


def test_labels_renamed_by_hand_are_those_saved(tmp_path: Path):
    backbone = load_backbone(zoo.timm_folder(tmp_path / "base"))
    backbone.model.config.id2label = {0: "x", 1: "y", 2: "z"}
    backbone.save(tmp_path / "run")
    assert load_backbone(tmp_path / "run").labels == ["x", "y", "z"]


def test_a_layer_held_by_several_names_is_saved_under_each(tmp_path: Path):
    import timm

    backbone = load_backbone("coat_tiny", labels=2, pretrained=False, image_size=32)
    backbone.save(tmp_path / "run")
    direct = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    torch.testing.assert_close(zoo.logits(direct, zoo.images()), zoo.logits(backbone.model, zoo.images()))


def test_a_wrapped_or_compiled_model_saves_as_the_model_itself(tmp_path: Path):
    backbone = load_backbone(zoo.bert_folder(tmp_path / "base"))
    bundle.save(torch.compile(backbone.model, backend="eager"), tmp_path / "run")
    again = load_backbone(tmp_path / "run")
    torch.testing.assert_close(zoo.logits(again.model, zoo.tokens()), zoo.logits(backbone.model, zoo.tokens()))


def test_a_model_of_another_kind_is_refused(tmp_path: Path):
    with pytest.raises(TransferError, match=r"A Linear cannot be saved here.*load_backbone"):
        bundle.save(torch.nn.Linear(2, 2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- adapters -------------------------------------------------------------------------------------------------------


def test_a_timm_adapter_loads_again_with_labels_statistics_and_image_size(tmp_path: Path):
    backbone = timm_adapter(tmp_path, in_chans=1, image_size=64)
    backbone.save(tmp_path / "run")
    again = load_backbone(tmp_path / "run")
    assert isinstance(again.model, PeftModel)
    assert again.labels == ["p", "q", "r", "s", "t"]
    assert again.data_config == backbone.data_config
    x = zoo.images(1, 64)
    torch.testing.assert_close(zoo.logits(again.model, x), zoo.logits(backbone.model, x))
    assert any(parameter.requires_grad for parameter in again.model.parameters())


def test_layers_rebuilt_for_other_images_are_in_the_adapter(tmp_path: Path):
    folder = zoo.timm_folder(tmp_path / "base", "vit_tiny_patch16_224", img_size=64, depth=2)
    backbone = load_backbone(folder, labels=["x", "y"], image_size=96, in_chans=1)
    bundle.save(lora(backbone.model, ["qkv"]), tmp_path / "run")
    from safetensors.torch import load_file

    names = load_file(tmp_path / "run/adapter_model.safetensors")
    for name in ("pos_embed", "patch_embed.proj.weight", "head.weight"):
        assert f"base_model.model.timm_model.{name}" in names
    assert "base_model.model.timm_model.blocks.0.mlp.fc1.weight" not in names


def test_a_text_adapter_loads_again(tmp_path: Path):
    backbone = load_backbone(zoo.bert_folder(tmp_path / "base"), labels=["v", "w", "x", "y", "z"])
    backbone.model = lora(backbone.model, ["query", "classifier"])  # LoRA on a head that is new and not saved by peft
    backbone.save(tmp_path / "run")
    again = load_backbone(tmp_path / "run")
    assert (again.task, again.labels) == ("text-classification", ["v", "w", "x", "y", "z"])
    assert again.processor("good film")["input_ids"] == [4, 6]
    torch.testing.assert_close(zoo.logits(again.model, zoo.tokens()), zoo.logits(backbone.model, zoo.tokens()))


def test_a_regression_adapter_and_a_language_adapter_know_their_task(tmp_path: Path):
    number = load_backbone(zoo.bert_folder(tmp_path / "bert"), task="regression", labels=1)
    bundle.save(lora(number.model, ["query"], modules_to_save=["classifier"]), tmp_path / "number")
    assert load_backbone(tmp_path / "number").task == "regression"
    words = load_backbone(zoo.gpt2_folder(tmp_path / "gpt2"))
    bundle.save(lora(words.model, ["c_attn"], fan_in_fan_out=True), tmp_path / "words")
    assert load_backbone(tmp_path / "words").task == "causal-lm"


def test_an_adapter_on_a_body_knows_its_task(tmp_path: Path):
    """A checkpoint without a head says nothing of it: what it was adapted for does."""
    BertModel(BertConfig(vocab_size=8, **zoo.SIZES)).save_pretrained(tmp_path / "body")
    zoo.tokenizer(pad_token="[PAD]").save_pretrained(tmp_path / "body")
    backbone = load_backbone(tmp_path / "body", task="token-classification", labels=["O", "B-x", "I-x"])
    backbone.model = lora(backbone.model, ["query"], modules_to_save=["classifier"])
    backbone.save(tmp_path / "run")
    again = load_backbone(tmp_path / "run")
    assert again.task == "token-classification"
    torch.testing.assert_close(zoo.logits(again.model, zoo.tokens()), zoo.logits(backbone.model, zoo.tokens()))


def test_an_adapter_that_peft_saved_loads_with_its_number_of_classes(tmp_path: Path):
    backbone = load_backbone(zoo.bert_folder(tmp_path / "base"), labels=5)
    model = lora(backbone.model, ["query"], modules_to_save=["classifier"])
    model.save_pretrained(tmp_path / "peft")
    again = load_backbone(tmp_path / "peft")
    assert again.outputs == 5
    torch.testing.assert_close(zoo.logits(again.model, zoo.tokens()), zoo.logits(model, zoo.tokens()))


def test_a_second_fine_tune_of_an_adapter_has_a_new_head(tmp_path: Path):
    timm_adapter(tmp_path).save(tmp_path / "run")
    again = load_backbone(tmp_path / "run", labels=["a", "b"])
    assert again.labels == ["a", "b"]
    assert zoo.logits(again.model, zoo.images()).shape == (2, 2)
    name = "base_model.model.timm_model.layer1.0.conv1.lora_B.default.weight"
    assert again.model.state_dict()[name].abs().sum() > 0  # what was learned stays


def test_the_rows_of_an_adapters_head_follow_their_names(tmp_path: Path):
    backbone = timm_adapter(tmp_path)  # its base has three classes
    backbone.save(tmp_path / "run")
    logits, turned = zoo.logits(backbone.model, zoo.images()), ["t", "s", "r", "q", "p"]
    again = load_backbone(tmp_path / "run", labels=turned)
    assert again.labels == turned and again.renamed_from is None
    torch.testing.assert_close(zoo.logits(again.model, zoo.images()), logits.flip(1))
    again.save(tmp_path / "again")
    torch.testing.assert_close(zoo.logits(load_backbone(tmp_path / "again").model, zoo.images()), logits.flip(1))
    renamed = load_backbone(tmp_path / "run", labels=["a", "b", "c", "d", "e"])
    assert renamed.renamed_from == ["p", "q", "r", "s", "t"] and renamed.labels == ["a", "b", "c", "d", "e"]
    torch.testing.assert_close(zoo.logits(renamed.model, zoo.images()), logits)


@pytest.mark.parametrize("turned", [["fair", "good", "bad"], ["x", "y", "z"]])
def test_an_adapter_keeps_its_head_whatever_the_base_calls_its_classes(tmp_path: Path, turned: list[str]):
    backbone = load_backbone(zoo.bert_folder(tmp_path / "base"), labels=turned)
    model = lora(backbone.model, ["query"], modules_to_save=["classifier"])
    bundle.save(model, tmp_path / "run")
    again = load_backbone(tmp_path / "run")
    assert again.labels == turned and again.renamed_from is None
    torch.testing.assert_close(zoo.logits(again.model, zoo.tokens()), zoo.logits(model, zoo.tokens()))


@pytest.mark.parametrize("turned", [True, False], ids=["reordered", "new"])
def test_a_head_that_is_not_the_bases_is_saved_with_an_adapter(tmp_path: Path, turned: bool):
    """Though the adapter does not train it: transformers alone would put that of the base in its place."""
    backbone = load_backbone(zoo.bert_folder(tmp_path / "base"), labels=["fair", "good", "bad"] if turned else None)
    if not turned:
        start_anew(backbone.model)
    model = lora(backbone.model, ["query"])
    bundle.save(model, tmp_path / "run")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "run/model_config")
    alone = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run", config=config)
    for again in (alone, load_backbone(tmp_path / "run").model):
        torch.testing.assert_close(zoo.logits(again, zoo.tokens()), zoo.logits(model, zoo.tokens()))


def test_a_head_with_an_adapter_on_it_is_not_reordered(tmp_path: Path):
    backbone = load_backbone(zoo.bert_folder(tmp_path / "base"))
    bundle.save(lora(backbone.model, ["classifier"]), tmp_path / "run")
    with pytest.raises(TransferError, match=r"An adapter is on the classifier 'classifier'.*merge"):
        load_backbone(tmp_path / "run", labels=["fair", "good", "bad"])
    assert load_backbone(tmp_path / "run").labels == ["good", "bad", "fair"]


def test_an_adapter_names_its_base_by_an_absolute_path_and_writes_no_card(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zoo.bert_folder(tmp_path / "base")
    backbone = load_backbone("base")
    bundle.save(lora(backbone.model, ["query"]), tmp_path / "run")
    monkeypatch.chdir("/")
    assert json.loads((tmp_path / "run/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    assert not (tmp_path / "run/README.md").exists()
    load_backbone(tmp_path / "run")


def test_an_adapter_without_its_base_says_so(tmp_path: Path):
    backbone = load_backbone(zoo.bert_folder(tmp_path / "base"))
    bundle.save(lora(backbone.model, ["query"]), tmp_path / "run")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(TransferError, match=r"base of the adapter .* was in .*base.*base_model_name_or_path"):
        load_backbone(tmp_path / "run")
    settings = json.loads((tmp_path / "run/adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "../moved"  # relative to the adapter
    (tmp_path / "run/adapter_config.json").write_text(json.dumps(settings))
    load_backbone(tmp_path / "run")


def test_an_adapter_of_a_base_without_a_name_warns(tmp_path: Path, caplog):
    backbone = load_backbone("resnet10t", labels=2, pretrained=False)
    bundle.save(lora(backbone.model, r".*layer1\.0\.conv1"), tmp_path / "run")
    assert "The base of this adapter has no name" in caplog.text
    with pytest.raises(TransferError, match=r"does not name its base"):
        load_backbone(tmp_path / "run")


# ---- whole or not at all --------------------------------------------------------------------------------------------


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_in_safetensors(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("where", ["weights", "safetensors", "first rename", "later rename"])
def test_a_full_disk_leaves_what_was_there_whole(tmp_path: Path, monkeypatch, where: str):
    backbone = load_backbone(zoo.bert_folder(tmp_path / "base"))
    backbone.save(tmp_path / "run")
    (tmp_path / "run/notes.txt").write_text("mine")
    before = contents(tmp_path / "run")
    zoo.randomized(backbone.model, seed=5)
    if where in ("weights", "safetensors"):
        failure = full_disk if where == "weights" else full_disk_in_safetensors
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", failure)
    else:
        rename, calls = os.replace, []

        def replace(source, target):
            calls.append(source)
            if len(calls) == (1 if where == "first rename" else 4):
                full_disk()
            rename(source, target)

        monkeypatch.setattr("os.replace", replace)
    with pytest.raises(TransferError, match=r"No space is left on the disk of .*run"):
        backbone.save(tmp_path / "run")
    monkeypatch.undo()
    assert contents(tmp_path / "run") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]  # no half-written folder beside it


def test_a_full_disk_leaves_no_new_folder(tmp_path: Path, monkeypatch):
    backbone = load_backbone(zoo.bert_folder(tmp_path / "base"))
    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(TransferError, match=r"No space"):
        backbone.save(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_saving_again_replaces_the_model_and_keeps_other_files(tmp_path: Path):
    backbone = load_backbone(zoo.bert_folder(tmp_path / "base"))
    backbone.model.save_pretrained(tmp_path / "run", max_shard_size="10KB")
    assert (tmp_path / "run/model.safetensors.index.json").exists()
    (tmp_path / "run/notes.txt").write_text("mine")
    zoo.randomized(backbone.model, seed=5)
    backbone.save(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").glob("*.safetensors*")] == ["model.safetensors"]
    assert (tmp_path / "run/notes.txt").read_text() == "mine"
    again = load_backbone(tmp_path / "run")
    torch.testing.assert_close(zoo.logits(again.model, zoo.tokens()), zoo.logits(backbone.model, zoo.tokens()))


# ---- another model's folder -----------------------------------------------------------------------------------------


def test_a_folder_holding_another_model_is_refused(tmp_path: Path):
    bert = load_backbone(zoo.bert_folder(tmp_path / "base"))
    bert.save(tmp_path / "run")
    bundle.check_output_folder(tmp_path / "run", bert.model)
    bundle.check_output_folder(tmp_path / "nowhere", bert.model)
    other_labels = load_backbone(tmp_path / "base", labels=["x", "y", "z"])
    other_network = load_backbone("resnet10t", labels=["good", "bad", "fair"], pretrained=False)
    adapter = lora(load_backbone(tmp_path / "base").model, ["query"])
    for model, reason in (
        (other_labels.model, r"its labels are \['good', 'bad', 'fair'\]"),
        (other_network.model, "its model_type is 'bert'"),
        (adapter, "it is a full model"),
    ):
        with pytest.raises(TransferError, match=f"holds another model: .*{reason}.*--output_dir.*overwrite=True"):
            bundle.save(model, tmp_path / "run")
    assert load_backbone(tmp_path / "run").labels == ["good", "bad", "fair"]


TEXT = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
DISTILLED = {"vocab_size": 8, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
GPT2 = {"vocab_size": 8, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "pad_token_id": 0}
OTHERS = {  # two networks, both with the two unnamed classes of a configuration's default, and what tells them apart
    "task": (("BertForSequenceClassification", TEXT), ("BertForTokenClassification", TEXT), "architectures"),
    "width": (
        ("DistilBertForSequenceClassification", DISTILLED),
        ("DistilBertForSequenceClassification", {**DISTILLED, "dim": 32}),
        "dim",
    ),
    "depth": (
        ("GPT2ForSequenceClassification", GPT2),
        ("GPT2ForSequenceClassification", {**GPT2, "n_layer": 2}),
        "n_l",
    ),
    "vocabulary": (
        ("BertForSequenceClassification", TEXT),
        ("BertForSequenceClassification", {**TEXT, "vocab_size": 9}),
        "vocab_size",
    ),
}


@pytest.mark.parametrize("difference", OTHERS)
def test_models_without_labels_of_their_own_are_told_apart(tmp_path: Path, difference: str):
    first, second, said = OTHERS[difference]

    def make(name: str, size: dict):
        kind = getattr(transformers, name)
        return kind(kind.config_class(**size))

    bundle.save(make(*first), tmp_path / "run")
    bundle.check_output_folder(tmp_path / "run", make(*first))
    with pytest.raises(TransferError, match=f"holds another model: its {said}"):
        bundle.check_output_folder(tmp_path / "run", make(*second))


def test_a_broken_configuration_in_the_output_folder(tmp_path: Path):
    backbone = load_backbone(zoo.bert_folder(tmp_path / "base"))
    backbone.save(tmp_path / "run")
    (tmp_path / "run/config.json").write_text("{")
    with pytest.raises(TransferError, match=r"config\.json in the output folder is corrupt.*overwrite=True"):
        backbone.save(tmp_path / "run")
    backbone.save(tmp_path / "run", overwrite=True)
    assert load_backbone(tmp_path / "run").labels == ["good", "bad", "fair"]


def test_a_linked_folder_is_saved_where_the_link_leads(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    load_backbone(zoo.bert_folder(tmp_path / "base")).save(tmp_path / "run")
    assert (tmp_path / "run").is_symlink()
    assert (tmp_path / "disk/model.safetensors").is_file()


def test_another_timm_architecture_is_another_model(tmp_path: Path):
    load_backbone("resnet10t", labels=2, pretrained=False).save(tmp_path / "run")
    with pytest.raises(TransferError, match=r"its architecture is 'resnet10t'"):
        load_backbone("mobilenetv2_035", labels=2, pretrained=False).save(tmp_path / "run")


def test_told_to_overwrite_nothing_of_the_old_model_remains(tmp_path: Path):
    backbone = load_backbone(zoo.bert_folder(tmp_path / "base"))
    adapter = lora(load_backbone(tmp_path / "base").model, ["query"])
    bundle.save(adapter, tmp_path / "run")
    backbone.save(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run/adapter_config.json").exists()
    assert not isinstance(load_backbone(tmp_path / "run").model, PeftModel)
    bundle.save(adapter, tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run/config.json").exists()
    assert isinstance(load_backbone(tmp_path / "run").model, PeftModel)
