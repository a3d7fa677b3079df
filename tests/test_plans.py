"""The plan counts what trains."""

from __future__ import annotations

import copy

import pytest
from tuned_networks import each_network, resnet, vit

from hf_transfer.anatomy import Anatomy
from hf_transfer.errors import TransferError
from hf_transfer.tuning import FullFineTune, LinearProbe, LoRA, PartialFreeze, plan

# peft 0.21 asks transformers by a name that it renames; see adapters.attach.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@each_network
def test_plan_counts_every_parameter_once(build):
    network = build()
    everything = sum(p.numel() for p in network.parameters())
    whole = plan(FullFineTune().apply(copy.deepcopy(network)))
    assert whole.total == whole.trainable == everything
    assert len(whole.rows) == Anatomy.of(network).depth + 3
    probe = LinearProbe().apply(copy.deepcopy(network))
    assert plan(probe).trainable == sum(p.numel() for p in probe.parameters() if p.requires_grad)
    lora = LoRA(r=2).apply(copy.deepcopy(network))
    adapters = sum(p.numel() for name, p in lora.named_parameters() if "lora_" in name)
    counted = plan(lora)
    assert counted.total == everything + adapters
    assert counted.trainable == adapters + whole.rows[-1].total
    assert [row.name for row in counted.rows] == [row.name for row in whole.rows]


def test_plan_counts_adapters_in_their_block():
    rows = {row.name: row for row in plan(LoRA(r=2, targets=["blocks.3.attn.qkv"]).apply(vit())).rows}
    width = 64
    assert rows["blocks.3"].trainable == 2 * (width + 3 * width)
    assert not rows["blocks.2"].trained and not rows["neck"].trained


def test_plan_is_a_table():
    model = PartialFreeze(2).apply(resnet())
    table = str(plan(model, learning_rate=1e-3, head_learning_rate=1e-2, layer_decay=0.5)).splitlines()
    assert [line.split()[0] for line in table] == ["group", "stem", "layer1", "layer3", "head", "all"]
    assert "layer1 .. layer2 (2 blocks)" in table[2] and "frozen" in table[2]
    assert table[3].endswith("0.00025 .. 0.0005") and table[4].endswith("0.01")
    counts = plan(model)
    assert f"{counts.trainable:,}" in table[5] and f"{counts.total:,}" in table[5]
    assert {row.learning_rate for row in counts.rows} == {None}


def test_plan_without_rates_and_with_bad_ones():
    with pytest.raises(TransferError, match="layer_decay"):
        plan(resnet(), learning_rate=1e-3, layer_decay=1.5)
