"""Where networks are cut, that the rest goes on from the stored value as the whole does, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tuned_networks import IMAGE, bert, gpt2, resnet, vit, wrapped

from hf_transfer.anatomy import Anatomy
from hf_transfer.frozen.prefix import Cut, NoCut, find_cut
from hf_transfer.objective import logits_of
from hf_transfer.tuning import BitFit, FullFineTune, LinearProbe, LoRA, PartialFreeze

# peft 0.21 asks transformers by a name that it renames; see adapters.attach.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def pixels(rows: int = 4, seed: int = 0) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(rows, *IMAGE[1:], generator=torch.Generator().manual_seed(seed))}


def texts(rows: int = 4, length: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Token ids, padded on the right."""
    ids = torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(length) < torch.tensor([length - 2 * (row % 3) for row in range(rows)])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


CUTS = {  # network, tuning, its inputs: the last module below the cut or the first above it, shape of a row
    "resnet probe": (wrapped, LinearProbe(), pixels, "before timm_model.fc", (96,)),
    "resnet stage": (wrapped, PartialFreeze(1), pixels, "before timm_model.layer4", (192, 2, 2)),
    "vit probe": (lambda: wrapped("test_vit"), LinearProbe(), None, "before timm_model.head", (64,)),
    "vit blocks": (lambda: wrapped("test_vit"), PartialFreeze(2), None, "after timm_model.blocks.3", (101, 64)),
    "convnext": (lambda: wrapped("test_convnext"), PartialFreeze(1), pixels, None, None),
    "bert probe": (bert, LinearProbe(), texts, "before dropout", (16,)),
    "bert layers": (bert, PartialFreeze(2), texts, "after bert.encoder.layer.0", (8, 16)),
    "gpt2 layer": (gpt2, PartialFreeze(1), texts, "after transformer.h.0", (8, 16)),
}


def of_side(rows: int, seed: int) -> dict[str, Tensor]:
    """test_vit's own size."""
    return {"pixel_values": torch.randn(rows, 3, 160, 160, generator=torch.Generator().manual_seed(seed))}


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return logits_of(model.eval()(**inputs))


@torch.no_grad()
def rest(cut: Cut, inputs: dict[str, Any], value: Tensor) -> Tensor:
    cut.model.eval()
    return logits_of(cut.rest(inputs, value))


@pytest.mark.parametrize("case", CUTS)
def test_the_rest_goes_on_from_other_rows_and_lengths(case: str) -> None:
    build, tuning, make, place, shape = CUTS[case]
    model = tuning.apply(build()).train()
    modes = [module.training for module in model.modules()]
    cut = find_cut(model, make(4) if make else of_side(4, 0))
    assert [module.training for module in model.modules()] == modes
    if place is not None:
        assert str(cut).startswith(f"{place}, ")
        assert cut.shape == shape
    for rows, more in ((3, {"length": 11, "seed": 7}), (7, {"length": 5, "seed": 8})):
        inputs = make(rows, **more) if make is texts else of_side(rows, 7) if make is None else pixels(rows, 7)
        expected, value = logits(model, inputs), cut.capture(inputs)
        given = {name: item for name, item in inputs.items() if name != "pixel_values"}
        found = rest(cut, given, value)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        other = rest(cut, given, value + torch.randn(value.shape))
        assert (other - expected).abs().max() > 1e-4  # the value is what is read
        assert torch.equal(logits(model, inputs), expected)  # and the network is whole again


def test_nothing_below_the_cut_runs() -> None:
    model = PartialFreeze(1).apply(bert())
    cut, calls = find_cut(model, texts()), []
    value = cut.capture(texts())
    for layer in (model.bert.embeddings.word_embeddings, *model.bert.encoder.layer):
        leaf = layer.attention.self.query if hasattr(layer, "attention") else layer
        leaf.register_forward_hook(lambda module, *_: calls.append(module))
    cut.rest(texts(), value)
    assert calls == [model.bert.encoder.layer[2].attention.self.query]


def test_dropout_behind_the_cut_draws_as_ever() -> None:
    """Head-side dropout lies above the cut: the value is what was before it, and training draws the same masks."""
    model = LinearProbe().apply(bert(classifier_dropout=0.5)).train()
    cut = find_cut(model, texts())
    value = cut.capture(texts())
    assert all(module.training for module in (model, model.dropout))
    torch.manual_seed(1)
    expected = model(**texts()).logits
    torch.manual_seed(1)
    torch.testing.assert_close(cut.rest(texts(), value)["logits"], expected)


def test_functional_dropout_before_the_head_stays_live() -> None:
    """timm's drop_rate may be a function call of the network itself, which no module shows."""
    import timm

    model = LinearProbe().apply(timm.create_model("test_resnet", num_classes=5, drop_rate=0.5)).train()
    cut = find_cut(model, {"x": pixels()["pixel_values"]})
    value = cut.capture({"x": pixels()["pixel_values"]})
    torch.manual_seed(1)
    expected = model(pixels()["pixel_values"])
    torch.manual_seed(1)
    torch.testing.assert_close(logits_of(cut.rest({}, value)), expected)


class Skips(nn.Module):
    """What the network was given is read again behind its frozen part: two values cross."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.head, self.skip = nn.Linear(6, 3), skip

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.b(self.a(self.stem(x)))
        return self.head(hidden * (1 + x.mean(1, keepdim=True)) if self.skip else hidden * 2)


@pytest.mark.parametrize("skip", [False, True])
def test_what_needs_two_values_is_refused(skip: bool) -> None:
    torch.manual_seed(0)
    model = PartialFreeze("b").apply(Skips(skip))
    model.head.requires_grad_(True)
    batch = {"x": torch.randn(4, 6)}
    if not skip:
        assert find_cut(model, batch).name == "a"
        return
    with pytest.raises(NoCut, match="the rest is not the whole"):
        find_cut(model, batch)


class Shifted(nn.Module):
    """A parameter of the head that a frozen block's input is shifted by: 0 at first, so that no output shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.head = nn.Linear(6, 3)
        self.head.shift = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x) + self.head.shift))


def test_a_parameter_that_trains_below_is_seen_by_its_gradient() -> None:
    """The cut lies below it then, though the network's outputs alone would allow one above."""
    torch.manual_seed(0)
    model = LinearProbe().apply(Shifted())
    assert model.head.shift.requires_grad
    assert str(find_cut(model, {"x": torch.randn(4, 6)})) == "after stem, 6 numbers a row"


@pytest.mark.parametrize(
    ("build", "tuning", "why"),
    [
        (bert, FullFineTune(), "nothing is frozen below"),
        (bert, BitFit(), "cannot be cut|nothing is frozen"),
        (bert, LoRA(r=2), "PeftModel wraps the network"),
    ],
    ids=["full", "bitfit", "lora"],
)
def test_refused(build: Any, tuning: Any, why: str) -> None:
    model = tuning.apply(build())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NoCut, match=why):
        find_cut(model, texts())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_statistics_that_move_lie_above_the_cut() -> None:
    model = LinearProbe(batch_norm="train").apply(resnet()).train()
    before = copy.deepcopy(model.state_dict())
    assert str(find_cut(model, {"x": pixels()["pixel_values"]})).startswith("before conv1.1,")  # the first BatchNorm
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_values_that_depend_on_padding_are_refused() -> None:
    """GPT-2 numbers positions from the left, padding included."""
    batch = {name: item.flip(1) for name, item in texts().items()}
    with pytest.raises(NoCut, match="depend on how it is padded"):
        find_cut(PartialFreeze(1).apply(gpt2()), batch)


def test_fingerprint_is_of_what_lies_below() -> None:
    def fingerprint(change: str = "", tuning: Any = None, **options: Any) -> str:
        model = bert(**options)
        if change:
            model.get_parameter(change).data.add_(1)
        model = (tuning or LinearProbe()).apply(model)
        return find_cut(model, texts()).fingerprint(Anatomy.of(model))

    assert fingerprint() == fingerprint("classifier.weight")
    others = [fingerprint(), fingerprint("bert.pooler.dense.bias"), fingerprint(tuning=PartialFreeze(1))]
    assert len({*others, fingerprint(layer_norm_eps=1e-3)}) == 4


@pytest.mark.parametrize("build", [wrapped, bert, vit])
@pytest.mark.parametrize("tuning", [LinearProbe(), PartialFreeze(1)], ids=["probe", "partial"])
def test_no_graph_is_built_below_what_trains(build: Any, tuning: Any) -> None:
    """Uncached too: autograd keeps nothing of the frozen part, whatever the mode, as if under no_grad."""
    key = "input_ids" if build is bert else "pixel_values" if build is wrapped else "x"
    batch = texts() if build is bert else {key: pixels()["pixel_values"]}
    saved = {}
    for name, what in (("full", FullFineTune()), ("tuned", tuning), ("rest", tuning)):
        model, kept = what.apply(build()).train(), []
        if name == "rest":
            cut = find_cut(model, batch)
            value, given = cut.capture(batch), {n: item for n, item in batch.items() if n not in cut.inputs}
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()), lambda x: x):
            if name == "rest":
                cut.rest(given, value)
            else:
                model(**batch)
        saved[name] = sum(kept)
    assert saved["tuned"] == saved["rest"] < saved["full"] / 2
