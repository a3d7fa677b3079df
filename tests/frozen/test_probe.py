"""probe(): backbones ranked by rows that trained nothing, and a test split that is looked at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny_runs as tiny
import torch

from hf_transfer import TransferError, load_backbone
from hf_transfer.frozen import classifiers, features, selection
from hf_transfer.frozen.probe import probe
from hf_transfer.frozen.probe_report import BackboneProbe, Estimate, ProbeReport

CHEAP: dict[str, Any] = {"methods": ("knn", "lda"), "folds": 3}


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random network, and one whose features are all but the same for every image."""
    sound, dull = (tiny.image_backbone(tmp_path_factory.mktemp(name) / name) for name in ("sound", "dull"))
    backbone = load_backbone(dull)
    for name, parameter in backbone.model.named_parameters():
        if "classifier" not in name and "fc" not in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    backbone.save(dull, overwrite=True)
    return sound, dull


def clouds(n: int = 60, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    means = 4 * np.random.default_rng(9).normal(size=(classes, 8))
    labels = np.arange(n) % classes
    return (np.random.default_rng(seed).normal(size=(n, 8)) + means[labels]).astype(np.float32), labels


@pytest.mark.parametrize("method", classifiers.METHODS)
def test_every_method_tells_clouds_apart_under_each_of_its_settings(method: str) -> None:
    unseen, truth = clouds(seed=1)
    told = classifiers.classifier(method)(*clouds(), unseen, 3, 0)
    assert told.shape[1] == 60
    assert ((told == truth).mean(1) > 0.9).all()
    names = [classifiers.setting_name(method, i) for i in range(len(told))]
    assert len(set(names)) == len(told)


def test_neighbours_are_those_of_scikit_learn_by_cosine() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    x, labels = clouds()
    draw = np.random.default_rng(2)
    labels = draw.permutation(labels)
    unseen = draw.normal(size=(30, 8)).astype(np.float32)
    told = classifiers.knn(x, labels, unseen, 3, 0)
    for i, k in enumerate(classifiers.NEIGHBOURS):
        expected = KNeighborsClassifier(k, metric="cosine").fit(x, labels).predict(unseen)
        assert told[i].tolist() == expected.tolist()
    assert classifiers.knn(x[:4], labels[:4], unseen, 3, 0).shape == (3, 30)


def test_rows_are_told_by_classifiers_that_never_saw_them(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = clouds()
    x[:, 0] = np.arange(60)  # a row's number
    calls: list[tuple[set, set]] = []

    def recorded(x: Any, labels: Any, unseen: Any, classes: int, seed: int) -> np.ndarray:
        calls.append((set(x[:, 0]), set(unseen[:, 0])))
        return unseen[None, :, 0].astype(int)

    monkeypatch.setitem(classifiers._CLASSIFIERS, "lda", recorded)
    told = selection.cross_predictions("lda", x, labels, selection.fold_numbers(labels, 4, seed=0), 3, 0)
    assert told[0].tolist() == list(range(60))  # each answer at the place of its row
    assert len(calls) == 4
    for trained, judged in calls:
        assert not trained & judged and trained | judged == set(range(60))


def test_folds_are_stratified() -> None:
    labels = np.repeat([0, 1], [40, 20])
    fold_of = selection.fold_numbers(labels, 5, seed=0)
    assert all(np.bincount(labels[fold_of == fold]).tolist() == [8, 4] for fold in range(5))


def test_the_best_of_many_guesses_is_not_flattered() -> None:
    """The best of 100 coins looks better than a coin on the rows it was chosen by, and is none on others."""
    coins = np.random.default_rng(0).random((100, 2000)) < 0.5
    part_of = selection.part_numbers(2000, seed=0)
    assert coins[selection.best_setting(coins)].mean() > 0.52
    assert abs(selection.right_under_others_choice(coins, part_of).mean() - 0.5) < 0.03
    good = np.vstack([coins, np.ones((1, 2000), bool)])
    assert selection.right_under_others_choice(good, part_of).all()


def test_the_better_backbone_comes_first(nets: tuple[Path, Path]) -> None:
    sound, dull = nets
    report = probe([dull, sound], tiny.digits(90, 30), **CHEAP)
    assert [each.name for each in report.backbones] == [str(sound), str(dull)]
    best, other = report.backbones
    assert best.accuracy[best.method].value > 0.5 and set(best.accuracy) == {"knn", "lda"}
    assert best.leep is not None and best.leep <= 0 and best.width == 96
    assert report.behind(other).value == pytest.approx(
        best.accuracy[best.method].value - other.accuracy[other.method].value
    )
    assert report.test is not None and report.judged == "3-fold cross-validation on 90 train rows"
    lines = str(report).splitlines()
    head = ["backbone", "knn", "lda", "behind", "LogME", "H-score", "LEEP", "features", "seconds"]
    assert lines[1].split() == head and lines[2].startswith(str(sound))
    assert f"{best.leep:.3f}" in lines[2] and f"test accuracy {report.test} %" in lines[-1]


def test_the_test_split_is_looked_at_once_and_chooses_nothing(
    nets: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny.digits(60, 30)
    seen: list[tuple[str, int]] = []
    extract = features.extract

    def recorded(backbone: Any, rows: Any, **options: Any) -> Any:
        found = extract(backbone, rows, **options)
        seen.append((backbone.name, int(found.example_id[0]) >> 40))  # 0 is train, 2 is test
        return found

    monkeypatch.setattr(features, "extract", recorded)
    one = probe(list(nets), data, **CHEAP)
    sound, dull = map(str, nets)
    assert seen == [(sound, 0), (dull, 0), (one.best.name, 2)]
    wrong = data["test"].add_column("other", [(label + 1) % 10 for label in data["test"]["label"]])
    wrong = wrong.remove_columns("label").rename_column("other", "label").cast(data["test"].features)
    other = probe(list(nets), datasets.DatasetDict(train=data["train"], test=wrong), **CHEAP)
    assert [each.name for each in other.backbones] == [each.name for each in one.backbones]
    assert other.test != one.test
    for a, b in zip(one.backbones, other.backbones, strict=True):
        assert all(np.array_equal(a.right[method], b.right[method]) for method in a.right)


def test_texts_and_a_validation_split(tmp_path: Path) -> None:
    """A checkpoint without a head has no classes of its own, and so no LEEP."""
    net = load_backbone(tiny.text_backbone(tmp_path), task="text-classification")
    report = probe(net, tiny.sentences(), methods=["linear"], folds=None)
    (only,) = report.backbones
    assert only.leep is None and only.name == str(tmp_path)
    assert report.judged == "24 validation rows (validation: the data's own split)"
    assert len(only.right["linear"]) == 24 and report.majority == 0.5
    assert "lr " in only.settings["linear"] and "lr " in str(report)


def test_random_layers_in_front_of_the_classifier_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import RobertaConfig, RobertaModel

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    RobertaModel(RobertaConfig(vocab_size=18, max_position_embeddings=30, pad_token_id=0, **size)).save_pretrained(
        tmp_path
    )
    tiny.tokenizer().save_pretrained(tmp_path)
    first, again = (probe(tmp_path, tiny.sentences(), methods=["lda"], folds=2) for _ in range(2))
    assert "classifier.dense.weight" in caplog.text and "random weights" in caplog.text
    assert first.best.logme == again.best.logme  # they are drawn from the seed


def test_the_majority_is_what_knowing_nothing_gives_and_differences_are_paired() -> None:
    right = np.array([True] * 60 + [False] * 40)
    worse = right.copy()
    worse[:2] = False
    probes = [
        BackboneProbe(name, 8, {"lda": each}, {"lda": ""}, 0.0, 0.0, None, {"extract": 1.0})
        for name, each in (("a", right), ("b", worse))
    ]
    report = ProbeReport("data", "somehow", 0.5, tuple(probes), None)
    assert report.best.accuracy["lda"] == Estimate(0.6, pytest.approx(0.049, abs=1e-3))
    assert report.behind(probes[1]) == Estimate(
        0.02, pytest.approx(0.014, abs=1e-3)
    )  # 2 rows of 100, not 5 + 5 points
    assert "there is no test split" in str(report) and "gives 50.0" in str(report)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"methods": ["svm"]}, "'svm' is not known; valid are linear, knn, lda, logistic"),
        ({"methods": "lda"}, "methods='lda': give a list"), ({"methods": []}, "methods="),
        ({"models": []}, "models=.. is empty"), ({"folds": 1}, "folds=1"), ({"folds": 50}, "folds=50"),
        ({"dataset": "ratings"}, "data is for regression"), ({"dataset": "words"}, "token-classification"),
    ],
)  # fmt: skip
def test_bad_input_is_told_before_a_backbone_runs(
    options: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a backbone was loaded")

    monkeypatch.setattr("hf_transfer.backbones.load_backbone", never)
    sets = {"ratings": tiny.ratings, "words": tiny.tagged_words, "texts": tiny.sentences}
    data = sets[options.pop("dataset", "texts")]()
    with pytest.raises(TransferError, match=says):
        probe(options.pop("models", ["a"]), data, **options)


def test_a_name_that_leads_nowhere_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="nowhere"):
        probe(str(tmp_path / "nowhere"), tiny.sentences(), **CHEAP)
