"""Words for layers become modules, shapes and projectors; every term then learns from every kind of network."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import Tensor, nn

from hf_transfer.anatomy import Taps
from hf_transfer.backbones import Backbone
from hf_transfer.distillation.mapping import connect, resolve
from hf_transfer.distillation.signal import TeacherSignal
from hf_transfer.distillation.survey import Survey
from hf_transfer.errors import TransferError
from hf_transfer.objective import Learner, Step, logits_of, match_rows, model_inputs
from hf_transfer.objectives import (
    CKA,
    CRD,
    PKD,
    RKD,
    AttentionTransfer,
    Hint,
    MiniLMRelation,
    ReviewKD,
    SimilarityPreserving,
    SoftTargets,
    TinyBERT,
)
from hf_transfer.objectives._layers import FeatureTerm

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SIDE = 64
SMALL_SWIN = {"embed_dim": 12, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "window_size": 4, "img_size": SIDE}
IMAGE_NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "cnn": ("test_resnet", {}),
    "vit": ("test_vit", {"img_size": SIDE}),
    "swin": ("swin_tiny_patch4_window7_224", SMALL_SWIN),
    "convnext": ("test_convnext", {}),
}


@cache
def image_net(kind: str, seed: int = 0) -> Backbone:
    import timm

    name, arguments = IMAGE_NETS[kind]
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=3, **arguments).eval()
    return Backbone(model, None, "image", "image-classification", name, None, None)


def text_net(model_type: str, class_name: str, **options: Any) -> Backbone:
    model = tiny.tiny_model(model_type, class_name, num_labels=3, **options)
    return Backbone(model, None, "text", "text-classification", model_type, None, None)


def bert(**options: Any) -> Backbone:
    return text_net("bert", "BertForSequenceClassification", **options)


def plain_cnn() -> Backbone:
    """Maps, then vectors, as in AlexNet and VGG."""
    layers = [nn.Conv2d(3, 6, 3, stride=8), nn.Conv2d(6, 6, 1), nn.MaxPool2d(2), nn.Conv2d(6, 8, 1)]
    layers += [nn.Flatten(), nn.Linear(8 * 16, 10), nn.Linear(10, 3)]
    return Backbone(nn.Sequential(*layers), None, "image", "image-classification", "plain", None, None)


def images(n: int = 4) -> dict[str, Tensor]:
    return {"pixel_values": tiny.images(SIDE, n)}


def words(n: int = 3) -> dict[str, Tensor]:
    ids = torch.randint(3, 100, (n, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def surveys(student: Backbone, teacher: Backbone, batch: dict[str, Tensor], *more: str) -> tuple[Survey, Survey]:
    networks = Survey("student", student), Survey("teacher", teacher)
    for network in networks:
        network.run(batch, [name for name in more if name in network.modules])
    return networks


def names(layers: Any, networks: tuple[Survey, Survey]) -> list[tuple[str, str]]:
    return [(pair.student, pair.teacher) for pair in resolve(layers, *networks)]


def learn(term: FeatureTerm, student: Backbone, teacher: Backbone, batch: dict[str, Tensor]) -> Tensor:
    """One forward and backward of a Learner with one term, after connect; the term's value."""
    connect([term], student, teacher, batch, batch)
    student.model.zero_grad()
    rows = len(next(iter(batch.values())))
    given = {**batch, "labels": torch.arange(rows) % 3, "example_id": torch.arange(rows)}
    layers, at = (
        Taps(teacher.model, term.teacher_layers),
        Taps(teacher.model, teacher.anatomy.classifiers[:1], inputs=True),
    )
    with torch.inference_mode(), layers, at:
        model: Any = teacher.model
        logits = logits_of(model(**batch) if teacher.modality == "text" else model(batch["pixel_values"]))
    feature = match_rows(next(iter(at.values.values())), logits, batch.get("attention_mask"))
    signal = TeacherSignal(logits, features=feature, hidden=dict(layers.values))
    learner = Learner(_named(student), [term], student.anatomy).train()
    learner.model.eval()  # no dropout
    got = learner(given, teacher=signal)
    got.loss.backward()
    return got.terms[term.name]


class _ByName(nn.Module):
    """A timm network as load_backbone would wrap it: takes pixel_values. Its own module paths stay."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["inner"] = model
        for name, child in model.named_children():
            self.add_module(name, child)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.__dict__["inner"](pixel_values)


def _named(backbone: Backbone) -> nn.Module:
    return backbone.model if backbone.modality == "text" else _ByName(backbone.model)


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


# words


def test_words_name_blocks_of_both_networks() -> None:
    networks = surveys(image_net("cnn"), image_net("vit"), images(), "layer2", "layer3", "norm")
    cnn, vit = [f"layer{i}" for i in (1, 2, 3, 4)], [f"blocks.{i}" for i in range(6)]
    assert [network.blocks for network in networks] == [cnn, vit]
    assert names("last", networks) == [("layer4", "blocks.5")]
    assert names(-1, networks) == names(1.0, networks) == names("last", networks)
    assert names(1, networks) == [("layer2", "blocks.1")]  # an index, and no depth
    assert names(0.5, networks) == [("layer2", "blocks.2")]
    assert names(0.0, networks) == [("layer1", "blocks.0")]
    assert names({0.5: 0.5, 1.0: 1.0}, networks) == [("layer2", "blocks.2"), ("layer4", "blocks.5")]
    assert names([0.25, "last"], networks) == [("layer1", "blocks.1"), ("layer4", "blocks.5")]
    assert names({"layer2": "blocks.3", "last": "norm"}, networks) == [("layer2", "blocks.3"), ("layer4", "norm")]
    assert names("features", networks) == [("features", "features")]
    assert names({"last": "features"}, networks) == [("layer4", "features")]
    assert names("uniform", networks) == [*zip(cnn, [vit[i] for i in (1, 2, 4, 5)], strict=True)]
    assert names("uniform", networks[::-1]) == [*zip(vit, [cnn[i] for i in (0, 0, 1, 2, 2, 3)], strict=True)]


def test_pairs_come_input_to_output_whatever_the_order_of_the_words() -> None:
    networks = surveys(image_net("cnn"), image_net("vit"), images())
    assert names({"features": "features", "last": 3, 0: 2}, networks) == [
        ("layer1", "blocks.2"),
        ("layer4", "blocks.3"),
        ("features", "features"),
    ]


def test_shapes_are_an_examples() -> None:
    networks = surveys(image_net("cnn"), image_net("swin"), images())
    first, last = resolve([0, -1], *networks)
    assert (first.student_shape, first.teacher_shape) == ((32, 16, 16), (12, 16, 16))  # swin's own is (16, 16, 12)
    assert (last.student_shape, last.teacher_shape) == ((96, 2, 2), (96, 2, 2))


def test_stages_end_where_the_resolution_changes() -> None:
    swin = ["layers.0", "layers.1", "layers.2.blocks.1", "layers.3"]
    cnn = ["layer1", "layer2", "layer3", "layer4"]
    assert names("stages", surveys(image_net("cnn"), image_net("swin"), images())) == [*zip(cnn, swin, strict=True)]
    vit = [f"blocks.{i}" for i in (1, 2, 4, 5)]  # it has none: equal quarters
    assert names("stages", surveys(image_net("vit"), image_net("cnn"), images())) == [*zip(vit, cnn, strict=True)]
    assert names("stages", surveys(image_net("vit"), image_net("vit"), images())) == [*zip(vit, vit, strict=True)]
    shallow, deep = bert(num_hidden_layers=2), bert(num_hidden_layers=6)
    layers = [("bert.encoder.layer.0", "bert.encoder.layer.2"), ("bert.encoder.layer.1", "bert.encoder.layer.5")]
    assert names("stages", surveys(shallow, deep, words())) == layers


def test_unequal_numbers_of_stages_meet_at_the_deepest() -> None:
    import timm

    model = timm.create_model("test_efficientnet", num_classes=3).eval()
    efficientnet = Backbone(model, None, "image", "image-classification", "efficientnet", None, None)
    networks = surveys(efficientnet, image_net("cnn"), images())
    pairs = resolve("stages", *networks)
    assert [pair.teacher for pair in pairs] == ["layer1", "layer2", "layer3", "layer4"]
    assert [pair.student_shape[1:] for pair in pairs] == [pair.teacher_shape[1:] for pair in pairs]
    assert len(networks[0].stages()) == 5


def test_a_network_that_ends_in_linear_blocks_has_stages_of_maps_only() -> None:
    networks = surveys(plain_cnn(), image_net("cnn"), images())
    assert networks[0].blocks == ["0", "1", "3", "5"]
    assert names("stages", networks) == [("1", "layer3"), ("3", "layer4")]
    assert resolve("last", *networks)[0].student_shape == (10,)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("layer9", r"The student has no layer 'layer9'. Close to it: \['layer\d'.*blocks \['layer1', 'layer2'"),
        (
            {"layer1": "layer1"},
            r"The teacher has no layer 'layer1'.*blocks \['blocks.0', 'blocks.1', '...', 'blocks.5'",
        ),
        (4, r"The student has no layer 4.*an integer in \[-4, 3\]"),
        (-5, "The student has no layer -5"),
        (1.5, r"The student has no layer 1.5.*a float in \[0.0, 1.0\]"),
        ({-0.1: 1.0}, "The student has no layer -0.1"),
        (True, "The student has no layer True"),
        (["uniform", 0], "The student has no layer 'uniform'.*For the whole network"),
        (None, "layers=None names no layers. Valid: 'uniform'"),
        ([], "got no layers to compare"),
    ],
)
def test_what_names_no_layer_is_refused_with_what_does(layers: Any, message: str) -> None:
    with pytest.raises(TransferError, match=message):
        connect([Hint(layers)], image_net("cnn"), image_net("vit"), images(), images())


# every term on every kind of network

TERMS = {
    "hint": lambda: Hint("stages"),
    "attention": lambda: AttentionTransfer(weight=1.0),
    "similarity": lambda: SimilarityPreserving(weight=1.0),
    "rkd": lambda: RKD("last"),
    "cka": lambda: CKA(),
    "pkd": lambda: PKD("uniform"),
    "crd": lambda: CRD(size=10, negatives=6),
    "review": lambda: ReviewKD(),
}


def cases() -> list[Any]:
    nets = [("cnn", "vit"), ("vit", "cnn"), ("cnn", "swin"), ("swin", "cnn"), ("vit", "convnext"), ("convnext", "vit")]
    return [(student, teacher, term) for student, teacher in nets for term in TERMS]


@pytest.mark.parametrize(("student", "teacher", "term"), cases())
def test_every_term_learns_across_architectures(student: str, teacher: str, term: str) -> None:
    it, own = TERMS[term](), image_net(student)
    value = learn(it, own, image_net(teacher, seed=1), images())
    assert value.isfinite()
    assert value > 0
    last = own.anatomy.depth
    groups = {own.anatomy.group(name) for name in trained(own.model)}
    assert {0, last} <= groups  # the gradient came in at the last block and went through to the stem
    assert trained(it) == {name for name, _ in it.named_parameters()}


@pytest.mark.parametrize("term", ["hint", "attention", "similarity", "rkd", "cka", "pkd"])
def test_a_network_that_is_its_teacher_has_nothing_to_learn(term: str) -> None:
    net = image_net("swin")
    assert learn(TERMS[term](), net, net, images()) < 1e-4


# inside of attention


def test_a_smaller_bert_learns_relations_and_states_of_a_larger_one() -> None:
    teacher = bert(num_hidden_layers=4, hidden_size=48, num_attention_heads=4)
    student = bert(num_hidden_layers=2, num_attention_heads=2)
    minilm = MiniLMRelation(relation_heads=8)
    assert learn(minilm, student, teacher, words()) > 0
    ends = [("query", "query"), ("key", "key"), ("value", "value")]
    at = "bert.encoder.layer.{}.attention.self.{}"
    assert [(p.student, p.teacher) for p in minilm.pairs] == [(at.format(1, a), at.format(3, b)) for a, b in ends]
    assert [p.role for p in minilm.pairs] == ["query", "key", "value"]
    assert {f"bert.encoder.layer.1.attention.self.{a}.weight" for a, _ in ends} <= trained(student.model)

    student = bert(num_hidden_layers=2, num_attention_heads=4)
    tiny_bert = TinyBERT(heads=4)
    assert learn(tiny_bert, student, teacher, words()) > 0
    by_role: dict[str, list[tuple[str, str]]] = {}
    for pair in tiny_bert.pairs:
        by_role.setdefault(pair.role, []).append((pair.student, pair.teacher))
    assert by_role["embedding"] == [("bert.embeddings", "bert.embeddings")]
    assert by_role["hidden"] == [(f"bert.encoder.layer.{a}", f"bert.encoder.layer.{b}") for a, b in ((0, 1), (1, 3))]
    assert by_role["query"] == [(at.format(a, "query"), at.format(b, "query")) for a, b in ((0, 1), (1, 3))]
    assert by_role["key"] == [(at.format(a, "key"), at.format(b, "key")) for a, b in ((0, 1), (1, 3))]
    assert {name: m.linear.weight.shape for name, m in tiny_bert.projectors.items()} == {  # type: ignore[union-attr]
        "embedding": (48, 32),
        "hidden": (48, 32),
    }
    assert "bert.embeddings.word_embeddings.weight" in trained(student.model)


@pytest.mark.parametrize(
    ("model_type", "class_name", "query"),
    [
        ("distilbert", "DistilBertForSequenceClassification", "distilbert.transformer.layer.2.attention.q_lin"),
        ("roberta", "RobertaForSequenceClassification", "roberta.encoder.layer.2.attention.self.query"),
        ("deberta-v2", "DebertaV2ForSequenceClassification", "deberta.encoder.layer.2.attention.self.query_proj"),
    ],
)
def test_students_of_bert(model_type: str, class_name: str, query: str) -> None:
    student, teacher = text_net(model_type, class_name), bert(num_hidden_layers=6)
    minilm = MiniLMRelation(relation_heads=4)
    assert learn(minilm, student, teacher, words()) > 0
    assert minilm.pairs[0].student == query
    assert f"{query}.weight" in trained(student.model)
    assert learn(TinyBERT(heads=4), student, teacher, words()) > 0


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda: image_net("vit"), "blocks.5.attn.qkv"),
        (lambda: text_net("gpt2", "GPT2ForSequenceClassification"), "transformer.h.2.attn.c_attn"),
        (lambda: text_net("modernbert", "ModernBertForSequenceClassification"), "model.layers.2.attn.Wqkv"),
    ],
    ids=["timm", "gpt2", "modernbert"],
)
def test_a_fused_projection_is_named_three_times(make: Any, path: str) -> None:
    net = make()
    batch = images() if net.modality == "image" else words()
    term = MiniLMRelation(relation_heads=4)
    assert learn(term, net, net, batch) < 1e-6
    assert {pair.student for pair in term.pairs} == {path}
    module = net.model.get_submodule(path)
    width = max(module.weight.shape)
    assert term.pairs[0].student_shape[-1] == width == 3 * min(module.weight.shape)
    with pytest.raises(TransferError, match=r"queries and keys together\. MiniLMRelation"):
        connect([TinyBERT(heads=4)], net, net, batch, batch)


def test_attention_between_sequences_is_no_self_attention() -> None:
    bart = text_net("bart", "BartForSequenceClassification")
    batch = {"input_ids": words()["input_ids"], "attention_mask": torch.ones(3, 8, dtype=torch.long)}
    batch["input_ids"][:, -1] = 2
    term = MiniLMRelation(relation_heads=4)
    connect([term], bart, bart, batch, batch)
    assert term.pairs[0].student == "model.decoder.layers.2.self_attn.q_proj"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: image_net("cnn"), "No queries, keys and values can be read in the student's 'layer4'"),
        (lambda: text_net("deberta", "DebertaForSequenceClassification"), "attention.self.in_proj"),
        (lambda: text_net("gpt_neox", "GPTNeoXForSequenceClassification"), "attention.query_key_value"),
        (lambda: _timm("tiny_vit"), "No queries, keys and values"),  # equal thirds in width, by head in order
        (lambda: _timm("beit"), "'blocks.2.attn.qkv' puts out nothing that could be read"),
        (lambda: image_net("swin"), r"puts out \(16, 16, 72\) for 4 examples.*each window"),
    ],
    ids=["cnn", "deberta", "gpt_neox", "tiny_vit", "beit", "swin"],
)
def test_attention_that_cannot_be_read_is_refused(make: Any, message: str) -> None:
    net = make()
    batch = (
        words() if net.modality == "text" else {"pixel_values": tiny.images(SIDE if net.name in _SIDE_64 else 32, 4)}
    )
    layers = 1 if "swin" in net.name else "last"
    with pytest.raises(TransferError, match=message):
        connect([MiniLMRelation(layers, relation_heads=1)], net, net, batch, batch)


_SIDE_64 = {name for name, _ in IMAGE_NETS.values()}


def _timm(family: str) -> Backbone:
    return Backbone(tiny.timm_model(family), None, "image", "image-classification", family, None, None)  # type: ignore[arg-type]


def test_tinyberts_heads_are_the_networks_own() -> None:
    with pytest.raises(TransferError, match=r"student's 'bert.*query' belongs to 2 heads.*MiniLMRelation"):
        connect([TinyBERT(heads=4)], bert(num_attention_heads=2), bert(), words(), words())
    llama = text_net("llama", "LlamaForSequenceClassification")
    with pytest.raises(TransferError, match=r"the teacher's 'model\.layers.*' has wider queries than keys"):
        connect([TinyBERT(heads=4)], bert(), llama, words(), words())


def test_features_have_no_queries() -> None:
    with pytest.raises(TransferError, match="'features' has no query"):
        connect([MiniLMRelation("features")], bert(), bert(), words(), words())


# the plan, and what connecting leaves behind


def test_the_plan_says_layers_shapes_and_projectors_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    terms = [SoftTargets(), Hint({0.5: 0.5, 1.0: 1.0}), RKD("last")]
    with caplog.at_level(logging.INFO, logger="hf_transfer"):
        plan = connect(terms, image_net("cnn"), image_net("vit"), images(), images())
    assert plan == caplog.messages[-1]
    assert plan.splitlines() == [
        "Layers compared, student ~ teacher, shapes of one example:",
        "hint, layers={0.5: 0.5, 1.0: 1.0}, 9,344 parameters of its own (linear 48 -> 64, 96 -> 64)",
        "  layer2 (48, 8, 8) ~ blocks.2 (17, 64)",
        "  layer4 (96, 2, 2) ~ blocks.5 (17, 64)",
        "rkd, layers='last'",
        "  layer4 (96, 2, 2) ~ blocks.5 (17, 64)",
    ]


def test_without_terms_on_layers_nothing_runs() -> None:
    class Broken(nn.Module):
        def forward(self, pixel_values: Tensor) -> Tensor:
            raise AssertionError("ran")

    broken = Backbone(Broken(), None, "image", "image-classification", "broken", None, None)  # type: ignore[arg-type]
    assert connect([SoftTargets()], broken, broken, {}, {}) == ""


def test_connecting_changes_neither_network_and_leaves_no_hook() -> None:
    student, teacher = image_net("convnext", seed=2), image_net("cnn", seed=2)
    student.model.train()
    student.model.get_submodule("stages.0").eval()  # as freezing leaves it
    modes = [module.training for module in student.model.modules()]
    before = {name: value.clone() for name, value in teacher.model.train().state_dict().items()}
    connect([Hint(), ReviewKD()], student, teacher, images(), images())
    assert [module.training for module in student.model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in teacher.model.state_dict().items())
    assert teacher.model.training
    assert not any(module._forward_hooks for net in (student, teacher) for module in net.model.modules())
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


def test_trying_a_term_leaves_it_as_it_was_made() -> None:
    torch.manual_seed(3)
    term = CRD(size=10, negatives=6)
    memory = term.memory.clone()
    connect([term], image_net("cnn"), image_net("vit"), images(), images())
    assert torch.equal(term.memory, memory)
    assert term.log_z.isnan().all()


def test_a_term_that_fails_on_these_layers_fails_before_step_1() -> None:
    class Broken(FeatureTerm):
        def forward(self, step: Step) -> Tensor:
            student, teacher = self.outputs(step, self.pairs[0])
            return (student - teacher).sum()

    with pytest.raises(
        TransferError, match=r"'broken' with layers='last' cannot compare \['layer4.*The size of tensor"
    ):
        connect([Broken("last")], image_net("cnn"), image_net("vit"), images(), images())
    other = {name: value[:, :6] for name, value in words().items()}  # another tokenizer
    with pytest.raises(TransferError, match="hold the tokens of a sequence, which have no grid"):
        connect([Hint()], bert(), bert(), words(), other)
    connect([CKA()], bert(), bert(), words(), other)  # it compares rows


def test_features_are_read_wherever_they_are_named() -> None:
    term = Hint({"last": "features"})
    assert not term.uses_features
    learn(term, image_net("cnn"), image_net("vit"), images())
    assert term.uses_features
    assert term.pairs[0].teacher_shape == (64,)


def test_a_few_rows_are_enough_and_other_columns_are_not_given_to_the_network() -> None:
    batch = {**images(9), "labels": torch.zeros(9), "example_id": torch.arange(9), "domain": torch.zeros(9)}
    student = Survey("student", image_net("cnn"))
    student.run(batch, [])
    assert student.value("layer4").shape[0] == len(student.logits) == 4
    assert student.inputs.keys() == model_inputs(batch).keys() == {"pixel_values"}


def test_a_teacher_in_half_precision() -> None:
    import copy

    import timm

    model = timm.create_model("test_vit", img_size=SIDE, num_classes=3).eval()
    half = Backbone(copy.deepcopy(model).bfloat16(), None, "image", "image-classification", "half", None, None)
    term = Hint()
    connect([term], image_net("cnn"), half, images(), images())
    assert term.pairs[0].teacher_shape == (17, 64)


def test_layers_of_an_adapted_student_are_named_as_in_the_plain_one() -> None:
    from peft import LoraConfig, get_peft_model

    plain = bert().model
    model = get_peft_model(
        plain, LoraConfig(r=2, target_modules=r".*\.(query|key|value)", modules_to_save=["classifier"])
    )
    student = Backbone(model, None, "text", "text-classification", "lora", None, None)
    term = MiniLMRelation(relation_heads=4)
    assert learn(term, student, bert(num_hidden_layers=4), words()) > 0
    assert term.pairs[0].student == "bert.encoder.layer.2.attention.self.query"
    assert any("layer.2.attention.self.query.lora_B" in name for name in trained(model))
