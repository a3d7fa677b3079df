"""Batches that suit the machine: how many rows, in which order, in which parts."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch import nn

from hf_transfer import batch_sizes
from hf_transfer.batch_sizes import a_few, in_parts, largest_output, longest_first, rows_at_once, rows_loaded
from hf_transfer.data.columns import list_lengths

CPU, ACCELERATOR = torch.device("cpu"), torch.device("cuda")
TEXTS = Dataset.from_dict({"input_ids": [[1], [1, 2, 3], [1, 2], [4, 5, 6], []], "labels": [0, 1, 2, 3, 4]})


def test_rows_by_device_and_by_the_largest_output() -> None:
    assert [rows_loaded(CPU, 8), rows_loaded(CPU, 100), rows_loaded(ACCELERATOR, 8)] == [64, 100, 256]
    assert [rows_at_once(CPU, 1 << 20), rows_at_once(CPU, 1 << 30), rows_at_once(CPU, 0)] == [16, 1, 16 << 20]
    assert rows_at_once(ACCELERATOR, 1 << 20) == 512


def test_parts_are_the_batch_cut_by_rows() -> None:
    batch = {"x": torch.arange(10).view(5, 2), "id": torch.arange(5), "scale": torch.tensor(2.0), "name": "a"}
    parts = list(in_parts(batch, 2))
    assert [len(part["id"]) for part in parts] == [2, 2, 1]
    for name in ("x", "id"):
        assert torch.equal(torch.cat([part[name] for part in parts]), batch[name])
    assert all(part["scale"] is batch["scale"] and part["name"] == "a" for part in parts)


def test_lengths_and_order_of_texts() -> None:
    assert list_lengths(TEXTS, "input_ids").tolist() == [1, 3, 2, 3, 0]
    assert list_lengths(TEXTS.select([3, 0]).with_format("torch"), "input_ids").tolist() == [3, 1]
    assert list_lengths(TEXTS.select([]), "input_ids").tolist() == []
    assert longest_first(TEXTS).tolist() == [1, 3, 2, 0, 4]
    assert longest_first(TEXTS.remove_columns("input_ids")).tolist() == [0, 1, 2, 3, 4]


def test_a_few_rows_of_unequal_length(monkeypatch: pytest.MonkeyPatch) -> None:
    assert a_few(TEXTS) == [4, 2, 1, 3]
    assert a_few(TEXTS.select([0])) == [0]
    assert a_few(TEXTS.remove_columns("input_ids")) == [0, 1, 2, 3]
    monkeypatch.setattr(batch_sizes, "_LOOKED_AT", 3)
    assert a_few(TEXTS) == [0, 2, 1]


def test_the_largest_output_of_a_module() -> None:
    class Both(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
            return x, None, x.expand(3, *x.shape)

    network = nn.Sequential(nn.Linear(4, 100), nn.Linear(100, 2))
    with largest_output([network]) as seen:
        network(torch.zeros(5, 4))
    assert seen.bytes == 5 * 100 * 4
    with largest_output([network, Both()]) as seen:
        network(torch.zeros(1, 4))
    assert seen.bytes == 100 * 4
    both = Both()
    with largest_output([both]) as seen:
        both(torch.zeros(6))
    both(torch.zeros(60))  # no longer watched
    assert seen.bytes == 3 * 6 * 4
