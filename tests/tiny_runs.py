"""Tiny random checkpoints and data of every modality, small enough to be fine-tuned in a second."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from hf_transfer.data.readers import digits as all_digits

datasets.disable_progress_bars()

LABELS = ("bad", "good")
WORDS = ("film", "plot", "actor", "dull", "great", "poor", "fine", "the", "a", "was", "new", "york", "and", "not")
_SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}

# What every run here has in common: three steps on the CPU, nothing printed.
QUICK: dict[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 20,
    "disable_tqdm": True,
    "use_cpu": True,
}


def digits(train: int = 60, test: int = 40, classes: Sequence[str] | None = None) -> datasets.DatasetDict:
    """The first rows of scikit-learn's digits, of some classes only if named."""
    from hf_transfer.data.splits import keep_classes

    splits = {name: rows.select(range(6 * (train if name == "train" else test))) for name, rows in _digits().items()}
    if classes is not None:
        splits = {name: keep_classes(rows, classes) for name, rows in splits.items()}
    return datasets.DatasetDict(
        {name: rows.select(range(train if name == "train" else test)) for name, rows in splits.items()}
    )


_LOADED: dict[str, datasets.Dataset] = {}


def _digits() -> dict[str, datasets.Dataset]:
    if not _LOADED:
        _LOADED.update(all_digits())
    return _LOADED


def image_backbone(folder: Path, name: str = "test_resnet", labels: Sequence[str] = ("x", "y", "z")) -> Path:
    """A random timm network, saved as an ordinary checkpoint."""
    from hf_transfer import load_backbone

    torch.manual_seed(0)
    load_backbone(name, labels=list(labels), pretrained=False, image_size=32).save(folder)
    return folder


def tokenizer() -> Any:
    """A word-level tokenizer with BERT's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=24, eos_token="[SEP]", **special)


def text_backbone(folder: Path) -> Path:
    """A random BERT without a head, and its tokenizer."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=18, max_position_embeddings=24, **_SIZE)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def language_model(folder: Path) -> Path:
    """A random GPT-2 and a tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24}
    config = GPT2Config(vocab_size=18, bos_token_id=2, eos_token_id=3, pad_token_id=0, **size)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def wav2vec2(folder: Path) -> Path:
    """A random wav2vec 2.0 without a head, and its feature extractor."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    torch.manual_seed(0)
    layers = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
    masks = {"mask_time_prob": 0.0, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    Wav2Vec2Model(Wav2Vec2Config(**_SIZE, **layers, **masks)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(folder)
    return folder


def spectrogram_transformer(folder: Path) -> Path:
    """A random audio spectrogram transformer (AST), and its feature extractor."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    torch.manual_seed(0)
    config = ASTConfig(**_SIZE, max_length=64, num_mel_bins=16, patch_size=8, time_stride=8, frequency_stride=8)
    ASTForAudioClassification(config).save_pretrained(folder)
    ASTFeatureExtractor(num_mel_bins=16, max_length=64).save_pretrained(folder)
    return folder


def texts(rows: int = 24, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, size=draw.integers(3, 8))) for _ in range(rows)]


def sentences(rows: int = 24) -> datasets.DatasetDict:
    """Texts whose class is a string."""
    split = datasets.Dataset.from_dict({"text": texts(rows), "label": [LABELS[i % 2] for i in range(rows)]})
    return datasets.DatasetDict(train=split, validation=split, test=split)


def pairs(rows: int = 24) -> datasets.DatasetDict:
    """Pairs of texts with named classes."""
    features = datasets.Features(
        {
            "sentence1": datasets.Value("string"),
            "sentence2": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["same", "other", "neither"]),
        }
    )
    columns = {"sentence1": texts(rows), "sentence2": texts(rows, 1), "label": [i % 3 for i in range(rows)]}
    split = datasets.Dataset.from_dict(columns, features=features)
    return datasets.DatasetDict(train=split, validation=split)


def ratings(rows: int = 24, outputs: int = 1) -> datasets.DatasetDict:
    """Texts with one number, or several."""
    draw = np.random.default_rng(0).normal(size=(rows, outputs))
    split = datasets.Dataset.from_dict({"text": texts(rows), "label": (draw[:, 0] if outputs == 1 else draw).tolist()})
    return datasets.DatasetDict(train=split, validation=split)


def tagged_words(rows: int = 24) -> datasets.DatasetDict:
    """Lists of words with a tag a word."""
    tags = ["O", "B-place", "I-place"]
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=tags)),
        }
    )
    words = [["the", "new", "york", "film"], ["a", "dull", "plot"], ["new", "york"]] * (rows // 3)
    marks = [[0, 1, 2, 0], [0, 0, 0], [1, 2]] * (rows // 3)
    split = datasets.Dataset.from_dict({"tokens": words, "ner_tags": marks}, features=features)
    return datasets.DatasetDict(train=split, validation=split, test=split)


def wav_bytes(hertz: float, seconds: float = 0.2, rate: int = 8000) -> bytes:
    import wave

    samples = 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)
    buffer = BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).round().astype("<i2").tobytes())
    return buffer.getvalue()


def tones(rows: int = 16) -> datasets.DatasetDict:
    """High and low tones of 0.2 s at 8 kHz."""
    files = [{"bytes": wav_bytes((200, 900)[i % 2] + i), "path": None} for i in range(rows)]
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}  # Audio() would want torchcodec
    features = datasets.Features({"audio": stored, "label": datasets.ClassLabel(names=["l", "h"])})
    split = datasets.Dataset.from_dict({"audio": files, "label": [i % 2 for i in range(rows)]}, features=features)
    return datasets.DatasetDict(train=split, validation=split, test=split)


def parquet_folder(splits: datasets.DatasetDict, folder: Path) -> Path:
    """The splits as `train.parquet`, ... in a folder."""
    folder.mkdir(parents=True)
    for name, rows in splits.items():
        rows.to_parquet(folder / f"{name}.parquet")
    return folder


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@torch.no_grad()
def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    return model.eval()(**inputs).logits
