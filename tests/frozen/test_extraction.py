"""What crosses a cut is the same however many rows run at a time, and the network is afterwards as it was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch

from hf_transfer import batch_sizes, load_backbone
from hf_transfer.data.collate import collator_for
from hf_transfer.data.sources import load_data
from hf_transfer.data.transforms import prepare
from hf_transfer.frozen.extraction import Extractor
from hf_transfer.frozen.prefix import find_cut
from hf_transfer.objective import model_inputs
from hf_transfer.tuning import LinearProbe, PartialFreeze, Tuning

IMAGE_LABELS = [str(digit) for digit in range(10)]


def arguments(**changes: Any) -> Any:
    given = {"bf16": False, "fp16": False, "device": torch.device("cpu"), "process_index": 0, "world_size": 1,
             "train_batch_size": 8, "dataloader_num_workers": 0}  # fmt: skip
    return SimpleNamespace(**given | changes)


def extractor(kind: str, tuning: Tuning, folder: Path, **changes: Any) -> tuple[Any, Extractor, Any]:
    """A tuned network, its extractor and prepared rows."""
    if kind == "bert":
        backbone, data = (
            load_backbone(tiny_runs.text_backbone(folder), labels=["bad", "good"]),
            tiny_runs.sentences(30),
        )
    else:
        backbone = load_backbone(tiny_runs.image_backbone(folder, kind, IMAGE_LABELS))
        data = tiny_runs.digits(30, 10)
    loaded = load_data(data)
    rows = prepare(loaded.splits["train"], backbone, loaded.columns, train=False)
    if kind == "bert":
        rows = rows.select_columns(["input_ids", "attention_mask", "example_id"])
    model = tuning.apply(backbone.model)
    collator = collator_for(backbone)
    lengths = [len(row) for row in rows["input_ids"]] if kind == "bert" else [0] * len(rows)
    sample = collator([rows[int(i)] for i in np.argsort(lengths, kind="stable")[[0, 1, -2, -1]]])
    cut = find_cut(model, model_inputs(sample))
    return model, Extractor(cut, collator, arguments(**changes), sample), rows


def computed(extracted: Extractor, rows: Any) -> dict[int, torch.Tensor]:
    found = {}
    with extracted.running() as run:
        for batch in extracted.loaded(rows, extracted.batches(rows, np.empty(0))):
            values = run(batch)
            for i, example_id in enumerate(batch["example_id"].tolist()):
                mask = batch["attention_mask"][i].bool() if extracted.cut.per_token else ...
                found[example_id] = values[i][mask]
    return found


@pytest.mark.parametrize("tuning", [LinearProbe(), PartialFreeze(1)], ids=["probe", "partial"])
@pytest.mark.parametrize("kind", ["test_resnet", "test_vit", "bert"])
def test_each_row_is_what_it_is_alone(
    kind: str, tuning: Tuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, extracted, rows = extractor(kind, tuning, tmp_path)
    together = computed(extracted, rows)
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(next(iter(kwargs.values())))), with_kwargs=True
    )
    monkeypatch.setattr(batch_sizes, "_LARGEST", 3 * extracted.cut.largest)
    in_parts = computed(extracted, rows)
    handle.remove()
    whole = kind != "bert" and isinstance(tuning, PartialFreeze)  # a map crosses: as in training, bit for bit
    largest = 8 if whole else 3 if kind != "bert" else 3 * extracted.cut.sizes[1]  # shorter texts take less
    assert max(sizes) == largest if kind != "bert" else max(sizes) <= largest
    assert sorted(in_parts) == sorted(together) == sorted(rows["example_id"])
    for i in range(len(rows)):
        row = rows[i]
        batch = extracted.collator([row])
        alone = extracted.cut.capture(model_inputs(batch))[0]
        for found in (together, in_parts):
            torch.testing.assert_close(found[row["example_id"]], alone, rtol=1e-5, atol=1e-5)


def test_channels_last_leaves_the_weights_as_they_were(tmp_path: Path) -> None:
    model, extracted, rows = extractor("test_resnet", LinearProbe(), tmp_path)
    before = {name: (value, value.data_ptr(), value.stride()) for name, value in model.named_parameters()}
    assert extracted._channels_last
    inside = []
    with extracted.running() as run:
        inside = [p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.dim() == 4]
        run(next(iter(extracted.loaded(rows, [[0, 1]]))))
    assert all(inside)
    for name, value in model.named_parameters():
        assert value is before[name][0]
        assert (value.data_ptr(), value.stride()) == before[name][1:]
    assert not extractor("test_resnet", PartialFreeze(1), tmp_path / "b")[1]._channels_last  # a map crosses


def test_every_row_once_over_processes_and_texts_by_length(tmp_path: Path) -> None:
    _, one, rows = extractor("bert", LinearProbe(), tmp_path, train_batch_size=100)
    (batch,) = one.batches(rows, np.empty(0))
    lengths = [len(rows[row]["input_ids"]) for row in batch]
    assert lengths == sorted(lengths, reverse=True)
    ids = np.array(rows["example_id"])
    shares = []
    for rank in (0, 1):
        one.args.process_index, one.args.world_size = rank, 2
        share = [row for batch in one.batches(rows, ids[:7], ids[10:12]) for row in batch]
        assert not set(share) & {*range(7), 10, 11}
        shares += share
    assert sorted(shares) == [7, 8, 9, *range(12, 30)]
