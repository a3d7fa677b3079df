"""Probes in one pass: each as it would be alone, and the textbook's softmax regression."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_transfer.errors import TransferError
from hf_transfer.frozen.linear_probes import GRID, LinearProbes, Setting, fit_probes


def rows(n: int = 90, d: int = 12, classes: int = 3, apart: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, d, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    labels = torch.arange(n) % classes
    noise = torch.randn(n, d, generator=draw, dtype=torch.float64)
    return 3 + 5 * (noise + apart * means[labels]), labels


def test_each_probe_ends_as_it_would_alone() -> None:
    x, labels = rows()
    together = fit_probes(x, labels, 3, steps=60, batch_size=16)
    assert together.weight.shape == (len(GRID), 12, 3) and together.weight.dtype == torch.float64
    for i, setting in enumerate(GRID):
        alone = fit_probes(x, labels, 3, settings=[setting], steps=60, batch_size=16)
        torch.testing.assert_close(together.weight[i], alone.weight[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(together.bias[i], alone.bias[0], rtol=1e-10, atol=1e-10)
    flat = together.weight.flatten(1)
    assert torch.pdist(flat).min() > 1e-9  # no two settings are the same probe


def test_a_probe_is_softmax_regression_by_torchs_own_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_transfer.frozen import linear_probes

    seen: list[Tensor] = []
    batches = linear_probes._batches

    def recorded(*args):
        for batch in batches(*args):
            seen.append(batch)
            yield batch

    monkeypatch.setattr(linear_probes, "_batches", recorded)
    x, labels = rows()
    probes = fit_probes(x, labels, 3, settings=[Setting(2.0, 1e-2)], steps=40, batch_size=16)
    layer = nn.Linear(12, 3).double()
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    groups = [{"params": [layer.weight], "weight_decay": 1e-2}, {"params": [layer.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=2.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    standard = (x - x.mean(0)) / x.std(0, correction=0) / 12**0.5
    for batch in seen:
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(standard[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    assert len(seen) == 40 and {len(batch) for batch in seen} == {16}
    torch.testing.assert_close(probes.weight[0], layer.weight.T, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(probes.bias[0], layer.bias, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(probes.logits(x)[0], layer(standard), rtol=1e-9, atol=1e-9)


def test_every_epoch_has_an_order_of_its_own_and_no_row_twice() -> None:
    from hf_transfer.frozen.linear_probes import _batches

    batches = list(_batches(10, 4, 6, seed=0))
    epochs = [torch.cat(batches[i : i + 2]) for i in (0, 2, 4)]
    assert all(len(epoch.unique()) == 8 for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert [len(batch) for batch in _batches(3, 256, 2, seed=0)] == [3, 3]


def test_scale_and_offset_of_the_features_do_not_matter() -> None:
    x, labels = rows()
    shift, scale = torch.arange(12.0).double() * 10, torch.logspace(-3, 3, 12, dtype=torch.float64)
    one, other = (fit_probes(features, labels, 3, steps=30) for features in (x, x * scale + shift))
    torch.testing.assert_close(one.logits(x), other.logits(x * scale + shift), rtol=1e-6, atol=1e-8)
    constant = torch.cat([x, torch.full((90, 1), 7.0, dtype=torch.float64)], 1)
    assert fit_probes(constant, labels, 3, steps=5).logits(constant).isfinite().all()


def test_a_probe_that_diverges_does_not_touch_the_others() -> None:
    x, labels = rows(apart=0.1)
    wild = Setting(1e30, 1e30)
    fitted = fit_probes(x, labels, 3, settings=[Setting(1.0, 0.0), wild, Setting(10.0, 0.0)], steps=30)
    calm = fit_probes(x, labels, 3, settings=[Setting(1.0, 0.0), Setting(10.0, 0.0)], steps=30)
    assert not fitted.weight[1].isfinite().all()
    torch.testing.assert_close(fitted.weight[[0, 2]], calm.weight, rtol=1e-10, atol=1e-10)


def test_certain_probes_do_not_compute_with_denormal_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of classes far apart the wrong ones get probabilities of 1e-40, on which a CPU takes a hundred times as long."""
    least: list[float] = []
    threshold = nn.functional.threshold

    def recorded(values: Tensor, *args: float, inplace: bool) -> Tensor:
        least.append(float(values[values > 0].min()))
        threshold(values, *args, inplace=inplace)
        assert ((values == 0) | (values >= 1e-20) | values.isnan()).all()
        return values

    monkeypatch.setattr(nn.functional, "threshold", recorded)
    x, labels = rows(n=200, d=64, classes=2, apart=6.0)
    fit_probes(x.float(), labels, 2, settings=[Setting(30.0, 0.0)], steps=100)
    assert len(least) == 100 and min(least) < 1e-20


def test_the_best_is_best_on_the_rows_given() -> None:
    """Of two probes, one for each of two tasks, the rows decide."""
    weight = torch.stack([torch.eye(2), torch.eye(2).flip(0)]).double()
    settings = (Setting(1.0, 0.0), Setting(2.0, 0.0))
    probes = LinearProbes(settings, weight, torch.zeros(2, 2).double(), torch.zeros(2), torch.ones(2))
    x = torch.eye(2).double()
    assert probes.best(x, torch.tensor([0, 1])) == 0
    assert probes.best(x, torch.tensor([1, 0])) == 1
    assert probes.accuracy(x, torch.tensor([1, -100])).tolist() == [0.0, 1.0]


def test_the_grid_learns_what_a_line_can_tell() -> None:
    x, labels = rows(n=300, apart=1.5)
    unseen, truth = rows(n=300, apart=1.5, seed=1)
    probes = fit_probes(x.float(), labels, 3, steps=200)
    assert probes.accuracy(unseen, truth).max() > 0.95
    assert fit_probes(x.half(), labels, 3, steps=2).weight.dtype == torch.float32


def test_rows_without_a_label_do_not_train() -> None:
    x, labels = rows()
    more = torch.cat([x, x[:4] * 100]), torch.cat([labels, torch.full((4,), -100)])
    torch.testing.assert_close(fit_probes(*more, 3, steps=10).weight, fit_probes(x, labels, 3, steps=10).weight)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"classes": 1}, "classes=1"), ({"steps": 0}, "steps=0"), ({"batch_size": 0}, "batch_size=0"),
        ({"settings": []}, "at least one"), ({"settings": [Setting(0.0, 0.0)]}, "learning rates > 0"),
        ({"classes": 2}, "0..1"), ({"labels": torch.zeros(3, dtype=torch.int64)}, r"\(3,\)"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change: dict, says: str) -> None:
    x, labels = rows()
    with pytest.raises(TransferError, match=says):
        fit_probes(**{"x": x, "labels": labels, "classes": 3, **change})
