"""Data for the tests of the data package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from data_fakes import WORDS, FakeBackbone

datasets.disable_progress_bars()


@pytest.fixture
def image_rows() -> Callable[..., datasets.Dataset]:
    """`image_rows(12)` are random images with three classes and example ids."""

    def make(rows: int = 12, size: tuple[int, ...] = (20, 28, 3), classes: int = 3) -> datasets.Dataset:
        pixels = np.random.default_rng(0).integers(0, 256, (rows, *size), dtype=np.uint8)
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=[f"class {i}" for i in range(classes)]),
                "example_id": datasets.Value("int64"),
            }
        )
        columns = {
            "image": list(pixels), "label": [i % classes for i in range(rows)], "example_id": list(range(rows)),
        }  # fmt: skip
        return datasets.Dataset.from_dict(columns, features=features)

    return make


@pytest.fixture
def tokenizer() -> Any:
    """A WordPiece tokenizer of 14 pieces: "newyork" is two of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=16,
    )  # fmt: skip


@pytest.fixture
def text_backbone(tokenizer: Any) -> FakeBackbone:
    config = SimpleNamespace(num_labels=2, model_type="bert", max_position_embeddings=12, pad_token_id=0)
    return FakeBackbone("text", tokenizer, None, None, "text-classification", model=SimpleNamespace(config=config))


@pytest.fixture
def sounds() -> Callable[..., datasets.Dataset]:
    """`sounds([bytes, ...])` is a data set of stored sounds with example ids."""

    def make(files: Sequence[bytes | None]) -> datasets.Dataset:
        features = datasets.Features(
            {
                "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
                "label": datasets.ClassLabel(names=["low", "high"]),
                "example_id": datasets.Value("int64"),
            }
        )
        columns = {
            "audio": [None if file is None else {"bytes": file, "path": None} for file in files],
            "label": [i % 2 for i in range(len(files))],
            "example_id": list(range(len(files))),
        }
        return datasets.Dataset.from_dict(columns, features=features)

    return make
