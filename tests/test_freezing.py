"""What is frozen does not move and stays in eval mode: BatchNorm, dropout, masking, copies, DDP."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import nn
from tuned_networks import IMAGE, bert, each_network, resnet, run, speech, statistics, trained, vit, wrapped

from hf_transfer.errors import TransferError
from hf_transfer.tuning import BitFit, FullFineTune, LinearProbe, LoRA, PartialFreeze, merge

# peft 0.21 asks transformers by a name that it renames; see adapters.attach.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def moved(model: nn.Module) -> set[str]:
    """First path components of the BatchNorm layers whose statistics a forward in train mode moves."""
    before = statistics(model)
    run(model.train())
    return {n.split(".")[0] for n, value in statistics(model).items() if not torch.equal(value, before[n])}


EVERYWHERE = {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}  # test_resnet's conv1 is a deep stem


@pytest.mark.parametrize(
    ("tuning", "expected"),
    [
        (FullFineTune(), EVERYWHERE),
        (FullFineTune(batch_norm="eval"), set()),
        (LinearProbe(), set()),
        (LinearProbe(batch_norm="train"), EVERYWHERE),
        (PartialFreeze(2), {"layer3", "layer4"}),
        (PartialFreeze(2, batch_norm="eval"), set()),
        (PartialFreeze(2, batch_norm="train"), EVERYWHERE),
        (PartialFreeze("layer3.0.conv1"), set()),  # its neighbours in the block are frozen, their statistics with them
        (BitFit(), EVERYWHERE),
    ],
    ids=lambda value: "+".join(sorted(value)) or "nothing" if isinstance(value, set) else str(value),
)
def test_batch_norm_policy(tuning, expected):
    model = tuning.apply(resnet())
    assert moved(model) == expected
    before = statistics(model)
    run(model.eval())
    assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())


@pytest.mark.parametrize("policy", ["auto", "train", "eval"])
def test_batch_norm_of_the_base_under_lora(policy):
    model = LoRA(r=2, batch_norm=policy).apply(resnet())
    before = statistics(model)
    run(model.train())
    still = [torch.equal(value, before[name]) for name, value in statistics(model).items()]
    assert not any(still) if policy == "train" else all(still)


def test_batch_norm_policy_must_be_known():
    with pytest.raises(TransferError, match=r"\['auto', 'train', 'eval'\], got 'frozen'"):
        LinearProbe(batch_norm="frozen")


def is_random(model: nn.Module) -> bool:
    return not torch.equal(run(model), run(model))


@pytest.mark.parametrize("build", [lambda: vit(proj_drop_rate=0.5, attn_drop_rate=0.5, pos_drop_rate=0.5), bert])
def test_dropout_of_frozen_blocks_is_off(build):
    model = build().train()
    model.dropout = nn.Identity()  # bert's, between pooler and classifier: head side
    assert is_random(model)
    assert not is_random(LinearProbe().apply(model).train())
    assert is_random(PartialFreeze(1).apply(model).train())
    assert is_random(FullFineTune().apply(model).train())
    assert not is_random(model.eval())


def test_dropout_of_the_head_stays_live():
    assert is_random(LinearProbe().apply(timm.create_model("test_resnet", num_classes=5, drop_rate=0.5)).train())
    assert is_random(LinearProbe().apply(bert(hidden_dropout_prob=0.0, classifier_dropout=0.5)).train())


def test_masking_of_speech_is_off_where_all_of_the_encoder_is_frozen():
    """SpecAugment and layer drop read `self.training` of the encoder itself, which is no leaf."""
    torch.manual_seed(0)
    model = speech()
    model.config.mask_time_prob, model.config.mask_time_length = 0.5, 2
    assert is_random(model.train())
    assert not is_random(LinearProbe().apply(model).train())


def test_frozen_blocks_called_one_by_one_are_in_eval_mode():
    """`output_hidden_states` iterates over the blocks, past the hook of the list that holds them."""
    model = LinearProbe().apply(wrapped())
    before = statistics(model)
    model.train()(pixel_values=torch.randn(IMAGE), output_hidden_states=True)
    assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())


@each_network
def test_eval_outputs_do_not_change(build):
    network = build()
    model = copy.deepcopy(network).eval()
    expected = run(model)
    for tuning in (LinearProbe(), PartialFreeze(1), BitFit(), FullFineTune()):
        assert torch.equal(run(tuning.apply(model).train().eval()), expected)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("tuning", [PartialFreeze(1), LoRA(r=2)], ids=["partial", "lora"])
def test_frozen_state_survives_deepcopy_and_pickle(clone, tuning):
    model = clone(tuning.apply(wrapped()))
    last = {"timm_model.layer4"} if isinstance(tuning, PartialFreeze) else set()
    before = statistics(model)
    run(model.train())
    names = {".".join(n.split(".")[:2]) for n, value in statistics(model).items() if not torch.equal(value, before[n])}
    assert names == last
    again = merge(model)
    assert trained(FullFineTune().apply(again)) == {name for name, _ in again.named_parameters()}
    before = statistics(again)
    run(again.train())
    assert not any(torch.equal(value, before[name]) for name, value in statistics(again).items())


def test_applying_again_leaves_one_hook_on_a_module():
    model = resnet()
    for _ in range(3):
        LinearProbe().apply(model)
    assert max(len(module._forward_pre_hooks) for module in model.modules()) == 1
    others = model.layer1.register_forward_pre_hook(lambda module, inputs: None)
    FullFineTune().apply(model)
    assert [len(module._forward_pre_hooks) for module in model.modules() if module._forward_pre_hooks] == [1]  # theirs
    others.remove()


def test_frozen_state_under_ddp(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = PartialFreeze(1).apply(resnet())
        parallel = nn.parallel.DistributedDataParallel(model)
        before = statistics(model)
        parallel.train()(torch.randn(IMAGE)).sum().backward()
        still = {n.split(".")[0] for n, value in statistics(model).items() if torch.equal(value, before[n])}
        assert still == EVERYWHERE - {"layer4"}
        assert {n for n, p in model.named_parameters() if p.grad is not None} == trained(model)
    finally:
        torch.distributed.destroy_process_group()
