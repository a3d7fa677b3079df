"""L2-SP: what is near what, with and without adapters, and that the start survives a resume."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hf_transfer.errors import TransferError
from hf_transfer.objective import Learner, Step
from hf_transfer.objectives import L2SP, CrossEntropy
from hf_transfer.objectives.proximity import squared_distance, squared_product

ALPHA, BETA = 0.3, 0.05


class Net(nn.Module):
    """Tokens (N, T) -> (N, 2), through every kind of layer that LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.conv = nn.Conv2d(4, 6, (1, 3), padding=(0, 1))
        self.grouped = nn.Conv2d(6, 6, 1, groups=2)
        self.linear = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> SimpleNamespace:
        h = self.embed(x).transpose(1, 2)[:, :, None]  # (N, 4, 1, T)
        h = self.grouped(self.conv(h)).mean(dim=(2, 3))  # (N, 6)
        return SimpleNamespace(logits=self.head(self.norm(self.linear(h))))


class FakeAnatomy:
    """Two groups: all but `head` is a block."""

    depth = 1
    classifiers = ("head",)

    def group(self, name: str) -> int:
        return 3 if "head" in name.split(".") else 1


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return {"x": torch.arange(12).view(3, 4) % 7, "labels": torch.tensor([0, 1, 1])}


def learner_of(model: nn.Module, **arguments) -> Learner:
    return Learner(model, [L2SP(**{"alpha": ALPHA, "beta": BETA, **arguments})], FakeAnatomy())


def value_of(learner: Learner) -> Tensor:
    step = Step(learner.model, {}, None, logits=torch.zeros(1, 2))
    return learner.objectives[0](step)


def move(model: nn.Module) -> nn.Module:
    """Shakes everything that trains."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


# ---- pure functions -------------------------------------------------------------------------------------------------


def test_squared_distance_by_its_closed_form() -> None:
    a = [torch.tensor([[3.0, 0.0]], dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)]
    b = [torch.tensor([[0.0, 4.0]], dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)]
    assert float(squared_distance(a, b)) == pytest.approx(26)
    assert float(squared_distance(a)) == pytest.approx(13)
    assert squared_distance([]) == 0
    for x in (a, b):
        for tensor in x:
            tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: squared_distance(t[:2], t[2:]), (*a, *b))


def test_the_gradient_at_the_start_is_zero_not_nan() -> None:
    w = torch.ones(3, requires_grad=True)
    squared_distance([w], [torch.ones(3)]).backward()
    assert torch.equal(w.grad, torch.zeros(3))


def test_squared_distance_of_half_precision_is_summed_in_float32() -> None:
    w = [torch.full((400, 400), 1.0, dtype=torch.float16)]
    assert float(squared_distance(w)) == pytest.approx(160_000)  # float16 ends at 65504


def test_squared_product_is_the_norm_of_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(5, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    a = torch.randn(2, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(squared_product(b, a), (b @ a).square().sum())
    assert torch.autograd.gradcheck(squared_product, (b, a))


def test_squared_product_does_not_form_the_product() -> None:
    value = squared_product(torch.ones(300_000, 1), torch.ones(1, 300_000))  # formed, 360 GB
    assert float(value) == pytest.approx(9e10)


# ---- all of the network trains --------------------------------------------------------------------------------------


def test_value_and_gradient_by_the_papers_equation(batch) -> None:
    net = Net()
    net.conv.requires_grad_(False)
    start = copy.deepcopy(net)
    learner = learner_of(net, weight=2.0)
    torch.testing.assert_close(value_of(learner), BETA / 2 * squared_distance(list(net.head.parameters())))
    with torch.no_grad():
        net.conv.weight.add_(1.0)  # frozen: does not count
    move(net)
    expected = torch.tensor(0.0, dtype=torch.float64)
    for name, w in net.named_parameters():
        w, w0 = w.detach().double(), start.get_parameter(name).detach().double()
        if name.startswith("head."):
            expected += BETA / 2 * w.square().sum()
        elif not name.startswith("conv."):
            expected += ALPHA / 2 * (w - w0).square().sum()
    signal = learner(batch)
    torch.testing.assert_close(signal.terms["l2sp"].double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(signal.loss, 2 * signal.terms["l2sp"])
    signal.loss.backward()
    for name, w in net.named_parameters():
        if name.startswith("conv."):
            assert w.grad is None
            continue
        of_head = BETA * w if name.startswith("head.") else ALPHA * (w - start.get_parameter(name))
        torch.testing.assert_close(w.grad, 2 * of_head.detach(), rtol=1e-5, atol=1e-6)


def test_training_with_it_stays_nearer_the_start(batch) -> None:
    distances = []
    for terms in ([CrossEntropy()], [CrossEntropy(), L2SP(alpha=5.0)]):
        net = Net()
        start = [p.detach().clone() for p in net.linear.parameters()]
        learner = Learner(net, terms, FakeAnatomy())
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            learner(batch).loss.backward()
            optimizer.step()
        distances.append(float(squared_distance(list(net.linear.parameters()), start).detach()))
    assert distances[1] < distances[0] / 2


# ---- the start ------------------------------------------------------------------------------------------------------


def test_the_start_is_state_but_neither_parameter_nor_buffer() -> None:
    learner = learner_of(Net())
    term = learner.objectives[0]
    assert not list(term.parameters())
    assert not list(term.buffers())  # DDP broadcasts buffers at every step
    start = learner.state_dict()["objectives.0._extra_state"]
    assert torch.equal(start["linear.weight"], learner.model.linear.weight)
    assert not [name for name in start if name.startswith("head.")]


def test_a_resumed_run_has_the_first_runs_start() -> None:
    first = learner_of(Net())
    move(first.model)
    file = io.BytesIO()
    torch.save(first.objectives.state_dict(), file)
    file.seek(0)
    model = Net()
    model.load_state_dict(first.model.state_dict())
    second = learner_of(model)  # remembers the weights of the interruption
    assert value_of(second) != value_of(first)
    second.objectives.load_state_dict(torch.load(file, weights_only=True))
    assert value_of(second) == value_of(first)


def test_another_models_start_is_refused() -> None:
    state = learner_of(Net()).objectives.state_dict()
    other = Net()
    other.linear = nn.Linear(6, 9)
    with pytest.raises(TransferError, match=r"not this model's: \['linear.bias', 'linear.weight'\]"):
        learner_of(other).objectives.load_state_dict(state)


def test_phases_on_one_model_share_one_start() -> None:
    net = Net()
    net.embed.requires_grad_(False)
    pretrained = copy.deepcopy(net)
    term = L2SP()
    Learner(net, [term], FakeAnatomy())
    move(net)
    net.embed.requires_grad_(True)  # the next phase, with a trainer of its own
    Learner(net, [term], FakeAnatomy())
    start = term.get_extra_state()
    assert torch.equal(start["linear.weight"], pretrained.linear.weight)
    assert torch.equal(start["embed.weight"], pretrained.embed.weight)
    other = move(Net())
    Learner(other, [term], FakeAnatomy())
    assert torch.equal(term.get_extra_state()["linear.weight"], other.linear.weight)


def test_a_half_precision_model_keeps_its_start() -> None:
    learner = learner_of(Net().half())
    with torch.no_grad():
        learner.model.linear.weight.add_(1.0)
    moved = value_of(learner) - value_of(learner_of(Net().half()))
    torch.testing.assert_close(moved, torch.tensor(ALPHA / 2 * 30), rtol=1e-3, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device: CUDA")
def test_the_start_follows_the_parameters_device() -> None:
    learner = learner_of(Net())
    move(learner.model)
    expected = value_of(learner)
    learner.to("cuda")
    step = Step(learner.model, {}, None, logits=torch.zeros(1, 2, device="cuda"))
    torch.testing.assert_close(learner.objectives[0](step).cpu(), expected)
    assert {w0.device.type for w0 in learner.objectives[0].get_extra_state().values()} == {"cuda"}


# ---- LoRA: the start is the model with the adapter switched off -----------------------------------------------------

TARGETS = ["embed", "conv", "linear"]


def adapted(**arguments) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": TARGETS, **arguments})
    return get_peft_model(Net().double(), config)


def deviation(model: nn.Module, layers: list[str] = TARGETS, adapters: list[str] | None = None) -> Tensor:
    """Of the merged weights from those of a model that never had an adapter."""
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=adapters)
    start = Net().double()
    pairs = [(merged.get_submodule(name).weight, start.get_submodule(name).weight) for name in layers]
    return sum((w - w0).square().sum() for w, w0 in pairs)


@pytest.mark.parametrize("arguments", [{}, {"use_rslora": True}, {"r": 3, "init_lora_weights": "gaussian"}])
def test_with_lora_the_deviation_is_that_of_the_merged_weights(arguments) -> None:
    learner = learner_of(adapted(**arguments))
    assert value_of(learner) == 0
    move(learner.model)
    torch.testing.assert_close(value_of(learner), ALPHA / 2 * deviation(learner.model), rtol=1e-9, atol=0)


def test_lora_gradients_agree_with_finite_differences() -> None:
    learner = learner_of(adapted())
    model = move(learner.model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 6
    gradients = torch.autograd.grad(value_of(learner), trained)
    eps = 1e-6
    for p, gradient in zip(trained, gradients, strict=True):
        for index in range(p.numel()):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    p.view(-1)[index] += sign * eps
                    values.append(float(value_of(learner)))
                    p.view(-1)[index] -= sign * eps
            difference = (values[0] - values[1]) / (2 * eps)
            assert float(gradient.view(-1)[index]) == pytest.approx(difference, rel=1e-5, abs=1e-7)


def test_two_active_adapters_deviate_by_their_sum() -> None:
    from peft import LoraConfig

    model = adapted()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["linear", "conv", "embed"]))
    model.base_model.set_adapter(["default", "other"])
    learner = learner_of(move(model))
    expected = deviation(model, adapters=["default", "other"])
    torch.testing.assert_close(value_of(learner), ALPHA / 2 * expected, rtol=1e-9, atol=0)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning")
def test_a_grouped_convolution_deviates_by_what_its_adapter_does_to_each_input() -> None:
    # PEFT cannot merge these: the deviation is read off the layer's answers to one-hot inputs.
    model = adapted(target_modules=["grouped"])
    learner = learner_of(move(model))
    layer, one_hot = model.base_model.model.grouped, torch.eye(6, dtype=torch.float64)[:, :, None, None]
    columns = layer(one_hot) - layer.get_base_layer()(one_hot)
    torch.testing.assert_close(value_of(learner), ALPHA / 2 * columns.square().sum(), rtol=1e-9, atol=0)


def test_layers_that_only_peft_knows() -> None:
    from peft import AdaLoraConfig, get_peft_model

    model = get_peft_model(Net().double(), AdaLoraConfig(total_step=10, target_modules=["linear"]))
    learner = learner_of(move(model))
    torch.testing.assert_close(value_of(learner), ALPHA / 2 * deviation(model, ["linear"]), rtol=1e-9, atol=0)


def test_modules_to_save_are_held_to_their_originals_and_the_head_to_zero() -> None:
    model = adapted(target_modules=["linear"], modules_to_save=["norm", "head"])
    with torch.no_grad():  # as an adapter that was trained before, and is trained on
        model.base_model.model.norm.modules_to_save["default"].weight.add_(1.0)
    learner = learner_of(model)
    move(model)
    start, peft = Net().double(), model.base_model.model
    norm, head = peft.norm.modules_to_save["default"], peft.head.modules_to_save["default"]
    expected = ALPHA / 2 * (
        deviation(model, ["linear"]) + squared_distance(list(norm.parameters()), list(start.norm.parameters()))
    ) + BETA / 2 * squared_distance(list(head.parameters()))  # fmt: skip
    torch.testing.assert_close(value_of(learner), expected, rtol=1e-9, atol=0)


def test_biases_trained_beside_lora_have_their_start() -> None:
    model = adapted(target_modules=["linear"], bias="lora_only")
    learner = learner_of(model)
    move(model)
    bias = model.base_model.model.linear.bias
    expected = deviation(model, ["linear"]) + (bias - Net().double().linear.bias).square().sum()
    torch.testing.assert_close(value_of(learner), ALPHA / 2 * expected, rtol=1e-9, atol=0)


def test_autocast_does_not_round_it() -> None:
    learner = learner_of(move(adapted().float()))
    plain = value_of(learner)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(value_of(learner), plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_dora": True, "target_modules": ["linear"]}, "plain LoRA, B A, and the Linear, DoraLinearVariant 'base"),
        ({"lora_bias": True, "target_modules": ["linear"]}, "lora_bias=False"),
        ({"init_lora_weights": "olora", "target_modules": ["linear"]}, "'olora', which moves the frozen weights too"),
    ],
)
def test_adapters_whose_deviation_is_more_than_their_product_are_refused(arguments, message) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Net(), LoraConfig(r=2, **arguments))
    with pytest.raises(TransferError, match=message):
        learner_of(model)


def test_adapters_that_are_not_lora_are_refused() -> None:
    from peft import IA3Config, get_peft_model

    model = get_peft_model(Net(), IA3Config(target_modules=["linear"], feedforward_modules=["linear"]))
    with pytest.raises(TransferError, match=r"plain LoRA, B A, and the Linear 'base_model.model.linear'"):
        learner_of(model)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{"alpha": -0.1}, {"beta": float("inf")}, {"alpha": float("nan")}])
def test_strengths_out_of_range(arguments) -> None:
    with pytest.raises(TransferError, match="alpha and beta must be >= 0 and finite"):
        L2SP(**arguments)


def test_a_model_without_a_known_head_is_refused() -> None:
    with pytest.raises(TransferError, match="which parameters of Net are the new head"):
        Learner(Net(), [L2SP()], None)
