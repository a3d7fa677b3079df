"""The lines of a card that load the model: with transformers, timm or peft, never with this package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..loading.adapters import CONFIG_FOLDER

if TYPE_CHECKING:
    from .card import CardFacts

THIS_MODEL = "<this model>"  # `push` puts the repository's id in its place
PIPELINE_TAGS = {
    "image-classification": "image-classification",
    "text-classification": "text-classification",
    "token-classification": "token-classification",
    "audio-classification": "audio-classification",
    "causal-lm": "text-generation",
}
_MODELS = {
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "audio-classification": "AutoModelForAudioClassification",
    "causal-lm": "AutoModelForCausalLM",
}
_PROCESSORS = {"image": "AutoImageProcessor", "text": "AutoTokenizer", "audio": "AutoFeatureExtractor"}
_INPUTS = {
    "image": 'processor(Image.open("image.png").convert("RGB"), return_tensors="pt")',
    "text": 'processor("A sentence.", return_tensors="pt")',
    "audio": 'processor(waveform, sampling_rate=processor.sampling_rate, return_tensors="pt")  # (samples,) mono',
}


def usage(facts: CardFacts) -> str:
    """Python that loads the model and predicts once.

    Args:
        facts: Library, task and modality decide the lines.

    Returns:
        The code; `<this model>` stands for the model's Hub id, or a folder that holds it.
    """
    if facts.library == "timm":
        return _timm(facts)
    if facts.library == "peft" or facts.task == "regression":
        return _auto_classes(facts)
    return _pipeline(facts)


def _pipeline(facts: CardFacts) -> str:
    example = {"image": "image.png", "text": "A sentence.", "audio": "audio.wav"}[facts.modality]
    return f"""from transformers import pipeline

predict = pipeline("{PIPELINE_TAGS[facts.task]}", model="{THIS_MODEL}")
print(predict("{example}"))"""


def _timm(facts: CardFacts) -> str:
    answer = "logits" if facts.task == "regression" else 'model.pretrained_cfg["label_names"][int(logits.argmax())]'
    return f"""import timm
import torch
from PIL import Image

model = timm.create_model("hf-hub:{THIS_MODEL}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.open("image.png").convert("RGB"))  # (C, H, W)
with torch.no_grad():
    logits = model(image[None])[0]
print({answer})"""


def _auto_classes(facts: CardFacts) -> str:
    model = _MODELS.get(facts.task) or _MODELS[f"{facts.modality}-classification"]
    processor = _PROCESSORS[facts.modality]
    classes = [model, processor]
    load = [f'model = {model}.from_pretrained("{THIS_MODEL}").eval()']
    if facts.library == "peft":  # see bundle: an adapter's classes, labels and image size are in model_config
        classes.append("AutoConfig")
        load = [
            f'config = AutoConfig.from_pretrained("{THIS_MODEL}", subfolder="{CONFIG_FOLDER}")',
            f'model = {model}.from_pretrained("{THIS_MODEL}", config=config, ignore_mismatched_sizes=True).eval()',
        ]
    image = ["from PIL import Image"] if facts.modality == "image" else []
    one_label = facts.task.endswith("-classification") and facts.task != "token-classification"
    return "\n".join(
        [
            *(["import peft  # without it, transformers does not load adapters"] if facts.library == "peft" else []),
            "import torch",
            *image,
            f"from transformers import {', '.join(sorted(classes))}",
            "",
            *load,
            f'processor = {processor}.from_pretrained("{THIS_MODEL}")',
            f"inputs = {_INPUTS[facts.modality]}",
            "with torch.no_grad():",
            "    logits = model(**inputs).logits",
            f"print({'model.config.id2label[int(logits.argmax())]' if one_label else 'logits'})",
        ]
    )
