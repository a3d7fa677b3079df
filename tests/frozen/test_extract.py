"""extract(): the classifier's input of every row, in the rows' order, and the network left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny_runs as tiny
import torch

from hf_transfer import Backbone, TransferError, load_backbone, load_data
from hf_transfer.data.collate import collator_for
from hf_transfer.data.replay import dataset_epoch
from hf_transfer.data.sources import Data
from hf_transfer.data.transforms import prepare
from hf_transfer.frozen.features import extract
from hf_transfer.objective import model_inputs


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Backbone, Data]:
    data = load_data(tiny.digits(20, 10), validation=0)
    folder = tiny.image_backbone(tmp_path_factory.mktemp("net"), labels=data.labels or ())
    return load_backbone(folder), data


def of_rows(backbone: Backbone, rows: datasets.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits by the whole network, and by its classifier alone on what a hook saw, row by row."""
    classifier = backbone.model.get_submodule(backbone.anatomy.classifiers[0])
    seen: list[torch.Tensor] = []
    handle = classifier.register_forward_hook(lambda module, args, output: seen.append(args[0].flatten(1)))
    collate = collator_for(backbone)
    with torch.no_grad():
        logits = [backbone.model(**model_inputs(collate([rows[i]]))).logits for i in range(len(rows))]
    handle.remove()
    return torch.cat(seen), torch.cat(logits)


def test_features_are_the_input_of_the_classifier(images: tuple[Backbone, Data]) -> None:
    backbone, data = images
    rows = prepare(data.splits["test"], backbone, data.columns, train=False)
    found = extract(backbone, rows, batch_size=3)
    x, logits = of_rows(backbone, rows)
    assert len(found) == 10 and found.x.dtype == torch.float32
    torch.testing.assert_close(found.x, x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-5)
    classifier: Any = backbone.model.get_submodule(backbone.anatomy.classifiers[0])
    torch.testing.assert_close(classifier(found.x), found.logits, rtol=1e-4, atol=1e-5)  # the logits follow from them
    assert found.labels is not None and found.labels.tolist() == [rows[i]["labels"] for i in range(10)]
    assert found.example_id.tolist() == [rows[i]["example_id"] for i in range(10)]


def test_texts_keep_their_order_although_the_longest_run_first(tmp_path: Path) -> None:
    data = load_data(tiny.sentences(), validation=0)
    backbone = load_backbone(tiny.text_backbone(tmp_path), labels=data.labels)
    rows = prepare(data.splits["train"], backbone, data.columns, train=False)
    lengths = [len(row["input_ids"]) for row in rows]
    assert lengths != sorted(lengths, reverse=True)
    sizes: list[int] = []
    handle = backbone.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = extract(backbone, rows, batch_size=5)
    handle.remove()
    assert sizes == sorted(lengths, reverse=True)[::5]  # no batch is padded to a longer text than its own
    torch.testing.assert_close(found.x, of_rows(backbone, rows)[0], rtol=1e-4, atol=1e-5)
    assert found.example_id.tolist() == rows["example_id"][:]


def test_the_network_is_left_as_it_was(images: tuple[Backbone, Data]) -> None:
    """BatchNorm and dropout are off, modes come back module by module, and no hook stays."""
    backbone, data = images
    rows = prepare(data.splits["test"], backbone, data.columns, train=False)
    expected = extract(backbone, rows).x
    backbone.model.train()
    norm = next(module for module in backbone.model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    norm.eval()
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    modes = [module.training for module in backbone.model.modules()]
    torch.testing.assert_close(extract(backbone, rows).x, expected)
    assert [module.training for module in backbone.model.modules()] == modes and False in modes and True in modes
    assert all(torch.equal(value, before[name]) for name, value in backbone.model.state_dict().items())
    assert not any(module._forward_hooks for module in backbone.model.modules())
    backbone.model.eval()


def test_features_can_be_trained_on(images: tuple[Backbone, Data]) -> None:
    """Inference mode makes tensors that autograd refuses; these are not."""
    backbone, data = images
    found = extract(backbone, prepare(data.splits["test"], backbone, data.columns, train=False))
    layer = torch.nn.Linear(found.x.shape[1], 10)
    torch.nn.functional.cross_entropy(layer(found.x), found.labels).backward()
    assert layer.weight.grad is not None and not found.x.requires_grad


def test_views_are_those_of_the_first_epochs(images: tuple[Backbone, Data]) -> None:
    backbone, data = images
    rows = prepare(data.splits["test"], backbone, data.columns, train=True, augment="geometric", seed=3)
    counter = dataset_epoch(rows)
    assert counter is not None
    alone = []
    for epoch in range(3):
        counter.set(epoch)
        alone.append(extract(backbone, rows).x)
    counter.set(7)
    found = extract(backbone, rows, views=3)
    assert counter.value == 7
    torch.testing.assert_close(found.x, torch.cat(alone))
    assert not torch.allclose(alone[0], alone[1])
    assert found.example_id.tolist() == 3 * found.example_id[:10].tolist()
    assert found.labels is not None and found.labels.tolist() == 3 * found.labels[:10].tolist()


def test_dtype_is_what_is_kept_and_the_network_computes_in_its_own(images: tuple[Backbone, Data]) -> None:
    backbone, data = images
    rows = prepare(data.splits["test"], backbone, data.columns, train=False)
    whole = extract(backbone, rows)
    half = extract(backbone, rows, dtype=torch.float16)
    assert half.x.dtype == torch.float16 and half.logits.dtype == torch.float32
    torch.testing.assert_close(half.x, whole.x.half())
    backbone.model.double()
    fine = extract(backbone, rows, dtype=torch.float64).x
    backbone.model.float()
    assert not torch.equal(fine, fine.float().double())
    torch.testing.assert_close(fine.float(), whole.x, rtol=1e-4, atol=1e-5)


def test_rows_without_labels_have_features(images: tuple[Backbone, Data]) -> None:
    backbone, data = images
    bare = data.splits["test"].remove_columns([str(data.columns.label)])
    found = extract(backbone, prepare(bare, backbone, data.columns, train=False))
    assert found.labels is None and np.isfinite(found.x.numpy()).all() and len(found) == 10


def test_bad_input_is_named(images: tuple[Backbone, Data], tmp_path: Path) -> None:
    backbone, data = images
    rows = prepare(data.splits["test"], backbone, data.columns, train=False)
    with pytest.raises(TransferError, match="batch_size=0"):
        extract(backbone, rows, batch_size=0)
    with pytest.raises(TransferError, match="no random augmentation"):
        extract(backbone, rows, views=2)
    with pytest.raises(TransferError, match="a token and not one a row"):
        extract(load_backbone(tiny.language_model(tmp_path)), rows)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_it_runs_on_the_accelerator_and_comes_back(images: tuple[Backbone, Data]) -> None:
    backbone, data = images
    rows = prepare(data.splits["test"], backbone, data.columns, train=False)
    seen: list[str] = []
    handle = backbone.model.register_forward_hook(lambda m, args, output: seen.append(output.logits.device.type))
    found = extract(backbone, rows)
    handle.remove()
    assert seen == [torch.accelerator.current_accelerator().type]  # type: ignore[union-attr]
    assert found.x.device.type == "cpu" == next(backbone.model.parameters()).device.type
    torch.testing.assert_close(found.x, extract(backbone, rows, device="cpu").x, rtol=1e-2, atol=1e-3)
