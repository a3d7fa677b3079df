"""Weights and samplers balance what they say, by seed and epoch, over processes and after a resume."""

from __future__ import annotations

import math
from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from sklearn.utils.class_weight import compute_class_weight
from torch.utils.data import BatchSampler

from hf_transfer.data.sampling import BalancedSampler, class_weights
from hf_transfer.errors import TransferError

GROUPS = np.asarray([0] * 20 + [1] * 6 + [2] * 3)


def test_class_weights_are_scikit_learns():
    expected = compute_class_weight("balanced", classes=np.arange(3), y=GROUPS)
    assert np.allclose(class_weights(GROUPS, 3), expected)
    assert class_weights(GROUPS, 3).dtype == torch.float32


@pytest.mark.parametrize(
    "labels",
    [
        [0, 0, 0, 1, -100],
        [[0, 0, -100], [0, 1], []],
        torch.tensor([[0, 0], [0, 1]]),
        Dataset.from_dict({"y": [0, 0, 0, 1]})["y"],
    ],
)  # fmt: skip
def test_class_weights_of_any_shape_count_labelled_items(labels):
    assert torch.allclose(class_weights(labels, 2), torch.tensor([4 / 6, 4 / 2]))


def test_class_weights_need_every_class():
    with pytest.raises(TransferError, match="class 1 has no row"):
        class_weights([0, 0, 2], 3)
    with pytest.raises(TransferError, match=r"labels 0\.\.2 are outside 0\.\.1"):
        class_weights([0, 1, 2], 2)


def test_oversampling_shows_the_largest_group_once_and_the_others_as_often():
    sampler = BalancedSampler(GROUPS)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == 60
    assert Counter(GROUPS[drawn].tolist()) == {0: 20, 1: 20, 2: 20}
    times = Counter(drawn)
    assert all(times[i] == 1 for i in range(20))
    for group, size in ((1, 6), (2, 3)):
        counts = [times[i] for i in np.flatnonzero(group == GROUPS)]
        assert max(counts) - min(counts) <= 1, (group, size)


def test_undersampling_shows_as_many_as_the_smallest_has_and_others_each_epoch():
    sampler = BalancedSampler(GROUPS, mode="under")
    first = list(sampler)
    assert Counter(GROUPS[first].tolist()) == {0: 3, 1: 3, 2: 3}
    assert max(Counter(first).values()) == 1
    seen = set(first)
    for epoch in range(1, 40):
        sampler.set_epoch(epoch)
        seen |= set(sampler)
    assert seen == set(range(len(GROUPS)))


@pytest.mark.parametrize("batch_size", [3, 6, 12])
def test_every_batch_holds_every_group_equally(batch_size):
    for batch in BatchSampler(BalancedSampler(GROUPS, batch_size=batch_size), batch_size, drop_last=False):
        assert set(Counter(GROUPS[batch].tolist()).values()) == {len(batch) // 3}


@pytest.mark.parametrize("split_batches", [False, True])
@pytest.mark.parametrize("processes", [2, 3])
def test_every_processs_batch_holds_every_group_equally(split_batches, processes):
    size = 6 * processes if split_batches else 6
    for rank in range(processes):
        batches = BatchSampler(BalancedSampler(GROUPS), size, drop_last=False)
        for batch in BatchSamplerShard(batches, processes, rank, split_batches=split_batches):
            assert Counter(GROUPS[batch].tolist()) == {0: 2, 1: 2, 2: 2}


def test_processes_share_an_epoch_without_overlap():
    batches = [
        batch
        for rank in range(2)
        for batch in BatchSamplerShard(BatchSampler(BalancedSampler(GROUPS), 6, drop_last=False), 2, rank)
    ]
    assert Counter(chain.from_iterable(batches)) == Counter(BalancedSampler(GROUPS))


def test_the_order_is_a_function_of_seed_and_epoch():
    torch.manual_seed(1), np.random.seed(1)
    first = list(BalancedSampler(GROUPS))
    torch.manual_seed(2), np.random.seed(2)
    sampler = BalancedSampler(GROUPS)
    assert list(sampler) == list(sampler) == first
    assert list(BalancedSampler(GROUPS, seed=1)) != first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_a_resumed_epoch_continues_where_it_stopped():
    sampler = BalancedSampler(GROUPS)
    sampler.set_epoch(3)
    whole = list(sampler)
    resumed = BalancedSampler(GROUPS)
    resumed.set_epoch(3)
    assert list(islice(resumed, 24, None)) == whole[24:]


def test_groups_are_not_shown_in_a_fixed_order():
    firsts = {GROUPS[i] for i in list(BalancedSampler(GROUPS))[::3]}
    assert firsts == {0, 1, 2}


def test_the_accelerate_loader_moves_the_epoch():
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader

    sampler = BalancedSampler(GROUPS)
    loader = prepare_data_loader(
        DataLoader(GROUPS.tolist(), sampler=sampler, batch_size=3),
        num_processes=2,
        process_index=1,
        put_on_device=False,
    )
    loader.set_epoch(4)
    assert sampler.epoch == 4


def test_samplers_of_prepared_data():
    rows = Dataset.from_dict({"labels": [0, 0, 0, 1], "domain": [0, 1, 1, 1]})
    assert Counter(np.asarray(rows["labels"])[list(BalancedSampler.over_classes(rows))].tolist()) == {0: 3, 1: 3}
    assert Counter(np.asarray(rows["domain"])[list(BalancedSampler.over_domains(rows))].tolist()) == {0: 3, 1: 3}
    with pytest.raises(TransferError, match=r"A batch of 3 rows cannot hold 2 groups in equal number.*multiple of 2"):
        BalancedSampler.over_domains(rows, batch_size=3)
    with pytest.raises(TransferError, match=r"needs the column 'domain'; the dataset has labels.*combine"):
        BalancedSampler.over_domains(rows.remove_columns("domain"))
    with pytest.raises(TransferError, match="one whole number a row"):
        BalancedSampler.over_classes(Dataset.from_dict({"labels": [[0], [1]]}))


def test_samplers_look_past_the_transform(image_rows):
    from data_fakes import FakeBackbone

    from hf_transfer.data.columns import Columns
    from hf_transfer.data.transforms import prepare

    columns = Columns("image", "label", "image", "image-classification")
    prepared = prepare(image_rows(4), FakeBackbone(), columns, train=True)  # classes 0, 1, 2, 0
    assert len(BalancedSampler.over_classes(prepared)) == 6


@pytest.mark.parametrize(
    ("groups", "options", "message"), [([], {}, "no rows"), ([0], {"mode": "mid"}, "over.*under")]
)
def test_bad_requests(groups, options, message):
    with pytest.raises(TransferError, match=message):
        BalancedSampler(groups, **options)


def test_rounds_are_uniform():
    """Over epochs each row of a group is shown equally often: 3 sigma of a binomial count."""
    shown = Counter()
    sampler = BalancedSampler([0] * 4 + [1] * 2, mode="under")
    for epoch in range(600):
        sampler.set_epoch(epoch)
        shown.update(sampler)
    spread = 3 * math.sqrt(600 * 0.5 * 0.5)
    assert all(abs(shown[i] - 300) < spread for i in range(4))
    assert shown[4] == shown[5] == 600
