"""load_backbone(): every source and task, new heads, sizes and channels, and one clear error for all that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import backbone_zoo as zoo
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from hf_transfer import TransferError
from hf_transfer.backbones import TASKS, load_backbone
from hf_transfer.loading.heads import start_anew

# ---- timm -----------------------------------------------------------------------------------------------------------


def test_a_bare_timm_name_starts_at_random_as_timm_starts_it():
    torch.manual_seed(0)
    backbone = load_backbone("resnet10t", labels=["cat", "dog"], pretrained=False)
    assert (backbone.modality, backbone.task, backbone.labels) == ("image", "image-classification", ["cat", "dog"])
    assert backbone.data_config["input_size"] == (3, 176, 176)
    assert not backbone.model.training
    # transformers would draw every convolution from N(0, 0.02); timm's He initialisation has 0.059 here
    deviation = backbone.model.timm_model.layer1[0].conv1.weight.std().item()
    assert deviation == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.1)


def test_timm_options_reach_the_network():
    backbone = load_backbone("vit_tiny_patch16_224", labels=2, pretrained=False, depth=3, image_size=32)
    assert len(backbone.model.timm_model.blocks) == 3
    with pytest.raises(TransferError, match=r"layers_deep"):
        load_backbone("resnet10t", labels=2, pretrained=False, layers_deep=3)
    with pytest.raises(TransferError, match=r"image_size="):
        load_backbone("vit_tiny_patch16_224", labels=2, pretrained=False, img_size=32)


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_saved_by_timm_loads_with_its_labels(tmp_path: Path, safe: bool):
    folder = zoo.timm_folder(tmp_path / "timm", safe=safe)
    backbone = load_backbone(folder)
    direct = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert backbone.labels == ["cat", "dog", "eel"]
    torch.testing.assert_close(zoo.logits(backbone.model, zoo.images()), zoo.logits(direct, zoo.images()))


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_folder_saved_by_transformers_wrapper_loads(tmp_path: Path, prefixed: bool):
    from transformers import AutoModelForImageClassification, TimmWrapperConfig

    source = zoo.timm_folder(tmp_path / "timm")
    if prefixed:  # made from a configuration: `timm_model.` before each key, and `model_args: null`
        config = TimmWrapperConfig(architecture="resnet10t", num_labels=3)
        wrapper = zoo.randomized(AutoModelForImageClassification.from_config(config))
    else:
        settings = json.loads((source / "config.json").read_text())
        del settings["model_args"]["num_classes"]  # which transformers passes by itself
        (source / "config.json").write_text(json.dumps(settings))
        wrapper = AutoModelForImageClassification.from_pretrained(source)
    wrapper.save_pretrained(tmp_path / "wrapper")
    backbone = load_backbone(tmp_path / "wrapper")
    assert backbone.data_config["input_size"] == (3, 176, 176)
    torch.testing.assert_close(zoo.logits(backbone.model, zoo.images()), zoo.logits(wrapper, zoo.images()))


def test_a_second_fine_tune_has_its_own_labels(tmp_path: Path):
    load_backbone(zoo.timm_folder(tmp_path / "a")).save(tmp_path / "b")
    load_backbone(tmp_path / "b", labels=["x", "y"]).save(tmp_path / "c")
    again = load_backbone(tmp_path / "c")
    assert again.labels == ["x", "y"]
    assert json.loads((tmp_path / "c/config.json").read_text())["label_names"] == ["x", "y"]
    again.model.save_pretrained(tmp_path / "stock")  # as transformers' own Trainer would
    assert load_backbone(tmp_path / "stock").labels == ["x", "y"]
    renamed = load_backbone(tmp_path / "c", labels=["p", "q"])  # as many: the head stays
    assert renamed.renamed_from == ["x", "y"] and again.renamed_from is None
    renamed.model.save_pretrained(tmp_path / "stock")
    assert load_backbone(tmp_path / "stock").labels == ["p", "q"]
    torch.testing.assert_close(zoo.logits(renamed.model, zoo.images()), zoo.logits(again.model, zoo.images()))


def test_a_new_image_size_and_channel_count_adapt_timm_weights_as_timm_does(tmp_path: Path):
    folder = zoo.timm_folder(tmp_path / "vit", "vit_tiny_patch16_224", img_size=64, depth=2)
    backbone = load_backbone(folder, image_size=96, in_chans=1)
    direct = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=96, in_chans=1)
    assert backbone.data_config["input_size"] == (1, 96, 96)
    assert len(backbone.data_config["mean"]) == 1
    x = zoo.images(1, 96)
    torch.testing.assert_close(zoo.logits(backbone.model, x), zoo.logits(direct, x))
    backbone.save(tmp_path / "saved")
    again = load_backbone(tmp_path / "saved")
    assert again.data_config == backbone.data_config
    torch.testing.assert_close(zoo.logits(again.model, x), zoo.logits(direct, x))


def test_a_size_that_timm_cannot_resample_to_is_refused(tmp_path: Path):
    folder = zoo.timm_folder(tmp_path / "cait", "cait_xxs24_224", img_size=32, depth=1)
    with pytest.raises(TransferError, match=r"cannot build 'cait_xxs24_224' with .*img_size=\[64, 64\].*pos_embed"):
        load_backbone(folder, image_size=64)


def test_a_network_that_fails_on_the_images_asked_for_is_refused(tmp_path: Path):
    with pytest.raises(
        TransferError, match=r"'torchvision/inception_v3' cannot take images of 3 x 32 x 32: .*[Kk]ernel"
    ):
        load_backbone("torchvision/inception_v3", labels=2, pretrained=False, image_size=32)
    with pytest.raises(TransferError, match=r"cannot take images of 1 x 64 x 64"):  # built all the same
        load_backbone("csatv2", labels=2, pretrained=False, in_chans=1, image_size=64)


def test_one_channel_sums_the_pretrained_three(tmp_path: Path):
    folder = zoo.timm_folder(tmp_path / "cnn", "mobilenetv2_035")
    three, one = load_backbone(folder), load_backbone(folder, in_chans=1, image_size=96)
    before, after = (b.model.timm_model.conv_stem.weight for b in (three, one))
    torch.testing.assert_close(after, before.sum(1, keepdim=True))
    assert one.data_config["input_size"] == (1, 96, 96)
    assert one.model.timm_model.conv_stem.weight.shape[1] == 1


def test_timm_data_config_is_what_the_processor_does(tmp_path: Path):
    import numpy as np
    from PIL import Image

    folder = zoo.timm_folder(tmp_path / "cnn", "mobilenetv2_035")
    backbone = load_backbone(folder, image_size=48)
    image = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
    pixels = backbone.processor(image)["pixel_values"]
    expected = timm.data.create_transform(**backbone.data_config, is_training=False)(image)
    assert pixels.shape == (1, 3, 48, 48)
    torch.testing.assert_close(pixels[0], expected)


def test_a_body_without_classifier_needs_labels(shared):
    folder = shared("weights/mobilenetv1_100.coral_quant_features")
    with pytest.raises(TransferError, match=r"no classifier.*labels="):
        load_backbone(folder)
    backbone = load_backbone(folder, labels=["a", "b"])
    assert zoo.logits(backbone.model, zoo.images(side=64)).shape == (2, 2)


def test_real_timm_weights_load_as_timm_loads_them(shared):
    folder = shared("weights/mobilenetv2_100.coral_tf2_in1k")
    backbone = load_backbone(folder)
    direct = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert backbone.labels[0] == "tench, Tinca tinca"
    assert backbone.data_config["mean"] == (0.5, 0.5, 0.5)
    x = zoo.images(side=96)
    torch.testing.assert_close(zoo.logits(backbone.model, x), zoo.logits(direct, x))


# ---- a trained head and the names of its classes --------------------------------------------------------------------


def conv_headed_folder(folder: Path) -> Path:
    """A network whose classifier is a convolution."""
    return zoo.timm_folder(folder, "dla46_c")


def distilled_folder(folder: Path) -> Path:
    """A network with two classifiers, whose mean is the answer."""
    return zoo.timm_folder(folder, "deit_tiny_distilled_patch16_224", img_size=32, depth=1)


HEADS = {
    "linear": (zoo.bert_folder, ["fair", "good", "bad"], zoo.tokens),
    "convolution": (conv_headed_folder, ["eel", "cat", "dog"], zoo.images),
    "two": (distilled_folder, ["eel", "cat", "dog"], zoo.images),
}


@pytest.mark.parametrize("kind", HEADS)
def test_the_rows_of_a_head_follow_their_names(tmp_path: Path, kind: str):
    make, turned, inputs = HEADS[kind]
    backbone = load_backbone(make(tmp_path / "model"))
    again = load_backbone(tmp_path / "model", labels=turned)
    logits = zoo.logits(backbone.model, inputs())
    assert again.labels == turned == [backbone.labels[i] for i in (2, 0, 1)]
    torch.testing.assert_close(zoo.logits(again.model, inputs()), logits[:, [2, 0, 1]])
    again.save(tmp_path / "saved")
    torch.testing.assert_close(zoo.logits(load_backbone(tmp_path / "saved").model, inputs()), logits[:, [2, 0, 1]])


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_can_start_anew(tmp_path: Path, kind: str):
    make, _, inputs = HEADS[kind]
    backbone = load_backbone(make(tmp_path / "model"))
    heads = {name for name in backbone.model.state_dict() if name.startswith(backbone.anatomy.classifiers)}
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    torch.manual_seed(0)
    start_anew(backbone.model)
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in heads), name
        assert value.isfinite().all() and value.abs().max() < 5 and value.shape == before[name].shape
    assert heads <= set(backbone.model.fresh_parameters)
    assert all(parameter.requires_grad for parameter in backbone.model.parameters())
    backbone.save(tmp_path / "saved")
    assert set(zoo.logits(load_backbone(tmp_path / "saved").model, inputs()).shape) == {2, 3}


def test_names_of_a_head_that_had_none_are_its_first(tmp_path: Path):
    folder = zoo.bert_folder(tmp_path / "bert", labels=("LABEL_0", "LABEL_1", "LABEL_2"))
    backbone = load_backbone(folder, labels=["p", "q", "r"])
    assert backbone.renamed_from is None
    torch.testing.assert_close(
        zoo.logits(backbone.model, zoo.tokens()), zoo.logits(load_backbone(folder).model, zoo.tokens())
    )


@pytest.mark.parametrize("arguments", [{"labels": ["p", "q"]}, {"labels": 3}, {"task": "token-classification"}])
def test_a_head_that_is_not_the_checkpoints_is_not_a_renamed_one(tmp_path: Path, arguments: dict):
    zoo.bert_folder(tmp_path / "bert")
    weights = load_file(tmp_path / "bert/model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("classifier")}
    if "task" in arguments:  # a body that kept the names of its classes
        save_file(kept, tmp_path / "bert/model.safetensors", metadata={"format": "pt"})
        arguments = {**arguments, "labels": ["p", "q", "r"]}
    assert load_backbone(tmp_path / "bert", **arguments).renamed_from is None


# ---- transformers ---------------------------------------------------------------------------------------------------


def test_a_text_classifier_keeps_its_labels_and_logits(tmp_path: Path):
    from transformers import AutoModelForSequenceClassification

    folder = zoo.bert_folder(tmp_path / "bert")
    backbone = load_backbone(folder)
    assert (backbone.modality, backbone.task) == ("text", "text-classification")
    assert backbone.labels == ["good", "bad", "fair"]
    assert backbone.processor("good film")["input_ids"] == [4, 6]
    stock = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.testing.assert_close(zoo.logits(backbone.model, zoo.tokens()), zoo.logits(stock, zoo.tokens()))


@pytest.mark.parametrize(
    ("task", "labels", "shape"),
    [
        ("text-classification", ["x", "y"], (2, 2)),
        ("token-classification", ["O", "B", "I"], (2, 4, 3)),
        ("regression", 1, (2, 1)),
        ("regression", ["width", "height"], (2, 2)),
    ],
)
def test_text_tasks(tmp_path: Path, task: str, labels: object, shape: tuple[int, ...]):
    backbone = load_backbone(zoo.bert_folder(tmp_path / "bert"), task=task, labels=labels)
    assert zoo.logits(backbone.model, zoo.tokens()).shape == shape
    assert backbone.outputs == shape[-1]
    assert backbone.labels == (labels if isinstance(labels, list) else None)
    backbone.save(tmp_path / "saved")
    again = load_backbone(tmp_path / "saved")
    assert (again.task, again.labels, again.outputs) == (task, backbone.labels, backbone.outputs)


def test_regression_is_squared_error_for_text_and_images(tmp_path: Path):
    targets = torch.tensor([[0.5, -1.0], [2.0, 0.0]])
    for folder, inputs in (
        (zoo.bert_folder(tmp_path / "bert"), zoo.tokens()),
        (zoo.vit_folder(tmp_path / "vit"), zoo.images()),
        (zoo.timm_folder(tmp_path / "timm"), zoo.images()),
    ):
        backbone = load_backbone(folder, task="regression", labels=2)
        output = backbone.model(inputs, labels=targets)
        torch.testing.assert_close(output.loss, ((output.logits - targets) ** 2).mean())
        assert backbone.model.config.problem_type == "regression"
        backbone.save(tmp_path / "saved", overwrite=True)
        assert load_backbone(tmp_path / "saved").task == "regression"


def test_one_output_means_regression(tmp_path: Path):
    assert load_backbone(zoo.bert_folder(tmp_path / "bert"), labels=1).task == "regression"


def test_causal_lm_and_a_padding_token_for_a_decoder(tmp_path: Path):
    folder = zoo.gpt2_folder(tmp_path / "gpt2")
    language = load_backbone(folder)
    assert (language.task, language.labels, language.outputs) == ("causal-lm", None, 8)
    assert zoo.logits(language.model, zoo.tokens()).shape == (2, 4, 8)
    classifier = load_backbone(folder, labels=["x", "y"])
    assert classifier.task == "text-classification"
    for backbone in (language, classifier):
        assert backbone.processor.pad_token == "[SEP]"
        assert backbone.model.config.pad_token_id == backbone.processor.pad_token_id == 3
    batch = classifier.processor(["good film", "bad"], padding=True, return_tensors="pt")
    alone = classifier.processor(["bad"], return_tensors="pt")
    with torch.no_grad():  # padding changes nothing: the last word is found by it
        torch.testing.assert_close(classifier.model(**batch).logits[1:], classifier.model(**alone).logits)
    classifier.save(tmp_path / "saved")
    assert load_backbone(tmp_path / "saved").model.config.pad_token_id == 3


def test_audio(tmp_path: Path):
    backbone = load_backbone(zoo.wav2vec2_folder(tmp_path / "audio"), labels=["zero", "one"])
    assert (backbone.modality, backbone.task) == ("audio", "audio-classification")
    assert backbone.processor.sampling_rate == 16000
    assert zoo.logits(backbone.model, torch.randn(2, 400)).shape == (2, 2)
    backbone.save(tmp_path / "saved")
    assert load_backbone(tmp_path / "saved").labels == ["zero", "one"]
    assert load_backbone(tmp_path / "audio", task="regression", labels=1).modality == "audio"


def test_a_vision_transformer_of_transformers_takes_other_images(tmp_path: Path):
    from timm.layers import resample_abs_pos_embed

    folder = zoo.vit_folder(tmp_path / "vit")
    own = load_backbone(folder)
    assert own.data_config == {
        "input_size": (3, 32, 32),
        "mean": (0.4, 0.4, 0.4),
        "std": (0.2, 0.2, 0.2),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    new = load_backbone(folder, image_size=48, in_chans=1, labels=["x", "y"])
    before, after = (b.model.vit.embeddings for b in (own, new))
    expected = resample_abs_pos_embed(before.position_embeddings, new_size=[6, 6], old_size=[4, 4])
    torch.testing.assert_close(after.position_embeddings, expected)
    weights = [e.patch_embeddings.projection.weight for e in (before, after)]
    torch.testing.assert_close(weights[1], weights[0].sum(1, keepdim=True))
    assert new.data_config["input_size"] == (1, 48, 48)
    assert new.data_config["mean"] == pytest.approx((0.4,))
    new.save(tmp_path / "saved")
    again = load_backbone(tmp_path / "saved")
    assert again.data_config == new.data_config
    torch.testing.assert_close(zoo.logits(again.model, zoo.images(1, 48)), zoo.logits(new.model, zoo.images(1, 48)))


def test_positions_that_cannot_be_resampled_are_refused(tmp_path: Path):
    from transformers import BeitConfig, BeitForImageClassification

    config = BeitConfig(image_size=32, patch_size=8, use_relative_position_bias=True, **zoo.SIZES)
    BeitForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(TransferError, match=r"relative_position_bias_table.*cannot be resampled.*Keep 32 px"):
        load_backbone(tmp_path, image_size=64)


def test_options_reach_transformers(tmp_path: Path):
    folder = zoo.bert_folder(tmp_path / "bert")
    backbone = load_backbone(folder, hidden_dropout_prob=0.25, dtype="bfloat16", attn_implementation="eager")
    assert backbone.model.config.hidden_dropout_prob == 0.25
    assert backbone.model.dtype == torch.bfloat16
    with pytest.raises(TransferError, match=r"hidden_dropuot: unknown option.*hidden_dropout_prob"):
        load_backbone(folder, hidden_dropuot=0.25)


def test_random_weights_of_a_transformers_folder_differ_from_the_saved(tmp_path: Path):
    folder = zoo.bert_folder(tmp_path / "bert")
    saved, fresh = load_backbone(folder), load_backbone(folder, pretrained=False)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(saved.model.state_dict()[name], fresh.model.state_dict()[name])
    assert fresh.labels == saved.labels


def test_a_byte_level_tokenizer_takes_words_for_token_classification(tmp_path: Path):
    from tokenizers import pre_tokenizers
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

    letters = {letter: i for i, letter in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        letters[letter] = len(letters)
    RobertaTokenizer(vocab=letters, merges=[]).save_pretrained(tmp_path)
    RobertaModel(RobertaConfig(vocab_size=len(letters), **zoo.SIZES)).save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path, task="token-classification", labels=["O", "B"])
    encoded = backbone.processor(["a", "bc"], is_split_into_words=True)
    assert encoded.word_ids() == [None, 0, 0, 1, 1, 1, None]  # each word begins with a space


def test_real_text_weights(shared):
    backbone = load_backbone(shared("weights/all-MiniLM-L6-v2"), labels=["negative", "positive"])
    assert backbone.task == "text-classification"
    batch = backbone.processor(["a good film"], return_tensors="pt")
    with torch.no_grad():
        assert backbone.model(**batch).logits.shape == (1, 2)


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "classification"}, "task='classification' is unknown.*" + ", ".join(TASKS)),
        ({"labels": []}, "names no class"),
        ({"labels": "cat"}, "must be a list of names"),
        ({"labels": [0, 1]}, "must be a list of names"),
        ({"labels": ["a", "b", "a"]}, "'a' more than once"),
        ({"labels": 0}, "positive"),
        ({"labels": ["a"], "task": "text-classification"}, "nothing to tell apart"),
        ({"labels": ["a"], "task": "causal-lm"}, "vocabulary is the output"),
        ({"image_size": 0}, "image_size=0"),
        ({"in_chans": 1.5}, "in_chans=1.5"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(arguments: dict, message: str):
    with pytest.raises(TransferError, match=message):
        load_backbone("nothing/is-loaded", **arguments)


def test_a_task_the_network_cannot_do(tmp_path: Path):
    with pytest.raises(
        TransferError, match=r"'bert' network and cannot do task='image-classification'.*token-classif"
    ):
        load_backbone(zoo.bert_folder(tmp_path / "bert"), task="image-classification")
    with pytest.raises(TransferError, match=r"image_size and in_chans do not apply"):
        load_backbone(tmp_path / "bert", image_size=64)


# ---- what is missing or broken --------------------------------------------------------------------------------------


def test_a_missing_folder_says_what_is_there(tmp_path: Path):
    (tmp_path / "run-1").mkdir()
    with pytest.raises(TransferError, match=r"There is no folder .*run-2.*folders run-1"):
        load_backbone(tmp_path / "run-2")


def test_a_folder_without_a_model_says_where_one_is(tmp_path: Path):
    zoo.bert_folder(tmp_path / "run" / "checkpoint-10")
    with pytest.raises(TransferError, match=r"neither config\.json nor adapter_config\.json.*checkpoint-10"):
        load_backbone(tmp_path / "run")
    with pytest.raises(TransferError, match=r"is a file"):
        load_backbone(tmp_path / "run" / "checkpoint-10" / "config.json")


@pytest.mark.parametrize("make", [zoo.bert_folder, zoo.timm_folder])
def test_truncated_weights(tmp_path: Path, make):
    weights = make(tmp_path / "model") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(TransferError, match=r"corrupt or cut short.*Copy it again"):
        load_backbone(tmp_path / "model")


def test_a_truncated_pickle(tmp_path: Path):
    weights = zoo.timm_folder(tmp_path / "model", safe=False) / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(TransferError, match=r"corrupt or cut short"):
        load_backbone(tmp_path / "model")


def test_a_broken_configuration(tmp_path: Path):
    (zoo.bert_folder(tmp_path) / "config.json").write_text('{"model_type": "be')
    with pytest.raises(TransferError, match=r"corrupt or cut short"):
        load_backbone(tmp_path)


def test_a_folder_without_weights(tmp_path: Path):
    (zoo.bert_folder(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(TransferError, match=r"holds no weights.*pretrained=False"):
        load_backbone(tmp_path)


def test_weights_of_another_network(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    weights = zoo.bert_folder(tmp_path) / "model.safetensors"
    save_file({f"other.{key}": value for key, value in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(TransferError, match=r"are not those of a BertForSequenceClassification"):
        load_backbone(tmp_path)


def test_weights_of_other_shapes(tmp_path: Path):
    settings = json.loads((zoo.bert_folder(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "intermediate_size": 64}))
    with pytest.raises(TransferError, match=r"do not have the shapes of its config\.json.*\(32,\) in the weights"):
        load_backbone(tmp_path)


def test_offline_says_so():
    with pytest.raises(TransferError, match=r"'nobody/nothing' is not in the local cache, and HF_HUB_OFFLINE=1"):
        load_backbone("nobody/nothing")
    with pytest.raises(TransferError, match=r"HF_HUB_OFFLINE=1"):
        load_backbone("resnet18")  # known to timm, whose weights lie on the Hub


def test_an_unknown_name_suggests_near_ones():
    with pytest.raises(TransferError, match=r"Near it in timm: .*resnet18"):
        load_backbone("resnet19", pretrained=False)
    with pytest.raises(TransferError, match=r"no pretrained weights named 'resnet18.a9_in1k'.*resnet18\.a1_in1k"):
        load_backbone("resnet18.a9_in1k")
    with pytest.raises(TransferError, match=r"no pretrained weights named 'vit_giant_patch14_224'.*pretrained=False"):
        load_backbone("vit_giant_patch14_224")
