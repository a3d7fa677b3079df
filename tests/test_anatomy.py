"""The map of a network agrees with what its forward does: order, widths, and features that give the logits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import Tensor, nn

from hf_transfer.anatomy import Anatomy, Taps, plain_model, plain_name
from hf_transfer.errors import TransferError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# One family for each way in which timm describes itself; test_every_timm_family takes all of them.
SOME_FAMILIES = [
    *("resnet", "efficientnet", "convnext", "vision_transformer", "swin_transformer", "deit", "pvt_v2", "cpubone"),
    *("cait", "dla", "metaformer", "pit", "csatv2", "hrnet", "levit", "repvit", "crossvit", "xcit", "mobilevit"),
    *("rdnet", "maxxvit", "volo"),
]

# What runs in another order than the map has it.
OUT_OF_ORDER = {
    "cait": "timm's matcher puts the class-token blocks beside the last blocks, which run before them",
    "coat": "convolutional position encodings are stem, or a scale's first block, and run inside its blocks",
    "efficientvim": "a norm and head after each stage, for early exits",
    "bart": "the decoder's embeddings are stem, and run after the encoder",
    "t5": "the decoder's embeddings are stem, and run after the encoder",
    "t5gemma": "the decoder's embeddings are stem, and run after the encoder",
    "canine": "the pooler reads an earlier layer",
}
# A block whose output is not one tensor of features has no width to compare.
SEVERAL_OUTPUTS = {"crossvit", "hrnet", "tnt"}
# VOLO adds half the maximum of its auxiliary head to the logits.
MORE_THAN_THE_CLASSIFIER = {"volo"}

TRANSFORMERS = [  # model type, class, blocks
    ("bert", "BertForSequenceClassification", 3),
    ("bert", "BertForTokenClassification", 3),
    ("camembert", "CamembertForSequenceClassification", 3),  # its head is registered before its base
    ("albert", "AlbertForSequenceClassification", 1),  # one layer, run three times
    ("deberta-v2", "DebertaV2ForSequenceClassification", 3),
    ("distilbert", "DistilBertForSequenceClassification", 3),
    ("canine", "CanineForSequenceClassification", 5),
    ("funnel", "FunnelForSequenceClassification", 12),
    ("xlm", "XLMForSequenceClassification", 3),  # attentions, norms and FFNs in lists of their own
    ("xlnet", "XLNetForSequenceClassification", 3),
    ("bart", "BartForSequenceClassification", 6),
    ("t5", "T5ForSequenceClassification", 6),
    ("t5gemma", "T5GemmaForSequenceClassification", 6),  # its norm is registered before its layers
    ("gpt2", "GPT2ForSequenceClassification", 3),
    ("llama", "LlamaForSequenceClassification", 3),
    ("mixtral", "MixtralForSequenceClassification", 3),
    ("opt", "OPTForSequenceClassification", 3),
    ("gemma3", "Gemma3ForSequenceClassification", 3),  # a vision tower beside the text model
    ("perceiver", "PerceiverForSequenceClassification", 2),  # its head is inside its base
    ("gpt2", "GPT2LMHeadModel", 3),
    ("bert", "BertLMHeadModel", 3),
    ("wav2vec2", "Wav2Vec2ForSequenceClassification", 3),
    ("whisper", "WhisperForAudioClassification", 3),
    ("vit", "ViTForImageClassification", 3),
    ("swin", "SwinForImageClassification", 4),
]


@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_timm(family: str):
    check_timm(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(tiny.TIMM_FAMILIES) - set(SOME_FAMILIES)))
def test_every_timm_family(family: str):
    check_timm(family)


def check_timm(family: str) -> None:
    model = tiny.timm_model(family)
    x = tiny.images(tiny.timm_side(family))
    check(model, lambda: model(x), family)


@pytest.mark.parametrize(("model_type", "class_name", "depth"), TRANSFORMERS, ids=lambda value: str(value))
def test_transformers(model_type: str, class_name: str, depth: int):
    model = tiny.tiny_model(model_type, class_name)
    inputs = tiny.inputs_for(model)
    anatomy = check(model, lambda: model(**inputs).logits, model_type)
    assert anatomy.depth == depth


@pytest.mark.slow
def test_every_text_classifier_of_transformers():
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES

    for model_type, class_name in CLASSES.items():
        if model_type == "layoutlmv2":
            continue  # needs detectron2
        model = tiny.tiny_model(model_type, class_name)
        anatomy = every_name_has_a_group(model)
        config = model.config.get_text_config()
        layers = getattr(config, "num_hidden_layers", None)
        assert layers is None or anatomy.depth >= layers or model_type in ("albert", "perceiver"), model_type
        with torch.no_grad():
            width_is_right(model, anatomy, lambda model=model: model(**tiny.inputs_for(model)).logits)


@pytest.mark.parametrize(
    ("name", "side", "depth"), [("alexnet", 64, 7), ("vgg11_bn", 32, 10), ("inception_v3", 75, 16)]
)
def test_torchvision(name: str, side: int, depth: int):
    from hf_transfer.backbones import load_backbone

    model = load_backbone(f"torchvision/{name}", labels=3, pretrained=False).model
    x = tiny.images(side)
    anatomy = check(model, lambda: model(x).logits, name)
    assert anatomy.depth == depth
    assert anatomy.head[-1] == anatomy.classifiers[0]


def test_a_plain_module_is_its_children_in_order():
    model = nn.Sequential()
    for name, layer in {
        "embed": nn.Embedding(9, 4),
        "first": nn.Linear(4, 8),
        "norm": nn.LayerNorm(8),
        "act": nn.ReLU(),
        "second": nn.Linear(8, 8),
        "drop": nn.Dropout(),
        "last": nn.Linear(8, 2),
    }.items():
        model.add_module(name, layer)
    anatomy = check(model, lambda: model(torch.tensor([[1, 2]])), "plain")
    assert anatomy.stem == ("embed",)
    assert [(block.name, block.width) for block in anatomy.blocks] == [("first", 8), ("second", 8)]
    assert [anatomy.group(name) for name in ("norm", "act.x", "drop", "last", "")] == [1, 1, 4, 4, 4]
    assert anatomy.classifiers == ("last",)
    assert [anatomy.group_name(group) for group in range(5)] == ["stem", "first", "second", "neck", "head"]


def test_a_single_layer_has_no_blocks():
    anatomy = Anatomy.of(nn.Sequential(nn.Linear(3, 2)))
    assert (anatomy.depth, anatomy.classifiers) == (0, ("0",))


def test_pieces_by_name():
    bert = Anatomy.of(tiny.tiny_model("bert", "BertForSequenceClassification"))
    assert bert.stem == ("bert.embeddings",)
    assert bert.blocks[1].prefixes == ("bert.encoder.layer.1",)
    assert bert.blocks[1].width == 32
    assert bert.neck == ("bert.pooler",)
    assert bert.head == ("dropout", "classifier")
    assert bert.group("bert.encoder") == 3  # a module that spans groups: its last
    resnet = Anatomy.of(tiny.timm_model("resnet"))
    assert resnet.stem == ("conv1", "bn1", "act1", "maxpool")
    assert resnet.head == ("global_pool", "fc")
    assert resnet.group("layer4.0.bn2.running_mean") == resnet.depth
    wav2vec2 = Anatomy.of(tiny.tiny_model("wav2vec2", "Wav2Vec2ForSequenceClassification"))
    assert "wav2vec2.feature_extractor" in wav2vec2.stem  # what freeze_feature_encoder() freezes
    assert wav2vec2.head == ("projector", "classifier")


def test_what_only_feeds_the_attention_is_stem_though_registered_after_the_layers():
    options = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"}
    anatomy = Anatomy.of(tiny.tiny_model("deberta-v2", "DebertaV2ForSequenceClassification", **options))
    assert {"deberta.encoder.rel_embeddings", "deberta.encoder.LayerNorm"} <= set(anatomy.stem)
    assert anatomy.neck == ()


def test_auxiliary_and_distillation_heads_are_heads():
    assert "aux_head" in Anatomy.of(tiny.timm_model("volo")).head
    assert Anatomy.of(tiny.timm_model("repvit")).classifiers == ("head.head.l", "head.head_dist.l")
    deit = tiny.tiny_model("deit", "DeiTForImageClassificationWithTeacher", image_size=32)
    assert Anatomy.of(deit).classifiers == ("cls_classifier", "distillation_classifier")


def test_a_network_without_classifier_is_refused():
    import timm

    with pytest.raises(TransferError, match="num_classes"):
        Anatomy.of(timm.create_model("test_resnet", num_classes=0))
    with pytest.raises(TransferError, match="no linear layer"):
        Anatomy.of(nn.Sequential(nn.ReLU()))


# adapters and other wrapping


def wrapped_in_timm(family: str) -> Any:
    from hf_transfer.backbones import load_backbone

    arguments = {key: value for key, value in tiny.timm_arguments(family).items() if key != "img_size"}
    side = tiny.timm_side(family)
    name = tiny.TIMM_FAMILIES[family]
    return load_backbone(name, labels=3, pretrained=False, image_size=side, **arguments).model


@pytest.mark.parametrize("family", ["resnet", "vision_transformer", "dla"])  # DLA's stem is called base_layer
def test_transformers_wrapper_of_timm_has_the_same_map(family: str):
    bare, wrapped = Anatomy.of(tiny.timm_model(family, labels=3)), Anatomy.of(wrapped_in_timm(family))
    assert [block.name for block in wrapped.blocks] == [f"timm_model.{block.name}" for block in bare.blocks]
    assert wrapped.classifiers == tuple(f"timm_model.{name}" for name in bare.classifiers)


def lora(model: nn.Module, targets: str, head: list[str]) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, modules_to_save=head))


@pytest.mark.parametrize(
    ("make", "targets", "head"),
    [
        (lambda: tiny.tiny_model("roberta", "RobertaForSequenceClassification"), r".*\.(query|value)", ["classifier"]),
        (lambda: tiny.tiny_model("llama", "LlamaForSequenceClassification"), r".*\.(q_proj|down_proj)", ["score"]),
        (lambda: wrapped_in_timm("vision_transformer"), r".*\.(qkv|fc1)", ["timm_model.head"]),
        (lambda: wrapped_in_timm("dla"), r".*level2.*\.conv1|.*base_layer\.0", ["timm_model.fc"]),
    ],
    ids=["roberta", "llama", "vit", "dla"],
)
def test_an_adapted_model_has_the_map_of_the_plain_one(make: Callable[[], Any], targets: str, head: list[str]):
    model = make()
    before = Anatomy.of(model)
    adapted = lora(model, targets, head)
    assert Anatomy.of(adapted) == before
    assert plain_model(adapted) is model
    after = Anatomy.of(adapted)
    for name, _ in adapted.named_parameters():
        plain = name.removeprefix("base_model.model.")
        if "lora_" in name:
            module = plain.partition(".lora_")[0]
            assert after.group(name) == before.group(f"{module}.weight")
        elif "modules_to_save" in name:
            assert after.group(name) == after.depth + 2
        else:
            own = plain.replace(".base_layer.weight", ".weight").replace(".base_layer.bias", ".bias")
            assert after.group(name) == before.group(own.replace(".original_module", ""))


def test_wrapping_is_stripped_from_names():
    assert plain_name("base_model.model.bert.pooler.dense.base_layer.weight") == "bert.pooler.dense.weight"
    assert (
        plain_name("base_model.model.classifier.modules_to_save.default.out_proj.bias") == "classifier.out_proj.bias"
    )
    assert plain_name("base_model.model.h.0.attn.lora_A.default.weight") == "h.0.attn"
    assert plain_name("module._orig_mod.fc.weight") == "fc.weight"
    assert plain_name("timm_model.base_layer.0.weight") == "timm_model.base_layer.0.weight"  # DLA's own


def test_a_learned_prompt_is_new_and_the_model_below_it_keeps_its_groups():
    from peft import PromptTuningConfig, get_peft_model

    model = tiny.tiny_model("bert", "BertForSequenceClassification")
    adapted = get_peft_model(model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    anatomy = Anatomy.of(adapted)
    groups = {name: anatomy.group(name) for name, _ in adapted.named_parameters()}
    assert groups["prompt_encoder.default.embedding.weight"] == anatomy.depth + 2
    assert groups["base_model.bert.encoder.layer.2.output.dense.weight"] == 3


def test_compiled_and_pickled():
    model = tiny.timm_model("resnet")
    anatomy = Anatomy.of(model)
    assert Anatomy.of(torch.compile(model)) == anatomy
    assert anatomy.group("_orig_mod.layer1.0.conv1.weight") == anatomy.group("module.layer1.0.conv1.weight") == 1
    again = pickle.loads(pickle.dumps(anatomy))
    assert again == anatomy
    assert again.group("layer1.0.conv1.weight") == 1


# taps


def test_taps_read_outputs_and_inputs_and_leave_no_hook():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    with Taps(model, ["0", "1"]) as outputs, Taps(model, ["2"], inputs=True) as inputs:
        model(x)
    hidden = x @ model[0].weight.T + model[0].bias
    torch.testing.assert_close(outputs.values["0"], hidden)
    torch.testing.assert_close(inputs.values["2"], hidden.clamp(min=0))
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(TransferError, match="classifier"):
        Taps(model, ["classifier"])


def test_hooks_go_when_the_forward_fails():
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(RuntimeError), Taps(model, ["0"]):
        model(torch.randn(2, 7))
    assert not model[0]._forward_hooks


def test_taps_that_are_entered_again_stay_to_the_end() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    taps = Taps(model, ["0"])
    with taps:
        with taps:
            assert len(model[0]._forward_hooks) == 1
        taps.values.clear()
        model(torch.ones(1, 2))
        assert set(taps.values) == {"0"}
    assert not model[0]._forward_hooks


def test_taps_read_the_copy_that_runs():
    model = tiny.tiny_model("roberta", "RobertaForSequenceClassification")
    inputs = tiny.inputs_for(model)
    adapted = lora(model, r".*\.query", ["classifier"]).eval()
    with torch.no_grad():
        adapted.get_submodule("base_model.model.classifier.modules_to_save.default.dense").weight.mul_(2)
        with Taps(adapted, ["classifier.dense", "classifier.out_proj"]) as on:
            logits = adapted(**inputs).logits
        with adapted.disable_adapter(), Taps(adapted, ["classifier.dense"]) as off:
            adapted(**inputs)
    torch.testing.assert_close(on.values["classifier.out_proj"], logits)
    assert not torch.allclose(on.values["classifier.dense"], off.values["classifier.dense"])


# one network for each way in which maps are turned around: timm's output_fmt, linear layers only, both kinds
@pytest.mark.parametrize("family", ["swin_transformer", "vision_transformer_sam", "tiny_vit", "convnext", "resnet"])
def test_taps_give_maps_channels_first(family: str):
    model = tiny.timm_model(family)
    blocks = [block for block in Anatomy.of(model).blocks if block.width is not None]
    raw: dict[str, Tensor] = {}
    for block in blocks:
        module = model.get_submodule(block.name)
        module.register_forward_hook(lambda *args, name=block.name: raw.update({name: args[2]}))
    with torch.no_grad(), Taps(model, [block.name for block in blocks]) as taps:
        model(tiny.images(64 if family == "tiny_vit" else tiny.timm_side(family)))
    maps = [block for block in blocks if raw[block.name].dim() == 4 and 1 not in raw[block.name].shape]
    assert maps
    for block in maps:
        axis = raw[block.name].shape.index(block.width)
        assert torch.equal(taps.values[block.name], raw[block.name].movedim(axis, 1))


class Turned(nn.Module):
    """A block with layers of both kinds, as ConvNeXt's; its output stays (N, C, H, W) or not."""

    def __init__(self, width: int, last: bool) -> None:
        super().__init__()
        self.conv, self.linear, self.last = nn.Conv2d(width, width, 1), nn.Linear(width, width), last

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.conv(x).movedim(1, -1))
        return x if self.last else x.movedim(-1, 1)


class Grown(nn.Module):
    """A block that concatenates, as DenseNet's: its width is in none of its parameters."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, growth, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(x)], dim=1)


@pytest.mark.parametrize(
    ("module", "shape", "axis"),
    [
        (nn.Conv2d(8, 8, 1), (2, 8, 8, 6), 1),  # as high as it has channels
        (nn.Conv2d(8, 8, 1), (2, 8, 8, 8), 1),
        (nn.Linear(8, 8), (2, 8, 8, 8), 3),
        (nn.Linear(8, 8), (2, 6, 8, 8), 3),
        (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 5)), (2, 6, 4, 8), 3),
        (Grown(10, 4), (2, 10, 4, 4), 1),  # as high as it grows
        (Turned(8, last=False), (2, 8, 6, 4), 1),
        (Turned(8, last=False), (2, 8, 8, 4), 1),
        (Turned(8, last=True), (2, 8, 6, 4), 3),
        (nn.Identity(), (2, 8, 4, 4), 1),
        (nn.Identity(), (2, 4, 4, 8), 3),
    ],
)
def test_the_axis_of_channels(module: nn.Module, shape: tuple[int, ...], axis: int):
    x = torch.randn(shape)
    with torch.no_grad(), Taps(nn.Sequential(module), ["0"]) as taps:
        raw = module(x)
        nn.Sequential(module)(x)
    assert torch.equal(taps.values["0"], raw.movedim(axis, 1))


def test_where_every_axis_is_as_long_timm_says():
    module = Turned(8, last=True)
    module.output_fmt = "NHWC"  # type: ignore[assignment]
    with torch.no_grad(), Taps(module, [""]) as taps:
        raw = module(torch.randn(2, 8, 8, 8))
    assert torch.equal(taps.values[""], raw.movedim(3, 1))


# what every map must satisfy


def check(model: nn.Module, logits: Callable[[], Tensor], name: str) -> Anatomy:
    anatomy = every_name_has_a_group(model)
    with torch.no_grad():
        if name not in OUT_OF_ORDER:
            runs_in_order(model, anatomy, logits)
        if name not in SEVERAL_OUTPUTS:
            width_is_right(model, anatomy, logits)
        if name not in MORE_THAN_THE_CLASSIFIER:
            features_give_the_logits(model, anatomy, logits)
    return anatomy


def every_name_has_a_group(model: nn.Module) -> Anatomy:
    """Every name is under one prefix of its group, and every block has a parameter."""
    anatomy = Anatomy.of(model)
    prefixes = [anatomy.stem, *(block.prefixes for block in anatomy.blocks), anatomy.neck, anatomy.head]
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, _ in named:
        inside = [i for i, group in enumerate(prefixes) for prefix in group if f"{name}.".startswith(f"{prefix}.")]
        assert inside == [anatomy.group(name)], name
    assert {anatomy.group(name) for name, _ in model.named_parameters()} >= set(range(1, anatomy.depth + 1))
    assert all(0 <= anatomy.group(name) <= anatomy.depth + 2 for name, _ in model.named_modules())
    modules = dict(model.named_modules())
    assert {*(block.name for block in anatomy.blocks), *anatomy.classifiers} <= modules.keys()
    return anatomy


def runs_in_order(model: nn.Module, anatomy: Anatomy, forward: Callable[[], Any]) -> None:
    """In a forward each layer with parameters first runs when no later group has."""
    ran: list[str] = []
    layers = [(name, module) for name, module in model.named_modules() if module._parameters and not module._modules]
    hooks = [module.register_forward_pre_hook(lambda *_, name=name: ran.append(name)) for name, module in layers]
    forward()
    for hook in hooks:
        hook.remove()
    groups = [anatomy.group(name) for name in dict.fromkeys(ran)]
    assert groups == sorted(groups), [*zip(dict.fromkeys(ran), groups, strict=True)]


def width_is_right(model: nn.Module, anatomy: Anatomy, forward: Callable[[], Any]) -> None:
    with Taps(model, [block.name for block in anatomy.blocks]) as taps:
        forward()
    for block in anatomy.blocks:
        if block.width is not None and block.name in taps.values:  # SqueezeBERT calls its layers' forward itself
            assert block.width in taps.values[block.name].shape[1:], block


def features_give_the_logits(model: nn.Module, anatomy: Anatomy, forward: Callable[[], Tensor]) -> None:
    """classifier(its input) is the logits: of the example, or of one of its tokens; the mean where there are two."""
    with Taps(model, anatomy.classifiers, inputs=True) as taps:
        expected = forward()
    modules = dict(model.named_modules())
    given = [copy.deepcopy(modules[name])(taps.values[name]) for name in anatomy.classifiers]
    got = torch.stack(given).mean(0) if all(each.shape == given[0].shape for each in given) else given[0]
    if got.numel() == expected.numel():
        torch.testing.assert_close(got.reshape(expected.shape), expected)
        return
    distance = (got - expected[:, None]).abs().amax(-1)  # (B, T): decoders classify every token and keep one
    assert torch.all(distance.amin(1) < 1e-5)
