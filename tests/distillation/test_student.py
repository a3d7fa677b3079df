"""Students made from their teacher: carved ones are the chosen blocks exactly, whatever the architecture."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny_models as tiny
import torch
import transformers
from torch import nn

from hf_transfer import TransferError, load_backbone
from hf_transfer.anatomy import Anatomy
from hf_transfer.backbones import Backbone
from hf_transfer.distillation.student import bilstm_student, born_again, carve, principal

# model type -> class, auto class
TRANSFORMERS = {
    "bert": ("BertForSequenceClassification", "SequenceClassification"),
    "roberta": ("RobertaForTokenClassification", "TokenClassification"),
    "distilbert": ("DistilBertForSequenceClassification", "SequenceClassification"),
    "deberta-v2": ("DebertaV2ForSequenceClassification", "SequenceClassification"),
    "modernbert": ("ModernBertForSequenceClassification", "SequenceClassification"),
    "gpt2": ("GPT2LMHeadModel", "CausalLM"),
    "llama": ("LlamaForCausalLM", "CausalLM"),
    "gemma3_text": ("Gemma3ForCausalLM", "CausalLM"),
    "vit": ("ViTForImageClassification", "ImageClassification"),
    "dinov2": ("Dinov2ForImageClassification", "ImageClassification"),
    "wav2vec2": ("Wav2Vec2ForSequenceClassification", "AudioClassification"),
    "whisper": ("WhisperForAudioClassification", "AudioClassification"),
}


def kept_alone(model: nn.Module, path: str, kept: list[int]) -> Any:
    """The oracle: a copy of the whole model whose list of blocks has been emptied of the others by hand."""
    model = copy.deepcopy(model)
    parent, _, name = path.rpartition(".")
    blocks = getattr(model.get_submodule(parent), name)
    setattr(model.get_submodule(parent), name, type(blocks)(*_as_arguments(blocks, kept)))
    return model


def _as_arguments(blocks: Any, kept: list[int]) -> list[Any]:
    items = [blocks[i] for i in kept]
    return items if isinstance(blocks, nn.Sequential) else [items]


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    causal = {"use_cache": False} if "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__ else {}
    return model.eval()(**inputs, **causal).logits


def spread_out(model: Any) -> Any:
    """Blocks that differ enough to show in the logits."""
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.filterwarnings("ignore:.*:FutureWarning:transformers")
def test_a_carved_transformer_is_the_chosen_blocks_and_reloads(kind: str, tmp_path: Path):
    class_name, auto = TRANSFORMERS[kind]
    teacher = spread_out(tiny.tiny_model(kind, class_name))
    path = Anatomy.of(teacher).blocks[0].name.rpartition(".")[0]
    inputs, before = tiny.inputs_for(teacher), copy.deepcopy(teacher.state_dict())
    student = carve(teacher, [0, 2]).model
    blocks, own = teacher.get_submodule(path), student.get_submodule(path)
    assert (len(blocks), len(own)) == (3, 2)
    for new, old in enumerate([0, 2]):
        mine, theirs = own[new].state_dict(), blocks[old].state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    expected = logits(kept_alone(teacher, path, [0, 2]), inputs)
    torch.testing.assert_close(logits(student, inputs), expected, rtol=0, atol=0)
    assert not torch.allclose(expected, logits(teacher, inputs), atol=1e-3)  # the oracle can tell
    student.save_pretrained(tmp_path)
    again = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, inputs), expected, rtol=0, atol=0)
    after = teacher.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("name", "options", "layers", "kept", "arguments"),
    [
        ("test_vit", {"depth": 6}, 3, {"blocks": [0, 2, 5]}, {"depth": 3}),
        (
            "test_resnet",
            {"layers": [2, 1, 3, 1]},
            5,
            {"layer1": [0], "layer2": [0], "layer3": [0, 2], "layer4": [0]},
            {"layers": [1, 1, 2, 1]},
        ),
        (
            "test_convnext",
            {},
            [0, 1, 4, 6, 8],
            {"stages.1.blocks": [0], "stages.2.blocks": [1, 3], "stages.3.blocks": [1]},
            None,
        ),
    ],
)
def test_a_carved_timm_network_reloads_in_both_libraries(name, options, layers, kept, arguments, tmp_path: Path):
    torch.manual_seed(0)
    teacher = load_backbone(name, labels=["a", "b"], pretrained=False, image_size=32, drop_path_rate=0.1, **options)
    with torch.no_grad():
        for key, value in teacher.model.state_dict().items():
            if "running" in key or key.endswith((".gamma", "bias")):  # statistics and scales that show
                value.add_(torch.rand(value.shape))
    student = carve(teacher, layers)
    oracle = teacher.model
    for path, blocks in kept.items():
        oracle = kept_alone(oracle, f"timm_model.{path}", blocks)
    inputs = {"pixel_values": tiny.images()}
    expected = logits(oracle, inputs)
    torch.testing.assert_close(logits(student.model, inputs), expected, rtol=0, atol=0)
    assert not torch.allclose(expected, logits(teacher.model, inputs), atol=1e-3)
    if arguments is not None:
        assert student.model.config.model_args.items() >= arguments.items()
    student.save(tmp_path)
    direct = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(direct(tiny.images()).detach(), expected, rtol=0, atol=0)
    again = load_backbone(tmp_path)
    torch.testing.assert_close(logits(again.model, inputs), expected, rtol=0, atol=0)
    stock = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(stock, inputs), expected, rtol=0, atol=0)
    assert (again.labels, again.data_config) == (teacher.labels, teacher.data_config)


def test_an_encoder_and_its_decoder_are_carved_together():
    teacher = spread_out(tiny.tiny_model("bart", "BartForSequenceClassification"))
    student = carve(teacher, [0, 2, 3, 4]).model
    assert (student.config.encoder_layers, student.config.decoder_layers) == (2, 2)
    oracle = kept_alone(kept_alone(teacher, "model.encoder.layers", [0, 2]), "model.decoder.layers", [0, 1])
    inputs = tiny.inputs_for(teacher)
    torch.testing.assert_close(logits(student, inputs), logits(oracle, inputs), rtol=0, atol=0)


def test_lists_that_run_in_step_are_carved_in_step():
    teacher = spread_out(tiny.tiny_model("xlm", "XLMForSequenceClassification"))
    student = carve(teacher, 2).model
    for name in ("attentions", "ffns", "layer_norm1", "layer_norm2"):
        mine, theirs = (getattr(model.transformer, name) for model in (student, teacher))
        assert len(mine) == 2
        assert torch.equal(next(mine[1].parameters()), next(theirs[2].parameters()))


def bert(layers: int = 3, **options: Any) -> Any:
    return tiny.tiny_model("bert", "BertForSequenceClassification", num_hidden_layers=layers, **options)


def test_half_of_twelve_layers_are_distilberts():
    teacher = bert(12)
    student = carve(teacher, 6).model
    for new, old in enumerate([0, 2, 4, 7, 9, 11]):
        mine, theirs = (model.bert.encoder.layer for model in (student, teacher))
        assert torch.equal(mine[new].output.dense.weight, theirs[old].output.dense.weight)
    assert student.config.num_hidden_layers == 6
    assert carve(teacher, 1).model.config.num_hidden_layers == 1
    last = carve(teacher, [-1]).model.bert.encoder.layer[0]
    assert torch.equal(last.output.dense.weight, teacher.bert.encoder.layer[11].output.dense.weight)


def test_shifted_windows_stay_in_turn():
    teacher = tiny.tiny_model("swin", "SwinForImageClassification", depths=(2, 6), image_size=64, window_size=4)
    student = carve(teacher, 5).model
    assert student.config.depths == [1, 4]
    shifts = [block.shift_size for block in student.swin.encoder.layers[1].blocks]
    assert shifts == [block.shift_size for block in teacher.swin.encoder.layers[1].blocks][:4]
    with pytest.raises(TransferError, match=r"layers\.1\.blocks\.2 at place 1 would be another kind.*shift_size is"):
        carve(teacher, [0, 2, 4])


def test_per_layer_settings_follow_their_layers():
    layer_types = ["full_attention", "sliding_attention", "full_attention"]
    teacher = tiny.tiny_model("modernbert", "ModernBertForSequenceClassification", layer_types=layer_types)
    assert carve(teacher, [0, 1]).model.config.layer_types == ["full_attention", "sliding_attention"]
    assert carve(teacher, [0, 2]).model.config.layer_types == ["full_attention", "full_attention"]


def test_the_student_shares_nothing_but_the_processor(tmp_path: Path):
    teacher = load_backbone("test_vit", labels=["a", "b"], pretrained=False, image_size=32)
    teacher.model.requires_grad_(False).train()
    teacher.model.fresh_parameters = ("timm_model.blocks.0.norm1.weight", "timm_model.blocks.5.norm1.weight")
    student = carve(teacher, [1, 5])
    theirs = {value.untyped_storage().data_ptr() for value in teacher.model.state_dict().values()}
    mine = {value.untyped_storage().data_ptr() for value in student.model.state_dict().values()}
    assert not theirs & mine
    assert all(parameter.requires_grad for parameter in student.model.parameters())
    assert (student.model.training, teacher.model.training) == (False, True)
    assert student.processor is teacher.processor
    assert (student.labels, student.task, student.anatomy.depth) == (["a", "b"], teacher.task, 2)
    assert student.labels is not teacher.labels
    assert student.model.fresh_parameters == ("timm_model.blocks.1.norm1.weight",)
    assert student.model.name_or_path == ""  # nothing there gives these weights
    assert teacher.model.config.model_args == {"img_size": [32, 32]} and teacher.anatomy.depth == 6


def test_dtype_and_attention_are_the_teachers():
    teacher = bert().to(torch.bfloat16)
    teacher.set_attn_implementation("eager")
    student = carve(teacher, 2).model
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert student.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (0, r"layers=0: BertForSequenceClassification has 3 blocks\. Valid are 1 to 3"),
        (4, r"Valid are 1 to 3"),
        (True, r"layers=True"),
        ([2, 0], r"ascending order, each once, from 0 to 2 \(or -3 to -1"),
        ([0, 0], r"each once"),
        ([0, -3], r"each once"),
        ([3], r"from 0 to 2"),
        ([], r"layers=\[\]"),
    ],
)
def test_a_choice_out_of_range_is_refused(layers: Any, said: str):
    with pytest.raises(TransferError, match=said):
        carve(bert(), layers)


def timm_network(name: str, **options: Any) -> Backbone:
    return load_backbone(name, labels=["a", "b"], pretrained=False, **options)


@pytest.mark.parametrize(
    ("make", "layers", "said"),
    [
        (lambda: tiny.tiny_model("albert", "AlbertForSequenceClassification"), 1, r"\(albert\).*no block to spare"),
        (lambda: timm_network("test_resnet"), 4, r"no block to spare: one in each of 4 stages"),
        (lambda: timm_network("mobilenetv2_035"), 8, r"\(mobilenetv2_035\).*none of timm's arguments depth, depths"),
        (lambda: timm_network("regnetx_002"), 8, r"its block timm_model\.s1 is not an item of a list"),
        (lambda: load_backbone("torchvision/alexnet", labels=2, pretrained=False), 2, r"\(alexnet\) cannot be carved"),
        (
            lambda: tiny.tiny_model("mobilenet_v2", "MobileNetV2ForImageClassification"),
            8,
            r"no setting of its configuration says that mobilenet_v2\.layer has 16 blocks",
        ),
        (lambda: timm_network("test_resnet", layers=[2, 1, 2, 1]), [0, 1, 3, 4, 5], r"none of the blocks 2 to 2"),
        (
            lambda: timm_network("test_resnet", layers=[2, 1, 2, 1]),
            [0, 2, 4, 5],
            r"blocks of it; with layers, .*layer3\.0\.",
        ),
        (
            lambda: tiny.tiny_model("gpt2", "GPT2LMHeadModel", scale_attn_by_inverse_layer_idx=True),
            [0, 2],
            r"transformer\.h\.2 at place 1 would be another kind of block, as attn\.scaling is",
        ),
        (lambda: tiny.tiny_model("t5", "T5ForSequenceClassification"), [1, 3], r"relative_attention_bias"),
        (lambda: nn.Linear(2, 2), 1, r"Linear"),
    ],
)
def test_what_cannot_be_carved_is_refused_by_name(make: Any, layers: Any, said: str):
    with pytest.raises(TransferError, match=said):
        carve(make(), layers)


# peft 0.21 asks by the name that transformers deprecates. Delete once the lower bound of peft asks by the new one.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_merged_first():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(bert(), LoraConfig(target_modules=["query"]))
    for make in (lambda: carve(adapted, 2), lambda: born_again(adapted)):
        with pytest.raises(TransferError, match=r"takes no adapters.*hf_transfer\.tuning\.merge\("):
            make()


# ---- born again -----------------------------------------------------------------------------------------------------


def test_born_again_is_the_same_network_with_other_weights(tmp_path: Path):
    torch.manual_seed(0)
    teacher = load_backbone("test_vit", labels=["a", "b"], pretrained=False, image_size=32, depth=2)
    student = born_again(teacher)
    mine, theirs = student.model.state_dict(), teacher.model.state_dict()
    assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in theirs.items()}
    weight = "timm_model.blocks.0.mlp.fc1.weight"
    assert not torch.allclose(mine[weight], theirs[weight], atol=1e-2)
    assert mine[weight].std().item() == pytest.approx(theirs[weight].std().item(), rel=0.1)  # timm's own beginning
    student.save(tmp_path)
    again = load_backbone(tmp_path)
    inputs = {"pixel_values": tiny.images()}
    torch.testing.assert_close(logits(again.model, inputs), logits(student.model, inputs), rtol=0, atol=0)
    assert (again.labels, again.data_config) == (teacher.labels, teacher.data_config)


def test_born_again_draws_from_the_global_generator():
    teacher = bert()
    twins = []
    for seed in (1, 1, 2):
        transformers.set_seed(seed)
        twins.append(born_again(teacher).model)
    assert torch.equal(twins[0].classifier.weight, twins[1].classifier.weight)
    assert not torch.equal(twins[0].classifier.weight, twins[2].classifier.weight)
    assert twins[0].config.to_dict() == {**teacher.config.to_dict(), "dtype": twins[0].config.to_dict()["dtype"]}


# ---- BiLSTM ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def reader(tmp_path: Path) -> Backbone:
    """A text classifier with its tokenizer."""
    from tiny_runs import text_backbone

    return load_backbone(text_backbone(tmp_path / "teacher"), labels=["bad", "good"], task="text-classification")


def test_the_bilstm_has_the_teachers_words_and_labels(reader: Backbone, tmp_path: Path):
    student = bilstm_student(reader, hidden_size=8, embedding_size=6, layers=2, dropout=0.1)
    assert (student.labels, student.task, student.processor) == (reader.labels, reader.task, reader.processor)
    assert student.model.config.pad_token_id == 0
    words = student.model.get_input_embeddings().weight
    expected = principal(reader.model.get_input_embeddings().weight.detach(), 6)
    torch.testing.assert_close(words.detach(), 0.1 * expected)
    student.save(tmp_path / "student")
    again = load_backbone(tmp_path / "student")
    inputs = dict(again.processor(["the dull plot", "great"], padding=True, return_tensors="pt"))
    torch.testing.assert_close(logits(again.model, inputs), logits(student.model, inputs), rtol=0, atol=0)
    assert again.labels == ["bad", "good"]
    random = bilstm_student(reader, hidden_size=8, embedding_size=60, teacher_embeddings=False)
    assert random.model.get_input_embeddings().weight.std().item() == pytest.approx(0.1, rel=0.1)


def test_principal_components_keep_what_distances_there_are():
    torch.manual_seed(0)
    low = torch.randn(50, 3, dtype=torch.float64) * torch.tensor([3.0, 2.0, 1.0])
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q[:3]
    words = low @ turn + torch.randn(8, dtype=torch.float64)  # in a plane of three dimensions, not through the origin
    found = principal(words, 3).double()
    ratio = torch.pdist(found) / torch.pdist(words)
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), rtol=1e-5, atol=0)
    assert found.square().mean().item() == pytest.approx(1, rel=1e-5)
    assert found.var(dim=0).diff().lt(0).all()  # widest first
    first = principal(words, 1).double()[:, 0]
    assert torch.corrcoef(torch.stack([first, found[:, 0]]))[0, 1].item() == pytest.approx(1, abs=1e-6)


def test_what_is_no_reader_of_texts_has_no_bilstm(reader: Backbone):
    with pytest.raises(TransferError, match=r"image-classification of image"):
        bilstm_student(timm_network("test_vit"))
    for options, said in [
        ({"hidden_size": 7}, r"hidden_size=7 must be even"),
        ({"layers": 0}, r"layers=0 must be"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"embedding_size": 17}, r"embedding_size=17 is more than the 16 .*teacher_embeddings=False"),
    ]:
        with pytest.raises(TransferError, match=said):
            bilstm_student(reader, **options)
    reader.processor = None
    with pytest.raises(TransferError, match=r"no tokenizer"):
        bilstm_student(reader)


# ---- real weights ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_minilm_is_carved_to_three_layers(shared, tmp_path: Path):
    teacher = load_backbone(shared("weights/all-MiniLM-L6-v2"), labels=["negative", "positive"])
    student = carve(teacher, 3)
    assert student.model.fresh_parameters == teacher.model.fresh_parameters
    inputs = dict(teacher.processor(["a dull film", "great"], padding=True, return_tensors="pt"))
    expected = logits(kept_alone(teacher.model, "bert.encoder.layer", [0, 2, 5]), inputs)
    student.save(tmp_path)
    torch.testing.assert_close(logits(load_backbone(tmp_path).model, inputs), expected)


@pytest.mark.slow
def test_a_fine_tuned_mobilenet_is_refused_as_a_source_of_blocks(shared):
    teacher = load_backbone(shared("weights/mobilenetv2_100.coral_tf2_in1k"))
    with pytest.raises(TransferError, match=r"mobilenetv2_100"):
        carve(teacher, 9)
