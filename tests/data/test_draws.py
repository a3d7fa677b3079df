"""What is drawn is a function of (seed, epoch, example_id, purpose), in whatever batch and on whatever device."""

from __future__ import annotations

import numpy as np
import torch

from hf_transfer.data.draws import Draws
from hf_transfer.data.replay import key


def test_bits_are_those_of_key():
    ids = [0, 7, (1 << 44) + 3]
    found = Draws(3, 5, torch.tensor(ids)).bits(2, 4)
    assert [[int(x) % (1 << 64) for x in row] for row in found] == [
        [key(3, 5, i, (2 << 32) + n) for n in range(4)] for i in ids
    ]


def test_batch_and_epoch_column_do_not_matter():
    ids = torch.arange(20)
    whole = Draws(0, 4, ids).uniform(1, 3)
    assert torch.equal(Draws(0, 4, ids[[9, 2]]).uniform(1, 3), whole[[9, 2]])
    assert torch.equal(Draws(0, torch.full((20,), 4), ids).uniform(1, 3), whole)
    for other in (Draws(1, 4, ids).uniform(1, 3), Draws(0, 5, ids).uniform(1, 3), Draws(0, 4, ids).uniform(2, 3)):
        assert not (other == whole).any()


def test_uniform():
    drawn = Draws(0, 0, torch.arange(20_000)).uniform(3, 4).numpy()
    assert drawn.min() >= 0 and drawn.max() < 1
    expected = np.arange(1, 10) / 10
    assert np.abs(np.quantile(drawn, expected, axis=0) - expected[:, None]).max() < 0.015
    assert np.abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1]) < 0.03  # of neighbouring rows
