"""Tiny random models, made in a test's own folder, and what the tests of loading and saving do with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "a")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def randomized(model: torch.nn.Module, seed: int = 0) -> Any:
    """The model with every tensor drawn anew, at scales by which each part shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        drawn = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            value.copy_(drawn * (2 / value[0].numel()) ** 0.5)
        elif name.endswith(("running_var", "weight")):
            value.copy_(1 + 0.1 * drawn)
        else:
            value.copy_(0.1 * drawn)
    return model.eval()


def tokenizer(**special: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **special)


def bert_folder(folder: Path, labels: tuple[str, ...] = ("good", "bad", "fair")) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    names = dict(enumerate(labels))
    config = BertConfig(vocab_size=8, id2label=names, label2id={name: i for i, name in names.items()}, **SIZES)
    randomized(BertForSequenceClassification(config)).save_pretrained(folder)
    tokenizer(pad_token="[PAD]").save_pretrained(folder)
    return folder


def gpt2_folder(folder: Path) -> Path:
    """A decoder whose tokenizer has an end-of-text token and none for padding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=8, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=3, eos_token_id=3)
    randomized(GPT2LMHeadModel(config)).save_pretrained(folder)
    tokenizer(eos_token="[SEP]").save_pretrained(folder)
    return folder


def vit_folder(folder: Path) -> Path:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(image_size=32, patch_size=8, num_labels=3, **SIZES)
    randomized(ViTForImageClassification(config)).save_pretrained(folder)
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4] * 3, image_std=[0.2] * 3)
    processor.save_pretrained(folder)
    return folder


def wav2vec2_folder(folder: Path) -> Path:
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    config = Wav2Vec2Config(
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        **SIZES,
    )
    Wav2Vec2Model(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder


def timm_folder(folder: Path, name: str = "resnet10t", *, safe: bool = True, **arguments: Any) -> Path:
    """A folder as timm itself saves it."""
    import timm
    from timm.models import save_for_hf

    model = randomized(timm.create_model(name, **{"num_classes": 3, **arguments}))
    save_for_hf(model, folder, safe_serialization=safe, model_config={"label_names": ["cat", "dog", "eel"]})
    return folder


def images(channels: int = 3, side: int = 32) -> torch.Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1))


def tokens() -> torch.Tensor:
    return torch.tensor([[2, 4, 6, 3], [2, 5, 7, 3]])


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    output = model.eval()(inputs)
    return output if isinstance(output, torch.Tensor) else output.logits


_ALONE = """
import sys
sys.modules["hf_transfer"] = None  # an import of this package fails
import json, torch
torch.set_num_threads(1)
if torch.version.cuda is None:  # torchvision's import, beside a CPU build of torch
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
inputs = torch.load("inputs.pt")
said = {}
def logits(model, inputs):
    with torch.no_grad():
        output = model.eval()(inputs)
    return (output if isinstance(output, torch.Tensor) else output.logits).tolist()
"""


def run_without_us(code: str, inputs: dict[str, torch.Tensor], folder: Path) -> dict[str, Any]:
    """Runs code in a process that cannot import this package.

    The code starts in `folder`, finds `inputs`, torch, json and `logits(model, inputs)`, and fills the dict `said`.
    """
    torch.save(inputs, folder / "inputs.pt")
    code = f"{_ALONE}\n{code}\njson.dump(said, open('said.json', 'w'))"
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / "said.json").read_text())
