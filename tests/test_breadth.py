"""Every family of timm and every text classifier of transformers goes the whole way, one small member each.

pytest -m slow tests/test_breadth.py -rP        # prints `timm families passed/total` and the like
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import backbone_zoo as zoo
import pytest
import tiny_models as tiny
import torch
from torch.nn import functional as F

from hf_transfer.anatomy import Anatomy
from hf_transfer.backbones import Backbone, load_backbone
from hf_transfer.tuning import LoRA, PartialFreeze, Tuning

pytestmark = [
    pytest.mark.slow,
    # peft 0.21 asks a model of transformers 5.23 for it; delete when peft asks for is_activation_checkpointing
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

LABELS = ["ant", "bee", "cat"]
# What a library itself cannot do, with the error that it raises.
TIMM_CANNOT: dict[str, str] = {}
TRANSFORMERS_CANNOT: dict[str, str] = {
    # peft: "Target module QuantLinear() is not supported"; I-BERT's layers are not torch's
    "ibert": "TransferError: LoRA targets 'all' match no layer of IBertForSequenceClassification",
    "layoutlmv2": "ImportError: LayoutLMv2Model requires the detectron2 library",
}


def test_every_timm_family(tmp_path: Path):
    import timm.models._registry as registry

    assert set(tiny.TIMM_FAMILIES) == set(registry._model_to_module.values()), "timm has other families now"

    def load(family: str) -> tuple[Backbone, dict[str, torch.Tensor]]:
        side = tiny.timm_side(family)
        arguments = {key: value for key, value in tiny.timm_arguments(family).items() if key != "img_size"}
        backbone = load_backbone(
            tiny.TIMM_FAMILIES[family], labels=LABELS, pretrained=False, image_size=side, **arguments
        )
        return backbone, {"pixel_values": tiny.images(side)}

    go_the_whole_way("timm families", tiny.TIMM_FAMILIES, load, tmp_path, TIMM_CANNOT)


def test_every_text_classifier_of_transformers(tmp_path: Path):
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES

    def load(model_type: str) -> tuple[Backbone, dict[str, torch.Tensor]]:
        folder = tmp_path / "random" / model_type
        model = tiny.tiny_model(model_type, CLASSES[model_type], num_labels=len(LABELS))
        batch = tiny.inputs_for(model)
        model.save_pretrained(folder)
        zoo.tokenizer(pad_token="[PAD]").save_pretrained(folder)  # its own may need a library that is not here
        return load_backbone(folder, labels=LABELS, task="text-classification"), batch

    go_the_whole_way("text classifiers", CLASSES, load, tmp_path, TRANSFORMERS_CANNOT)


def go_the_whole_way(
    title: str,
    names: Iterable[str],
    load: Callable[[str], tuple[Backbone, dict[str, torch.Tensor]]],
    folder: Path,
    cannot: dict[str, str],
) -> None:
    failed: dict[str, str] = {}
    names = list(names)
    for name in names:
        start = time.perf_counter()
        try:
            torch.manual_seed(0)
            whole_way(*load(name), folder / name)
        except Exception as error:  # every failure is reported, and compared with what is known
            failed[name] = f"{type(error).__name__}: {str(error).strip()[:300]}"
            print(f"{name}: {failed[name]}")  # noqa: T201
        else:
            print(f"{name}: {time.perf_counter() - start:.1f} s")  # noqa: T201
    print(f"{title} passed/total: {len(names) - len(failed)}/{len(names)}")  # noqa: T201
    assert {name: error for name, error in failed.items() if not error.startswith(cannot.get(name, "\0"))} == {}
    assert set(cannot) <= set(failed), "these pass now: take them off the list"


def whole_way(backbone: Backbone, batch: dict[str, torch.Tensor], folder: Path) -> None:
    """Freeze half, a step, save, load; then LoRA on what was loaded, a step, save, load: equal logits each time."""
    half = PartialFreeze(0.5)
    model = trained(half, backbone.model, batch)
    anatomy = Anatomy.of(model)
    assert anatomy.depth >= 1
    frozen = {anatomy.group(name) for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen <= set(range(anatomy.depth + 1 - max(1, round(anatomy.depth / 2))))
    again = saved_and_loaded(backbone, model, batch, folder / "half")
    adapted = trained(LoRA(r=2), again.model, batch)
    saved_and_loaded(again, adapted, batch, folder / "lora")


def trained(tuning: Tuning, model: Any, batch: dict[str, torch.Tensor]) -> Any:
    """The model after one step of SGD on what the tuning trains."""
    model = tuning.apply(model)
    model.train()
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(moving, lr=1e-3)
    loss = F.cross_entropy(model(**batch).logits, torch.tensor([0, 2]))
    loss.backward()
    assert torch.isfinite(loss)
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in moving)
    torch.nn.utils.clip_grad_norm_(moving, 1.0, error_if_nonfinite=True)  # as the Trainer does
    optimizer.step()
    return model.eval()


def saved_and_loaded(backbone: Backbone, model: Any, batch: dict[str, torch.Tensor], folder: Path) -> Backbone:
    from hf_transfer.hub import bundle

    bundle.save(model, folder, backbone.processor)
    again = load_backbone(folder)
    assert again.labels == LABELS
    with torch.no_grad():
        torch.manual_seed(1)  # Reformer hashes at random
        expected = model(**batch).logits
        torch.manual_seed(1)
        got = again.model(**batch).logits
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    return again
