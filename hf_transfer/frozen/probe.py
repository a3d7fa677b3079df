"""probe(): which backbone suits my data? Its features, computed once, under cheap classifiers.

from hf_transfer import probe
report = probe(["timm/resnet18.a1_in1k", "timm/vit_tiny_patch16_224.augreg_in21k"], "uoft-cs/cifar10")
print(report); report.best.name
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.columns import values
from ..errors import TransferError
from ..objective import UNLABELLED
from .classifiers import METHODS, classifier, setting_name
from .probe_report import BackboneProbe, Estimate, ProbeReport
from .scores import h_score, leep, logme
from .selection import best_setting, cross_predictions, fold_numbers, part_numbers, right_under_others_choice

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from ..backbones import Backbone
    from ..data.sources import Data

logger = logging.getLogger(__name__)

Labelled = tuple[np.ndarray, np.ndarray]  # features (N, D) float32, labels (N,) int64


def probe(
    models: str | Path | Backbone | Sequence[str | Path | Backbone],
    dataset: str | Path | Dataset | DatasetDict | Mapping[str, Dataset],
    *,
    methods: Sequence[str] = METHODS,
    folds: int | None = 5,
    image_size: int | None = None,
    max_length: int | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    input_column: str | None = None,
    label_column: str | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> ProbeReport:
    """Ranks backbones for labelled data by what simple classifiers make of their features; nothing is fine-tuned.

    Every judged row is told by a classifier that did not train on it, under a setting that other rows chose. The test
    split is looked at once, at the end, by the best backbone with its best method.

    Args:
        models: Hub ids, folders, timm names or Backbones; or one.
        dataset: As for `finetune`; images, texts or sounds with one class each.
        methods: Of "linear" (16 settings in one pass), "knn", "lda" and "logistic".
        folds: Rows of train are judged by cross-validation in so many folds; None judges the validation split, which
            is held out of train where the data has none.
        image_size: Side of the images in pixels; each backbone's own by default.
        max_length: Tokens a text is cut to; each backbone's own by default.
        max_train_samples: Probe with a seeded, stratified subset of so many training rows.
        max_eval_samples: Look at the first so many rows of validation and test.
        input_column: Column of the inputs; inferred by default.
        label_column: Column of the labels; inferred by default.
        batch_size: Rows a forward pass.
        seed: Of subset, folds, order of rows, and of layers that a checkpoint lacks.

    Returns:
        The ranking.

    Raises:
        TransferError: For bad input. An unknown method or a fault of the data is told before any backbone runs.
    """
    from ..data.sources import load_data

    if isinstance(methods, str) or not methods:
        raise TransferError(f"methods={methods!r}: give a list with some of {', '.join(METHODS)}.")
    for method in methods:
        classifier(method)
    sources = list(models) if isinstance(models, (list, tuple)) else [models]
    if not sources:
        raise TransferError("models=[] is empty: give at least one backbone.")
    data = load_data(
        dataset, input_column=input_column, label_column=label_column, max_train_samples=max_train_samples,
        max_eval_samples=max_eval_samples, validation=0.1 if folds is None else 0.0, seed=seed,
    )  # fmt: skip
    _check_data(data, folds, seed)
    setup = _Setup(data, tuple(dict.fromkeys(methods)), folds, image_size, max_length, batch_size, seed)
    found: list[BackboneProbe] = []
    best: _Probed | None = None  # the one whose network and features are needed again
    for source in sources:
        one = setup.probed(source)
        logger.info("%s: %s %s", one.probe.name, one.probe.method, one.probe.accuracy[one.probe.method])
        found.append(one.probe)
        best = one if best is None or one.probe.rows_right > best.probe.rows_right else best
    assert best is not None  # there is at least one source
    return ProbeReport(
        data=data.name,
        judged=setup.judged(len(best.labels)),
        majority=float(np.bincount(best.labels).max() / len(best.labels)),
        backbones=tuple(sorted(found, key=lambda each: each.rows_right, reverse=True)),
        test=setup.test(best) if "test" in data.splits else None,
    )


def _check_data(data: Data, folds: int | None, seed: int) -> None:
    """Whether there are classes to tell apart, and rows enough for the folds."""
    task = data.columns.task
    if data.labels is None or task == "token-classification":
        raise TransferError(
            f"The data is for {task}, and a probe tells one class a row: pass images, texts or sounds with a class."
        )
    if len(data.labels) < 2:
        raise TransferError(f"The data has one class, {data.labels}: there is nothing to tell apart.")
    labels = np.asarray(values(data.splits["train"], str(data.columns.label)))
    if folds is not None:
        fold_numbers(labels[labels != UNLABELLED], folds, seed)


@dataclass(frozen=True)
class _Probed:
    """A backbone's results, and what the test split needs if it is the best.

    Attributes:
        probe: The results.
        labels: (N,) of the judged rows.
        setting: Number of the chosen setting of the best method.
        backbone: The network.
        train: Its features of the training rows.
    """

    probe: BackboneProbe
    labels: np.ndarray
    setting: int
    backbone: Backbone
    train: Labelled


@dataclass(frozen=True)
class _Setup:
    """What all backbones of a probe share."""

    data: Data
    methods: tuple[str, ...]
    folds: int | None
    image_size: int | None
    max_length: int | None
    batch_size: int
    seed: int

    @property
    def classes(self) -> int:
        return len(self.data.labels or ())

    def judged(self, rows: int) -> str:
        """On which rows, and how, in words."""
        if self.folds is None:
            return f"{rows} validation rows ({self.data.selection})"
        return f"{self.folds}-fold cross-validation on {rows} train rows"

    def probed(self, source: Any) -> _Probed:
        """All of one backbone but its test."""
        from ..runs import shown

        started = time.perf_counter()
        backbone = self._backbone(source)
        train, source_probabilities = self._features(backbone, "train")
        held_out = None if self.folds is not None else self._features(backbone, "validation")[0]
        extracted = time.perf_counter()
        right, settings, labels = self._judge(train, held_out)
        result = BackboneProbe(
            name=shown(source),
            width=train[0].shape[1],
            right=right,
            settings={method: setting_name(method, setting) for method, setting in settings.items()},
            logme=logme(*train),
            h_score=h_score(*train),
            leep=None if source_probabilities is None else leep(source_probabilities, train[1]),
            seconds={"extract": extracted - started, "probe": time.perf_counter() - extracted},
        )
        return _Probed(result, labels, settings[result.method], backbone, train)

    def test(self, best: _Probed) -> Estimate:
        """The best backbone's best method, trained on all training rows, on the test split."""
        unseen, labels = self._features(best.backbone, "test")[0]
        told = classifier(best.probe.method)(*best.train, unseen, self.classes, self.seed)[best.setting]
        return Estimate.of(told == labels)

    def _judge(
        self, train: Labelled, held_out: Labelled | None
    ) -> tuple[dict[str, np.ndarray], dict[str, int], np.ndarray]:
        """By method: whether each judged row was told right, and the chosen setting; and the judged rows' labels."""
        x, y = train
        labels = y if held_out is None else held_out[1]
        part_of = (
            part_numbers(len(labels), self.seed) if self.folds is None else fold_numbers(y, self.folds, self.seed)
        )
        right, settings = {}, {}
        for method in self.methods:
            if held_out is None:
                told = cross_predictions(method, x, y, part_of, self.classes, self.seed)
            else:
                told = classifier(method)(x, y, held_out[0], self.classes, self.seed)
            right[method] = right_under_others_choice(told == labels, part_of)
            settings[method] = best_setting(told == labels)
        return right, settings, labels

    def _features(self, backbone: Backbone, split: str) -> tuple[Labelled, np.ndarray | None]:
        """Features and labels of a split's labelled rows, and what the backbone's own classes say of them."""
        from ..data.transforms import prepare
        from .features import extract

        reader = replace(backbone, labels=self.data.labels)  # its own head has other classes than the data
        rows = prepare(
            self.data.splits[split], reader, self.data.columns, train=False, image_size=self.image_size,
            max_length=self.max_length, seed=self.seed,
        )  # fmt: skip
        found = extract(reader, rows, batch_size=self.batch_size)
        assert found.labels is not None  # load_data() leaves splits without labels out
        kept = found.labels != UNLABELLED
        features = found.x[kept].numpy(), found.labels[kept].numpy()
        if not torch.isfinite(found.x).all():
            raise TransferError(f"{backbone.name!r} gives features of {split} that are not finite numbers.")
        return features, found.logits[kept].double().softmax(-1).numpy() if _has_own_classes(backbone) else None

    def _backbone(self, source: Any) -> Backbone:
        """The network with the head that it came with."""
        from transformers import set_seed

        from ..backbones import Backbone, load_backbone

        set_seed(self.seed)  # layers that the checkpoint lacks are drawn at random
        backbone = source
        if not isinstance(source, Backbone):
            options: dict[str, Any] = {"task": self.data.columns.task, "image_size": self.image_size}
            try:
                backbone = load_backbone(source, **options)
            except TransferError:  # a checkpoint without a head needs one; any other fault is raised again
                backbone = load_backbone(source, labels=self.data.labels, **options)
        if backbone.task == "regression":
            backbone = replace(backbone, task=self.data.columns.task)
        behind = [name for name in _new_parameters(backbone) if not _in_classifier(backbone, name)]
        if behind:
            logger.warning(
                "%s: its checkpoint lacks %s; the features went through random weights there.", backbone.name, behind
            )
        return backbone


def _new_parameters(backbone: Backbone) -> list[str]:
    """Parameters behind the last block that the checkpoint lacks."""
    from ..anatomy import plain_model

    plain: Any = plain_model(backbone.model)
    fresh = () if getattr(plain, "was_trained", False) else getattr(plain, "fresh_parameters", ())
    return [name for name in fresh if backbone.anatomy.group(name) > backbone.anatomy.depth]


def _in_classifier(backbone: Backbone, name: str) -> bool:
    return any(f"{name}.".startswith(f"{layer}.") for layer in backbone.anatomy.classifiers)


def _has_own_classes(backbone: Backbone) -> bool:
    """Whether the backbone has a trained head with classes, which LEEP reads."""
    config: Any = backbone.model.config
    return backbone.outputs > 1 and config.problem_type != "regression" and not _new_parameters(backbone)
