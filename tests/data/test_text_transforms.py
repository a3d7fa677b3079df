"""Text to token ids, words to token labels, prompts to continuations."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
from data_fakes import WORDS, FakeBackbone
from datasets import ClassLabel, Dataset, Features, List, Value

from hf_transfer.data.columns import Columns
from hf_transfer.data.text_transforms import Words, token_labels, token_limit
from hf_transfer.data.transforms import prepare
from hf_transfer.errors import TransferError

TEXT = Columns("text", "label", "text", "text-classification")
NER = Columns("tokens", "tags", "tokens", "token-classification")
prepare_train = partial(prepare, train=True)


def texts(*rows: str, **more) -> Dataset:
    return Dataset.from_dict({"text": list(rows), "label": [i % 2 for i in range(len(rows))], **more})


def pieces(ids) -> list[str]:
    return [WORDS[i] for i in ids]


def words() -> Dataset:
    features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=["O", "B-place"]))})
    rows = {"tokens": [["the", "newyork", "film"], ["london", "good"]], "tags": [[0, 1, 0], [1, 0]]}
    return Dataset.from_dict(rows, features=features)


def ner_backbone(text_backbone: FakeBackbone) -> FakeBackbone:
    text_backbone.task = "token-classification"
    return text_backbone


def test_text_becomes_ids_with_the_contracts_columns(text_backbone):
    found = prepare_train(texts("a good film", "bad", domain=[0, 1], author=["x", "y"]), text_backbone, TEXT)
    assert pieces(found[0]["input_ids"]) == ["[CLS]", "a", "good", "film", "[SEP]"]
    assert set(found.column_names) >= {"input_ids", "attention_mask", "labels", "domain", "example_id"}
    assert not {"text", "label", "author"} & set(found.column_names)
    assert (found["labels"][:], found["example_id"][:], found["domain"][:]) == ([0, 1], [0, 1], [0, 1])


def test_pairs_are_encoded_together(text_backbone):
    columns = Columns("text", "label", "text", "text-classification", pair="other")
    found = prepare_train(texts("good film", other=["a film"]), text_backbone, columns)
    assert pieces(found[0]["input_ids"]) == ["[CLS]", "good", "film", "[SEP]", "a", "film", "[SEP]"]


def test_text_is_cut_to_the_length_or_else_to_what_the_model_takes(text_backbone):
    long = texts("good " * 50)
    assert len(prepare_train(long, text_backbone, TEXT, max_length=6)[0]["input_ids"]) == 6
    assert len(prepare_train(long, text_backbone, TEXT)[0]["input_ids"]) == 12  # positions, fewer than the tokenizer's


@pytest.mark.parametrize("length", [2, 13])
def test_a_length_out_of_range_is_refused(text_backbone, length):
    with pytest.raises(TransferError, match=f"max_length={length}: valid are 3 to 12 tokens"):
        prepare_train(texts("x"), text_backbone, TEXT, max_length=length)


@pytest.mark.parametrize(
    ("tokenizer_limit", "config", "limit"),
    [
        (16, {"model_type": "bert", "max_position_embeddings": 12}, 12),
        (8, {"model_type": "bert", "max_position_embeddings": 12}, 8),
        (10**30, {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        (10**30, {"model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        (10**30, {"model_type": "t5"}, None),
    ],
)
def test_the_token_limit_is_the_smaller_of_tokenizers_and_models(tokenizer_limit, config, limit):
    backbone = SimpleNamespace(
        processor=SimpleNamespace(model_max_length=tokenizer_limit),
        model=SimpleNamespace(config=SimpleNamespace(**config)),
    )
    assert token_limit(backbone) == limit


def test_word_labels_go_to_first_pieces(text_backbone):
    found = prepare_train(words(), ner_backbone(text_backbone), NER)
    assert pieces(found[0]["input_ids"]) == ["[CLS]", "the", "new", "##york", "film", "[SEP]"]
    assert found[0]["labels"] == [-100, 0, 1, -100, 0, -100]
    assert found[1]["labels"] == [-100, 1, -100, 0, -100]
    assert found["example_id"][:] == [0, 1]


@pytest.mark.parametrize(
    ("word_ids", "labels", "expected"),
    [
        ([None, 0, 0, 1, None], [3, 4], [-100, 3, -100, 4, -100]),
        ([0, 1, 2], [7, -100, 9], [7, -100, 9]),
        ([None, 0, 2, None], [1, 2, 3], [-100, 1, 3, -100]),  # a word without tokens
        ([], [1], []),
    ],
)
def test_token_labels(word_ids, labels, expected):
    assert token_labels(word_ids, labels) == expected


def test_words_cut_off_are_counted_aloud(text_backbone, caplog):
    prepare_train(words(), ner_backbone(text_backbone), NER, max_length=4)
    assert "2 of 5 words have no label" in caplog.text


def test_words_without_labels_can_be_predicted(text_backbone):
    found = prepare(words().remove_columns("tags"), ner_backbone(text_backbone), NER, train=False)
    assert "labels" not in found.column_names


def test_tokenizers_that_cannot_take_words_are_refused(text_backbone):
    backbone = ner_backbone(text_backbone)
    backbone.processor = SimpleNamespace(is_fast=False, model_max_length=16)
    with pytest.raises(TransferError, match="load a fast tokenizer"):
        prepare_train(words(), backbone, NER)


@pytest.mark.parametrize("add_prefix_space", [False, True])
def test_byte_level_tokenizers_see_words_and_not_one_long_one(add_prefix_space):
    from transformers import RobertaTokenizer

    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b", "Ġ", "Ġa", "Ġb"]
    byte_level = RobertaTokenizer(
        vocab={name: i for i, name in enumerate(names)}, merges=[("Ġ", "a"), ("Ġ", "b")],
        add_prefix_space=add_prefix_space,
    )  # fmt: skip
    encoded = Words(byte_level, "tokens", 16)({"tokens": [["a", "ba", "b"]], "labels": [[1, 2, 3]]})
    assert byte_level.convert_ids_to_tokens(encoded["input_ids"][0]) == ["<s>", "Ġa", "Ġb", "a", "Ġb", "</s>"]
    assert encoded["labels"] == [[-100, 1, 2, -100, 3, -100]]


def test_a_missing_text_is_named(text_backbone):
    rows = Dataset.from_dict({"text": ["x", None], "label": [0, 1]})
    with pytest.raises(TransferError, match="No text in train row 1"):
        prepare_train(rows, text_backbone, TEXT)


def test_language_modelling_predicts_every_token_and_an_end(text_backbone):
    text_backbone.task = "causal-lm"
    text_backbone.processor.eos_token = "film"
    rows = Dataset.from_dict({"text": ["a good"]})
    found = prepare_train(rows, text_backbone, Columns("text", None, "text", "causal-lm"))[0]
    assert pieces(found["input_ids"]) == ["[CLS]", "a", "good", "[SEP]", "film"]
    assert found["labels"] == found["input_ids"]
    assert len(found["attention_mask"]) == 5


def test_a_prompt_is_read_and_not_learnt(text_backbone):
    text_backbone.task = "causal-lm"
    columns = Columns("prompt", None, "text", "causal-lm", pair="completion")
    rows = Dataset.from_dict({"prompt": ["the film"], "completion": ["good"]})
    found = prepare_train(rows, text_backbone, columns)[0]
    assert pieces(found["input_ids"]) == ["[CLS]", "the", "film", "[SEP]", "good"]
    assert found["labels"] == [-100, -100, -100, -100, 4]


def test_image_options_are_refused_for_text(text_backbone):
    with pytest.raises(TransferError, match=r"augment='randaugment': the data is text.*none, light"):
        prepare_train(texts("x"), text_backbone, TEXT, augment="randaugment")
    with pytest.raises(TransferError, match="image_size=32: the data is text"):
        prepare_train(texts("x"), text_backbone, TEXT, image_size=32)


def test_a_backbone_without_tokenizer_is_refused(text_backbone):
    from hf_transfer.data.collate import collator_for

    text_backbone.processor = None
    for use in (lambda: prepare_train(texts("x"), text_backbone, TEXT), lambda: collator_for(text_backbone)):
        with pytest.raises(TransferError, match=r"'fake' came without a tokenizer.*AutoTokenizer"):
            use()


@pytest.mark.slow
def test_a_real_tokenizer(shared):
    from transformers import AutoConfig, AutoTokenizer

    from hf_transfer.data.collate import collator_for
    from hf_transfer.data.sources import load_data

    folder = shared("weights/all-MiniLM-L6-v2")
    model = SimpleNamespace(config=AutoConfig.from_pretrained(folder))
    backbone = FakeBackbone(
        "text", AutoTokenizer.from_pretrained(folder), None, task="text-classification", model=model
    )
    data = load_data(shared("data/sst2"), max_eval_samples=8)
    rows = prepare(data.splits["test"], backbone, data.columns, train=False)
    batch = collator_for(backbone)([rows[i] for i in range(8)])
    expected = backbone.processor(list(data.splits["test"]["text"]), padding=True, return_tensors="pt")
    for name in expected:
        assert batch[name].equal(expected[name]), name
    assert batch["labels"].tolist() == list(data.splits["test"]["label"])
    backbone.task = "token-classification"
    data = load_data(shared("data/wnut17"), max_eval_samples=20)
    rows = prepare(data.splits["test"], backbone, data.columns, train=False)
    for before, after in zip(data.splits["test"], rows, strict=True):
        seen = [label for label in after["labels"] if label != -100]
        assert seen == before["ner_tags"][: len(seen)]
