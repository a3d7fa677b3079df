"""What each tuning trains: on tiny networks of each kind."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from transformers import GPT2LMHeadModel, WhisperConfig, WhisperForAudioClassification
from tuned_networks import (
    bert,
    each_network,
    gpt2,
    groups_trained,
    parameters_of,
    resnet,
    run,
    tensors,
    trained,
    vit,
    wrapped,
)

from hf_transfer.anatomy import Anatomy
from hf_transfer.errors import TransferError
from hf_transfer.tuning import (
    TUNINGS,
    BitFit,
    FullFineTune,
    GradualUnfreeze,
    LinearProbe,
    LoRA,
    PartialFreeze,
    Tuning,
    plan,
    tuning_from_name,
)

# peft 0.21 asks transformers by a name that it renames; see adapters.attach.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@each_network
def test_full_trains_everything_after_any_other_tuning(build):
    network = build()
    model = copy.deepcopy(network)
    everything = {name for name, _ in model.named_parameters()}
    for before in (LinearProbe(), PartialFreeze(1), BitFit()):
        before.apply(model)
        assert trained(model) < everything
        assert FullFineTune().apply(model) is model
        assert trained(model) == everything


@each_network
def test_linear_probe_trains_the_head_alone_and_only_it_moves(build):
    network = build()
    model = LinearProbe().apply(copy.deepcopy(network)).train()
    depth = Anatomy.of(model).depth
    assert trained(model) == parameters_of(model, depth + 2) != set()
    before = tensors(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    run(model).square().sum().backward()
    assert all((p.grad is None) != p.requires_grad for p in model.parameters())
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == trained(model)  # no statistics of BatchNorm among them


@each_network
def test_partial_freeze_trains_last_blocks_neck_and_head(build):
    network = build()
    model = PartialFreeze(1).apply(copy.deepcopy(network))
    depth = Anatomy.of(model).depth
    assert trained(model) == parameters_of(model, depth)
    assert PartialFreeze(depth).apply(model) and trained(model) == parameters_of(model, 1)
    assert PartialFreeze(1.0).apply(model) and trained(model) == parameters_of(model, 1)
    assert PartialFreeze(1e-9).apply(model) and trained(model) == parameters_of(model, depth)


def test_fraction_of_blocks():
    model = PartialFreeze(0.5).apply(vit())  # of 6 blocks
    assert plan(model).blocks_trained == ("blocks.3", "blocks.4", "blocks.5")


def test_positions_and_class_token_are_frozen_with_all_blocks_trained():
    model = PartialFreeze(1.0).apply(vit())
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {"pos_embed", "cls_token", "patch_embed.proj.weight"} <= frozen
    assert not any(name.startswith("blocks.") for name in frozen)
    embeddings = {name for name, p in PartialFreeze(1.0).apply(bert()).named_parameters() if not p.requires_grad}
    assert embeddings and all(name.startswith("bert.embeddings.") for name in embeddings)


def test_partial_freeze_by_name_of_block_or_module():
    model = PartialFreeze(["layer2", "layer4.0.conv1"]).apply(wrapped())  # the prefix "timm_model." may be left out
    assert groups_trained(model) == [False, False, True, False, True, False, True]
    inside = {name for name in trained(model) if ".layer4." in name}
    assert inside == {"timm_model.layer4.0.conv1.weight"}
    assert trained(PartialFreeze("timm_model.layer2").apply(wrapped())) == {
        name for name in trained(model) if ".layer4." not in name
    }


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        (5, "has 4 blocks: layer1, layer2, layer3, layer4"),
        ("layer9", "Its blocks: layer1, layer2, layer3, layer4"),
        (["layer4", "nothing"], "'nothing'"),
        (0, "at least 1"),
        (-2, "at least 1"),
        (1.5, r"in \(0, 1\]"),
        (0.0, r"in \(0, 1\]"),
        (True, "number"),
        ([], "names no block"),
        (None, "number"),
    ],
)
def test_partial_freeze_refuses(blocks, says):
    model = resnet()
    with pytest.raises(TransferError, match=says):
        PartialFreeze(blocks).apply(model)
    assert all(p.requires_grad for p in model.parameters())  # refused before anything was frozen


@each_network
def test_bitfit_trains_biases_and_head(build):
    network = build()
    model = BitFit().apply(copy.deepcopy(network))
    head = parameters_of(model, Anatomy.of(model).depth + 2)
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert trained(model) == head | biases
    assert biases - head


def test_bitfit_takes_biases_that_are_parameters_of_their_own():
    model = BitFit().apply(
        timm.create_model("beit_base_patch16_224", num_classes=2, depth=1, embed_dim=24, num_heads=2)
    )
    assert {"blocks.0.attn.q_bias", "blocks.0.attn.v_bias"} <= trained(model)
    assert "blocks.0.attn.relative_position_bias_table" not in trained(model)


def test_a_freeze_that_leaves_nothing_is_refused_and_undone():
    model = gpt2(GPT2LMHeadModel)  # its head is its embeddings
    with pytest.raises(TransferError, match="nothing to train"):
        LinearProbe().apply(model)
    assert all(p.requires_grad for p in model.parameters())
    assert {name.split(".")[1] for name in trained(PartialFreeze(1).apply(model))} == {"h", "ln_f"}


def test_parameters_that_the_architecture_fixes_stay_fixed():
    size = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    config = WhisperConfig(num_mel_bins=8, max_source_positions=8, num_labels=3, classifier_proj_size=8, **size)
    model = WhisperForAudioClassification(config)
    fixed = "encoder.embed_positions.weight"
    assert not dict(model.named_parameters())[fixed].requires_grad  # sinusoids, as transformers builds it
    for tuning in (LinearProbe(), FullFineTune(), copy.deepcopy(FullFineTune())):
        model = copy.deepcopy(tuning.apply(model))
        assert fixed not in trained(model)
    assert trained(model) == {name for name, _ in model.named_parameters()} - {fixed}


def test_a_network_frozen_by_hand_is_tuned_from_scratch():
    model = resnet().requires_grad_(False)  # as a teacher is
    assert trained(FullFineTune().apply(model)) == {name for name, _ in model.named_parameters()}


def test_gradual_unfreezing_trains_ever_more_of_one_network():
    model, counts = vit(), []
    for phase in GradualUnfreeze(4, batch_norm="eval").phases(model):
        assert phase.batch_norm == "eval"
        counts.append(groups_trained(phase.apply(model)))
    frozen, live = [False], [True]
    assert counts == [
        frozen * 8 + live,
        frozen * 5 + live * 4,
        frozen * 3 + live * 6,
        live * 9,
    ]


def test_gradual_unfreezing_by_sizes():
    phases = GradualUnfreeze((0, 1, 4, "all")).phases(resnet())
    assert phases == [LinearProbe(), PartialFreeze(1), PartialFreeze(4), FullFineTune()]
    assert GradualUnfreeze([1, 2]).phases(resnet()) == [PartialFreeze(1), PartialFreeze(2)]
    assert len(GradualUnfreeze(100).phases(resnet())) == 5  # 0 to 3 blocks one by one and 4; then everything


@pytest.mark.parametrize("steps", [1, True, "all", (), (2, 1), (1, 1), ("all", 1), (-1,), (0.5,)])
def test_gradual_unfreezing_refuses_steps(steps):
    with pytest.raises(TransferError, match=r"phases|steps"):
        GradualUnfreeze(steps)


def test_gradual_unfreezing_refuses_more_blocks_than_there_are():
    with pytest.raises(TransferError, match="9, and ResNet has 4 blocks"):
        GradualUnfreeze((0, 9)).phases(resnet())


def test_gradual_unfreezing_is_not_one_training():
    with pytest.raises(TransferError, match="phases"):
        GradualUnfreeze().apply(resnet())
    assert LinearProbe().phases(resnet()) == [LinearProbe()]


def test_tunings_by_name():
    assert [type(tuning_from_name(name)) for name in TUNINGS] == [
        FullFineTune,
        LinearProbe,
        PartialFreeze,
        GradualUnfreeze,
        BitFit,
        LoRA,
    ]
    assert tuning_from_name("partial", train_blocks=0.5) == PartialFreeze(0.5)
    assert tuning_from_name("partial", train_blocks=["layer4"]) == PartialFreeze("layer4")
    assert tuning_from_name("lora", lora_r=4) == LoRA(r=4)
    assert all(isinstance(tuning_from_name(name), Tuning) for name in TUNINGS)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("LoRA", {}, "full, linear_probe, partial, gradual, bitfit, lora"),
        ("full", {"train_blocks": 2}, "train_blocks applies to tuning 'partial', not to 'full'"),
        ("partial", {"lora_r": 4}, "lora_r applies to tuning 'lora'"),
        ("lora", {"train_blocks": 1}, "train_blocks applies"),
        ("lora", {"lora_r": 0}, "rank"),
    ],
)
def test_tuning_from_name_refuses(name, options, says):
    with pytest.raises(TransferError, match=says):
        tuning_from_name(name, **options)
