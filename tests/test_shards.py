"""Tensors in parts, on a mesh of one process; tests/invariants/test_fsdp.py has two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hf_transfer.objectives.proximity import squared_distance
from hf_transfer.shards import cut_like, gathered, is_sharded, over_parts, own_part, whole
from hf_transfer.weights import ExponentialAverage


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield torch.distributed.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def cut(mesh: Any) -> Any:
    return lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)])


def test_every_other_tensor_passes_as_it_is() -> None:
    tensor = torch.arange(6.0).reshape(3, 2)
    assert not is_sharded(tensor)
    for same in (own_part(tensor), whole(tensor), cut_like(tensor, torch.zeros(1)), gathered({"a": tensor})["a"]):
        assert same is tensor
    assert cut_like({"start": 1}, {"start": 2}) == {"start": 1}  # a term's extra state
    torch.testing.assert_close(over_parts(squared_distance, [tensor], [tensor - 2]), torch.tensor(24.0))


def test_cut_and_gathered_is_the_same(cut: Any) -> None:
    tensor = torch.randn(5, 2)
    part = cut_like(tensor, cut(torch.zeros(5, 2)))
    assert isinstance(part, DTensor) and part.placements == (Shard(0),)
    assert cut_like(part, part) is part
    state = gathered({"weight": part, "extra": {"start": part, "steps": 3}})
    assert torch.equal(whole(part), tensor) and torch.equal(state["weight"], tensor)
    assert torch.equal(state["extra"]["start"], tensor) and state["extra"]["steps"] == 3


def test_a_part_shares_the_memory(cut: Any) -> None:
    parameter = cut(torch.zeros(4))
    with torch.no_grad():
        own_part(parameter).fill_(3)
    assert torch.equal(whole(parameter), torch.full((4,), 3.0))


def test_a_sum_over_parts_has_the_gradient_of_the_whole(cut: Any) -> None:
    """Some of the weights are in parts, some are not."""
    values, start = [torch.randn(3, 2), torch.randn(4)], [torch.randn(3, 2), torch.randn(4)]
    plain = [value.clone().requires_grad_() for value in values]
    mixed = [cut(values[0]).requires_grad_(), values[1].clone().requires_grad_()]
    expected = squared_distance(plain, start)
    found = over_parts(squared_distance, mixed, [cut_like(w0, w) for w0, w in zip(start, mixed, strict=True)])
    expected.backward()
    found.backward()
    torch.testing.assert_close(found, expected)
    for one, other in zip(mixed, plain, strict=True):
        torch.testing.assert_close(whole(one.grad), other.grad)


def test_an_average_follows_a_model_that_is_cut_after_it_began(cut: Any) -> None:
    torch.manual_seed(0)
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    start, then = model.weight.detach().clone(), other.weight.detach()
    average = ExponentialAverage(model, decay=0.9)
    model.weight = torch.nn.Parameter(cut(then))
    average.update(model)
    expected = 0.9 * start + 0.1 * then
    torch.testing.assert_close(average.state_dict()["weight"], expected)
    average.swap(model)
    torch.testing.assert_close(whole(model.weight), expected)
    average.swap(model)
    assert torch.equal(whole(model.weight), then)
    average.load_state_dict({"weight": start, "bias": model.bias.detach()})
    assert torch.equal(average.state_dict()["weight"], start)
