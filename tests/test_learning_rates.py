"""Parameter groups: the Trainer's own without options, closed-form rates with them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from tuned_networks import bert, resnet, vit

from hf_transfer.anatomy import Anatomy
from hf_transfer.errors import TransferError
from hf_transfer.learning_rates import group_rates, parameter_groups
from hf_transfer.tuning import LinearProbe, LoRA, PartialFreeze, plan

# peft 0.21 asks transformers by a name that it renames; see adapters.attach.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


TUNED = {
    "bert": bert,
    "resnet": resnet,
    "vit": vit,
    "bert, probed": lambda: LinearProbe().apply(bert()),
    "bert, partly frozen": lambda: PartialFreeze(1).apply(bert()),
    "vit, LoRA": lambda: LoRA(r=2).apply(vit()),
}


def names(model: nn.Module, groups: list[dict]) -> list[list[str]]:
    of = {parameter: name for name, parameter in model.named_parameters()}
    return [[of[parameter] for parameter in group["params"]] for group in groups]


@pytest.mark.parametrize("build", TUNED.values(), ids=TUNED)
def test_without_options_the_groups_are_the_trainers(build, tmp_path):
    """The same parameters in the same order: optimizer states, and so results, are then equal bit for bit."""
    model = build()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=2e-3, weight_decay=0.05, report_to="none", use_cpu=True
    )
    stock = Trainer(model, arguments).create_optimizer()
    groups = parameter_groups(model, learning_rate=2e-3, weight_decay=0.05)
    assert names(model, groups) == names(model, stock.param_groups)
    for mine, theirs in zip(groups, stock.param_groups, strict=True):
        assert (mine["lr"], mine["weight_decay"]) == (theirs["lr"], theirs["weight_decay"])
    assert [group["name"] for group in groups] == ["decay", "no_decay"]


OPTIONS = [{"layer_decay": 0.5}, {"head_learning_rate": 0.3}, {"layer_decay": 0.9, "head_learning_rate": 0.3}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("build", TUNED.values(), ids=TUNED)
def test_every_trainable_parameter_is_in_one_group_of_its_part(build, options):
    model = build()
    anatomy = Anatomy.of(model)
    groups = parameter_groups(model, learning_rate=0.1, weight_decay=0.05, **options)
    members = names(model, groups)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(itertools.chain(*members)) == sorted(trainable)
    for group, inside in zip(groups, members, strict=True):
        assert inside and len({anatomy.group(name) for name in inside}) == 1
        part = anatomy.group_name(anatomy.group(inside[0]))
        assert group["name"] == f"{part}/{'decay' if group['weight_decay'] else 'no_decay'}"
    assert len({group["name"] for group in groups}) == len(groups)


@pytest.mark.parametrize("build", [bert, resnet, vit])
def test_rates_decay_by_depth_in_closed_form(build):
    model = build()
    anatomy = Anatomy.of(model)
    groups = parameter_groups(model, learning_rate=0.1, weight_decay=0.0, head_learning_rate=0.7, layer_decay=0.5)
    rate = {name: g["lr"] for g, inside in zip(groups, names(model, groups), strict=True) for name in inside}
    for name, value in rate.items():
        group = anatomy.group(name)
        below_neck = anatomy.depth + 1 - group
        assert value == (0.7 if group == anatomy.depth + 2 else pytest.approx(0.1 * 0.5**below_neck, rel=1e-12))
    assert min(rate.values()) == pytest.approx(0.1 * 0.5 ** (anatomy.depth + 1))  # the stem
    counts = plan(model, learning_rate=0.1, head_learning_rate=0.7, layer_decay=0.5)
    assert [row.learning_rate for row in counts.rows if row.trained] == sorted(set(rate.values()))


def test_rates_as_in_beit():
    """BEiT's 12 blocks: 14 layer ids (embeddings 0, blocks 1 to 12, the rest 13), scale decay ** (13 - id)."""
    rates = group_rates(12, learning_rate=4e-3, layer_decay=0.65)
    assert rates == pytest.approx([4e-3 * 0.65 ** (13 - layer) for layer in [*range(13), 13, 13]], rel=1e-12)
    assert rates[-1] == rates[-2] == 4e-3


def test_head_rate_alone_leaves_the_rest_at_the_full_rate():
    groups = parameter_groups(bert(), learning_rate=1e-3, weight_decay=0.01, head_learning_rate=1e-2)
    assert {g["lr"] for g in groups if g["name"].startswith("head/")} == {1e-2}
    assert {g["lr"] for g in groups if not g["name"].startswith("head/")} == {1e-3}


def test_by_depth_nothing_of_one_dimension_decays():
    """The Trainer decays the scales of BatchNorm, which its patterns do not know as a norm; groups by depth do not."""
    model = resnet()
    stock = names(model, parameter_groups(model, learning_rate=0.1, weight_decay=0.05))
    assert "layer1.0.bn1.weight" in stock[0]
    for group in parameter_groups(model, learning_rate=0.1, weight_decay=0.05, layer_decay=0.9):
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0.0)


def test_order_and_names_depend_on_the_network_alone():
    model = bert()
    first, second = (
        parameter_groups(m, learning_rate=0.1, weight_decay=0.05, layer_decay=0.5)
        for m in (model, copy.deepcopy(model))
    )
    assert [group["name"] for group in first] == [group["name"] for group in second]
    assert [group["name"] for group in first][:3] == ["stem/decay", "stem/no_decay", "bert.encoder.layer.0/decay"]
    assert names(model, first)[2][0] == "bert.encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be a positive number, got 0.0"),
        ({"learning_rate": -1e-3}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"head_learning_rate": 0.0}, "head_learning_rate must be a positive number"),
        ({"layer_decay": 0.0}, r"layer_decay must be in \(0, 1\], got 0.0"),
        ({"layer_decay": 1.1}, "layer_decay"),
        ({"layer_decay": float("nan")}, "layer_decay"),
        ({"weight_decay": -0.1}, "weight_decay must be a number >= 0, got -0.1"),
    ],
)
def test_values_out_of_range_are_refused(options, says):
    with pytest.raises(TransferError, match=says):
        parameter_groups(bert(), **{"learning_rate": 1e-3, "weight_decay": 0.0, **options})


def test_trains_at_the_rates_given():
    """One step of plain SGD moves each part by its own rate times the gradient."""
    torch.manual_seed(0)
    model = resnet().double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    anatomy = Anatomy.of(model)
    optimizer = torch.optim.SGD(
        parameter_groups(model, learning_rate=0.1, weight_decay=0.0, head_learning_rate=0.3, layer_decay=0.5)
    )
    model(torch.randn(2, 3, 32, 32, dtype=torch.double)).square().sum().backward()
    optimizer.step()
    rates = group_rates(anatomy.depth, learning_rate=0.1, head_learning_rate=0.3, layer_decay=0.5)
    for name, parameter in model.named_parameters():
        expected = before[name] - rates[anatomy.group(name)] * parameter.grad
        torch.testing.assert_close(parameter.detach(), expected)
