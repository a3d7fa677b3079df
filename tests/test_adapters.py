"""Where adapters go, what trains and is saved with them, and that they fold into the base."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn
from transformers import ASTForAudioClassification, GPT2LMHeadModel, TimmWrapperForImageClassification
from tuned_networks import (
    INPUTS,
    adapted,
    ast,
    beit,
    bert,
    davit,
    each_network,
    gpt2,
    groups_trained,
    mobilenet,
    parameters_of,
    resnet,
    run,
    shake,
    trained,
    vit,
    wavlm,
    wrapped,
)

from hf_transfer.adapters import adaptable_layers
from hf_transfer.anatomy import Anatomy
from hf_transfer.errors import TransferError
from hf_transfer.tuning import FullFineTune, GradualUnfreeze, LinearProbe, LoRA, Peft, merge, plan

# peft 0.21 asks transformers by a name that it renames; see adapters.attach.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@each_network
def test_lora_trains_adapters_in_blocks_and_neck_and_the_head(build):
    network = build()
    anatomy = Anatomy.of(network)
    model = LoRA(r=2).apply(copy.deepcopy(network))
    groups = groups_trained(model)
    assert not groups[0] and all(groups[1 : anatomy.depth + 1]) and groups[-1]
    in_head = {name for name in trained(model) if anatomy.group(name) == anatomy.depth + 2}
    assert not any("lora_" in name for name in in_head)
    assert len(in_head) == len(parameters_of(network, anatomy.depth + 2))
    run(model.train()).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained(model)


@pytest.fixture
def in_float64():
    """New networks and numbers are in float64, where rounding through fifty layers does not show."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@each_network
def test_lora_merges_and_unloads(build, in_float64):
    network = build()
    model = shake(LoRA(r=2).apply(copy.deepcopy(network))).eval()
    before = run(copy.deepcopy(network).eval())
    expected = run(model)
    plain = merge(model)
    assert type(plain) is type(network)
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in network.named_parameters()]
    torch.testing.assert_close(run(plain), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, before, atol=1e-3)
    assert all(p.requires_grad for p in plain.parameters())
    assert not any(module._forward_pre_hooks for module in plain.modules())


def test_merge_keeps_labels_and_leaves_other_networks_alone():
    model = merge(shake(LoRA(r=2).apply(wrapped())))
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert merge(model) is model


@pytest.mark.parametrize(
    "build", [wrapped, lambda: wrapped("test_vit"), bert, gpt2, ast], ids=["cnn", "vit", "bert", "gpt2", "ast"]
)
@pytest.mark.parametrize("policy", ["auto", "train"])
def test_lora_saves_and_reloads_by_peft(build, policy, tmp_path):
    """Head and BatchNorm statistics included; ordinary peft, nothing of this package."""
    import peft

    base = build()
    start = copy.deepcopy(base)
    model = shake(LoRA(r=2, batch_norm=policy).apply(base))
    run(model.train())  # under "train", statistics move here
    output = model(labels=torch.tensor([0, 1, 2, 0]), **{base.main_input_name: example(base)})
    assert output.loss.isfinite()
    expected = run(model.eval())
    model.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(start, tmp_path).eval()
    torch.testing.assert_close(run(reloaded), expected)


def example(model: nn.Module) -> torch.Tensor:
    if isinstance(model, ASTForAudioClassification):
        return torch.randn(4, 32, 16)
    size = getattr(model.config, "pretrained_cfg", None)
    return torch.randn(4, *size["input_size"]) if size else INPUTS[model.main_input_name]()


def test_lora_presets():
    attention = adapted(LoRA(r=2, targets="attention").apply(vit()))
    assert attention == {f"blocks.{i}.attn.{layer}" for i in range(6) for layer in ("qkv", "proj")}
    everything = adapted(LoRA(r=2).apply(vit()))
    assert everything == attention | {f"blocks.{i}.mlp.{layer}" for i in range(6) for layer in ("fc1", "fc2")}
    text = adapted(LoRA(r=2, targets="attention").apply(bert()))
    assert {name.rpartition("attention.")[2] for name in text} == {
        "self.query",
        "self.key",
        "self.value",
        "output.dense",
    }


def test_lora_takes_names_and_whole_paths():
    assert adapted(LoRA(r=2, targets=["query", "bert.pooler.dense"]).apply(bert())) == {
        "bert.pooler.dense",
        *(f"bert.encoder.layer.{i}.attention.self.query" for i in range(3)),
    }
    assert adapted(LoRA(r=2, targets=["proj"]).apply(vit())) == {f"blocks.{i}.attn.proj" for i in range(6)}
    assert adapted(LoRA(r=2, targets=["patch_embed.proj"]).apply(vit())) == {
        "patch_embed.proj"
    }  # asked for by its path


def test_lora_skips_depthwise_convolutions():
    model = mobilenet()
    modules = dict(model.named_modules())
    layers = adapted(LoRA(r=2).apply(model))
    assert "conv_head" in layers and "conv_stem" not in layers and "blocks.1.0.conv_pw" in layers
    assert not any("conv_dw" in name for name in layers)
    assert {getattr(modules[name], "groups", 1) for name in layers} == {1}


@pytest.mark.parametrize(
    ("build", "targets", "says"),
    [
        (resnet, "attention", "layer1.conv1"),
        (vit, ["nothing"], "'nothing'.*attn.qkv, attn.proj, mlp.fc1, mlp.fc2"),
        (vit, ["qkv", "head"], "'head' is the head"),
        (mobilenet, ["conv_dw"], "'conv_dw'.*conv_pw"),
        (vit, "qkv", '"attention" or a list'),
        (vit, [], "match no layer"),
    ],
)
def test_lora_refuses_targets(build, targets, says):
    model = build()
    with pytest.raises(TransferError, match=says):
        LoRA(targets=targets).apply(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("options", [{"r": 0}, {"r": 2.5}, {"alpha": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_lora_refuses_options(options):
    with pytest.raises(TransferError, match="must be"):
        LoRA(**options)


def test_lora_options_reach_peft():
    config = LoRA(r=4, dropout=0.1, use_dora=True, use_rslora=True).apply(bert()).peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.1)
    assert config.use_dora and config.use_rslora
    model = LoRA(r=2, alpha=3, use_dora=True).apply(resnet())
    assert model.peft_config["default"].lora_alpha == 3
    expected = run(shake(model).eval())
    torch.testing.assert_close(run(merge(model)), expected, rtol=1e-4, atol=1e-5)


def test_lora_on_conv1d_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layers = adapted(LoRA(r=2, targets="attention").apply(gpt2()))
    assert layers == {f"transformer.h.{i}.attn.{layer}" for i in range(2) for layer in ("c_attn", "c_proj")}


def test_lora_leaves_the_head_of_a_language_model_alone():
    model = LoRA(r=2).apply(gpt2(GPT2LMHeadModel))
    assert all("lora_" in name for name in trained(model))


@pytest.mark.parametrize(
    ("build", "absent", "present"),
    [
        (beit, "attn.qkv", "attn.proj"),
        (wavlm, "attention.q_proj", "feed_forward.output_dense"),
        (davit, "downsample.conv", "attn.qkv"),
    ],
)
def test_lora_skips_layers_that_would_be_read_past_their_adapter(build, absent, present):
    model = LoRA(r=2).apply(build())
    layers = adapted(model)
    assert not any(name.endswith(absent) for name in layers) and any(name.endswith(present) for name in layers)
    run(model.train()).sum().backward()
    without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    # WavLM computes the relative positions in its first layer alone
    assert {n for n in without if "gru_rel_pos_linear" not in n} == set()


def test_lora_adapts_torch_multihead_attention_as_a_whole():
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(3, 8)
            self.blocks = nn.ModuleList(nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}) for _ in range(2))
            self.head = nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x.flatten(2).mT)  # (B, 1024, 8)
            for block in self.blocks:
                x = x + block["attn"](x, x, x, need_weights=False)[0]
            return self.head(x.mean(1))

    model = LoRA(r=2, targets="attention").apply(Network())
    assert model.peft_config["default"].target_modules == {"blocks.0.attn", "blocks.1.attn"}
    expected = run(shake(model).eval())
    torch.testing.assert_close(run(merge(model)), expected, rtol=1e-5, atol=1e-5)


def test_what_shares_the_heads_name_does_not_train(tmp_path):
    """peft saves every module whose path ends in "fc": here the squeeze layers too."""
    import peft

    def build() -> nn.Module:
        block, size = timm.models.resnet.BasicBlock, {"num_classes": 5, "channels": (8,) * 4}
        return timm.models.resnet.ResNet(block, (1,) * 4, block_args={"attn_layer": "ese"}, **size)

    torch.manual_seed(0)
    base = build()
    assert any(name.endswith("se.fc") for name, _ in base.named_modules())
    start = copy.deepcopy(base)
    model = shake(LoRA(r=2).apply(base)).eval()
    assert {n for n in trained(model) if "modules_to_save" in n} == {
        f"base_model.model.fc.modules_to_save.default.{leaf}" for leaf in ("weight", "bias")
    }
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(run(peft.PeftModel.from_pretrained(start, tmp_path).eval()), run(model))


def test_convolutions_that_peft_cannot_follow_take_no_adapter(caplog):
    """Its low-rank branch copies neither dilation nor padding mode, and would be standardised as the layer is."""

    layers = {
        "plain": nn.Conv2d(8, 8, 3),
        "dilated": nn.Conv2d(8, 8, 3, dilation=2),
        "circular": nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        "standardised": timm.layers.StdConv2d(8, 8, 3),
        "same": timm.layers.Conv2dSame(8, 8, 3, stride=2),
        "normed": nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
        "grouped": nn.Conv2d(8, 8, 3, groups=8),
    }

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, layer in layers.items():
                self.add_module(name, layer)

    model = nn.Sequential(
        OrderedDict(stem=nn.Conv2d(3, 8, 3), blocks=nn.Sequential(Block()), pool=nn.Flatten(), head=nn.Linear(8, 5))
    )
    with caplog.at_level("INFO", logger="hf_transfer"):
        assert adapted(LoRA(r=2).apply(model)) == {"blocks.0.plain"}
    assert "6 layers take no adapter" in caplog.text and all(name in caplog.text for name in list(layers)[1:])


def test_torchs_encoder_layer_takes_no_adapter():
    """In eval mode it computes with the weights of its layers, past any adapter, where those have no gradient."""
    layers = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)))
    model = nn.Sequential(OrderedDict(embed=nn.Linear(3, 8), blocks=layers, head=nn.Linear(8, 5)))
    with pytest.raises(TransferError, match="there are none"):
        LoRA(r=2).apply(model)


def test_any_peft_config():
    import peft

    config = peft.LoraConfig(r=2, target_modules="all-linear")
    model = Peft(config).apply(bert())
    assert config.modules_to_save is None  # the user's stays as it was
    assert "base_model.model.classifier.modules_to_save.default.weight" in trained(model)
    assert not any("classifier" in name and "lora" in name for name in trained(model))
    ia3 = Peft(peft.IA3Config(target_modules=["value"], feedforward_modules=[])).apply(bert())
    assert {name.split(".")[-2] for name in trained(ia3)} == {"ia3_l", "default"}
    prompt = Peft(peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)).apply(bert())
    assert prompt.train()(input_ids=INPUTS["input_ids"]()).logits.shape == (4, 3)
    with pytest.raises(TransferError, match="PROMPT_TUNING"):
        merge(prompt)
    with pytest.raises(TransferError, match=r"attention\.self\.query"):
        Peft(peft.LoraConfig(target_modules=["nothing"])).apply(bert())


@pytest.mark.parametrize("tuning", [FullFineTune(), LinearProbe(), LoRA(), GradualUnfreeze()], ids=str)
def test_a_network_with_adapters_must_be_merged_first(tuning):
    model = LoRA(r=2).apply(resnet())
    with pytest.raises(TransferError, match="merge"):
        tuning.phases(model)[0].apply(model)
    tuning.phases(merge(model))[0].apply(merge(model))


@pytest.mark.slow
def test_real_mobilenet_keeps_its_logits_through_lora_and_merge(shared):
    folder = shared("weights/mobilenetv2_100.coral_tf2_in1k")
    model = TimmWrapperForImageClassification.from_pretrained(folder).eval()
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = model(pixel_values=images).logits
        adapter = LoRA(r=4).apply(model).eval()
        assert 0.02 < plan(adapter).trainable / plan(adapter).total < 0.9
        torch.testing.assert_close(adapter(pixel_values=images).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(merge(adapter)(pixel_values=images).logits, expected, rtol=1e-4, atol=1e-4)


class OwnForward(nn.Linear):
    """A linear layer that computes its product itself, as Falcon's does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


class Router(nn.Linear):
    """A linear layer that returns more than its product, as a mixture's router does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).softmax(dim=-1)


@pytest.mark.parametrize(("layer", "adapted"), [(OwnForward, True), (Router, False)])
def test_linear_layers_with_a_forward_of_their_own(layer: type[nn.Linear], adapted: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer(4, 4), nn.Linear(4, 2))
    assert ("1" in adaptable_layers(model, Anatomy.of(model))) == adapted
