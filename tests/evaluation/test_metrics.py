"""The metrics against hand-made cases and scikit-learn, in one call, in batches, across processes, in flat memory."""

from __future__ import annotations

import json
import logging
import math
import pickle
import subprocess
import sys
import textwrap
import tracemalloc

import evaluate
import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from transformers import EvalPrediction, TrainingArguments

from hf_transfer.errors import TransferError
from hf_transfer.evaluation import (
    AUROC,
    Accuracy,
    BalancedAccuracy,
    EntityF1,
    MacroF1,
    MeanSquaredError,
    Pearson,
    Spearman,
    TopKAccuracy,
    check_best_metric,
    compute_metrics_for,
)

# Six rows of three classes; class 2 is never found. By hand: recalls 2/3, 1/2, 0; F1 2/3, 1/2 (precision 1/2), 0.
LABELS = [0, 0, 0, 1, 1, 2]
PREDICTED = [0, 0, 1, 1, 0, 1]
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


@pytest.mark.parametrize(
    ("metric", "predictions", "references", "expected"),
    [
        (Accuracy(), PREDICTED, LABELS, {"accuracy": 3 / 6}),
        (BalancedAccuracy(), PREDICTED, LABELS, {"balanced_accuracy": (2 / 3 + 1 / 2 + 0) / 3}),
        (MacroF1(), PREDICTED, LABELS, {"macro_f1": (2 / 3 + 2 / 5 + 0) / 3}),
        # the label's rank is 1, 2, 3
        (TopKAccuracy(k=2), [[3, 2, 1], [2, 1, 3], [1, 2, 3]], [0, 0, 0], {"top2_accuracy": 2 / 3}),
        (TopKAccuracy(k=1), [[1, 3], [3, 1]], [1, 1], {"top1_accuracy": 1 / 2}),
        # positives 0.8, 0.3 against negatives 0.5, 0.1: 3 of the 4 pairs are in order
        (AUROC(), [0.8, 0.5, 0.3, 0.1], [1, 0, 1, 0], {"auroc": 3 / 4}),
        (AUROC(), [[0.2, 0.8], [0.5, 0.5], [0.7, 0.3], [0.9, 0.1]], [1, 0, 1, 0], {"auroc": 3 / 4}),
        # class 0 perfect (1), class 1: one of two pairs (1/2), class 2: one of two (1/2)
        (AUROC(), [[0.8, 0.1, 0.1], [0.1, 0.3, 0.6], [0.2, 0.4, 0.4]], [0, 1, 2], {"auroc": (1 + 1 / 2 + 1 / 2) / 3}),
        (MeanSquaredError(), [1.0, 2.0, 4.0], [1.0, 3.0, 2.0], {"mse": 5 / 3}),
        (MeanSquaredError(), [[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, 0.0]], {"mse": 16 / 4}),
        (Pearson(), [1.0, 2.0, 3.0], [-1.0, -2.0, -3.0], {"pearson": -1.0}),
        (Pearson(), [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]], [[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]], {"pearson": 0.0}),
        (Spearman(), [1.0, 2.0, 9.0], [1.0, 4.0, 5.0], {"spearman": 1.0}),
    ],
)
def test_hand_made(metric, predictions, references, expected):
    assert metric.compute(predictions=predictions, references=references) == pytest.approx(expected)


def test_entities_are_right_only_as_a_whole():
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    predicted = [["B-PER", "O", "O", "B-LOC"], ["O", "B-PER"]]  # cut short; right; right span of another type
    result = EntityF1().compute(predictions=predicted, references=true)
    assert result == pytest.approx({"entity_precision": 1 / 3, "entity_recall": 1 / 3, "entity_f1": 1 / 3})
    from seqeval.metrics import f1_score

    assert result["entity_f1"] == pytest.approx(f1_score(true, predicted))


def test_unlabelled_rows_do_not_count():
    both = evaluate.combine([Accuracy(), AUROC(), BalancedAccuracy()])
    result = both.compute(predictions=[[2, 1], [1, 2], [1, 2]], references=[0, 1, -100])
    assert result == {"accuracy": 1.0, "auroc": 1.0, "balanced_accuracy": 1.0}
    assert MeanSquaredError().compute(predictions=[1.0, 5.0], references=[2.0, -100.0]) == {"mse": 1.0}
    with pytest.raises(TransferError, match="none of the 2 rows"):
        Accuracy().compute(predictions=[0, 1], references=[-100, -100])


def test_bad_input_has_a_clear_error():
    with pytest.raises(TransferError, match=r"0\.7 is not a class id"):
        Accuracy().compute(predictions=[0.7, 0.2], references=[1, 0])
    with pytest.raises(TransferError, match="k=5 with 2 classes"):
        TopKAccuracy().compute(predictions=[[0.7, 0.2]], references=[1])


def test_one_module_scores_batch_by_batch_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "cache")
    metric = evaluate.combine([Accuracy(), MacroF1()])
    for _ in range(2):  # the second evaluation starts anew
        for label, guess in zip(LABELS, PREDICTED, strict=True):
            metric.add(prediction=guess, reference=label)
        assert metric.compute() == pytest.approx({"accuracy": 3 / 6, "macro_f1": (2 / 3 + 2 / 5) / 3})
    assert list(tmp_path.iterdir()) == []


def test_two_processes_score_all_rows_together(tmp_path):
    # Macro F1 of the halves does not average to that of the whole: rows must meet.
    program = textwrap.dedent("""
        import json, sys
        import evaluate
        from hf_transfer.evaluation import Accuracy, MacroF1
        how, rows = json.loads(sys.argv[1]), json.loads(sys.argv[2])
        metric = evaluate.combine([Accuracy(**how), MacroF1(**how)])
        metric.add_batch(predictions=[guess for _, guess in rows], references=[label for label, _ in rows])
        print(json.dumps(metric.compute()))
    """)
    rows = list(zip(LABELS, PREDICTED, strict=True))
    how = {"num_process": 2, "experiment_id": "gather", "cache_dir": str(tmp_path), "timeout": 300}
    command = [sys.executable, "-c", program, json.dumps({**how, "process_id": 1}), json.dumps(rows[1::2])]
    other = subprocess.Popen(command, stdout=subprocess.PIPE)
    metric = evaluate.combine([Accuracy(**how, process_id=0), MacroF1(**how, process_id=0)])
    metric.add_batch(predictions=PREDICTED[::2], references=LABELS[::2])
    assert metric.compute() == pytest.approx({"accuracy": 3 / 6, "macro_f1": (2 / 3 + 2 / 5) / 3})
    assert json.loads(other.communicate(timeout=120)[0]) == {}
    assert list(tmp_path.rglob("*.arrow")) == []  # nothing stays behind to be mixed into the next evaluation


def test_processes_need_a_name_to_meet_by(tmp_path):
    with pytest.raises(TransferError, match="experiment_id"):
        Accuracy(num_process=2, process_id=0, cache_dir=str(tmp_path))


def _stream(metrics, logits, labels, batch=64, as_tensor=True):
    """What the Trainer does with `batch_eval_metrics=True`."""
    convert = torch.as_tensor if as_tensor else np.asarray
    for start in range(0, len(labels), batch):
        rows = slice(start, start + batch)
        result = metrics(
            EvalPrediction(predictions=convert(logits[rows]), label_ids=convert(labels[rows])),
            compute_result=start + batch >= len(labels),
        )
        assert bool(result) == (start + batch >= len(labels))
    return result


def _classification(rows, classes, seed=0):
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(rows, classes)).astype(np.float32)
    labels = draw.integers(0, classes, size=rows)
    logits[np.arange(rows), labels] += 1.0
    return logits, labels


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("classes", [2, 3, 12])
def test_streaming_equals_sklearn_on_everything(classes, as_tensor):
    logits, labels = _classification(500, classes)
    labels[labels == classes - 1] = 0 if classes == 12 else labels[labels == classes - 1]  # predicted, never true
    labels[::7] = -100
    kept = labels != -100
    true, guess = labels[kept], logits[kept].argmax(axis=1)
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(true, guess),
        "balanced_accuracy": sklearn_metrics.recall_score(true, guess, labels=np.unique(true), average="macro"),
        "macro_f1": sklearn_metrics.f1_score(true, guess, average="macro", zero_division=0),
    }
    if classes > 5:
        expected["top5_accuracy"] = sklearn_metrics.top_k_accuracy_score(
            true, logits[kept], k=5, labels=np.arange(classes)
        )
    probabilities = torch.as_tensor(logits[kept]).double().softmax(dim=1).numpy()
    if classes == 2:
        expected["auroc"] = sklearn_metrics.roc_auc_score(true, probabilities[:, 1])
    if classes == 3:
        expected["auroc"] = sklearn_metrics.roc_auc_score(true, probabilities, multi_class="ovr")
    metrics = compute_metrics_for("image-classification", classes, auroc=True if classes == 3 else None)
    assert _stream(metrics, logits, labels, as_tensor=as_tensor) == pytest.approx(expected, abs=1e-12)


def test_streaming_equals_the_modules():
    logits, labels = _classification(300, 8)
    modules = evaluate.combine([Accuracy(), BalancedAccuracy(), MacroF1(), TopKAccuracy(k=5)])
    expected = modules.compute(predictions=logits, references=labels)
    assert _stream(compute_metrics_for("text-classification", 8), logits, labels) == pytest.approx(expected)


def test_auroc_orders_confident_rows():
    # p(class 0) rounds to 1 in float64 for the first three rows, which would tie; the logits still order them.
    logits = np.array([[100.0, 0, 0], [90.0, 0, 0], [80.0, 0, 0], [0, 9.0, 0], [0, 0, 9.0]])
    metrics = compute_metrics_for("image-classification", 3, auroc=True)
    result = metrics(EvalPrediction(predictions=logits, label_ids=np.array([0, 0, 1, 1, 2])))
    # class 0: all pairs (5 of 6 with ties); class 1, rows 2 and 3 against 0, 1, 4: 2 of 3 and 3 of 3; class 2: all
    assert result["auroc"] == pytest.approx((1 + 5 / 6 + 1) / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_of_equal_logits_the_lower_classes_come_first(dtype):
    logits = torch.zeros(12, 12, dtype=dtype)
    found = compute_metrics_for("image-classification", 12)(
        EvalPrediction(predictions=logits, label_ids=torch.arange(12))
    )
    assert found["accuracy"] == 1 / 12 and found["top5_accuracy"] == 5 / 12
    logits = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)).mul(2).round().to(dtype)  # many ties
    labels = torch.arange(200) % 12
    found = compute_metrics_for("image-classification", 12)(EvalPrediction(predictions=logits, label_ids=labels))
    best = logits.double().sort(dim=1, descending=True, stable=True).indices
    assert found["top5_accuracy"] == pytest.approx(float((best[:, :5] == labels[:, None]).any(1).float().mean()))
    assert found["accuracy"] == pytest.approx(float((best[:, 0] == labels).float().mean()))


def test_one_call_with_everything_and_again():
    logits, labels = _classification(200, 4)
    metrics = compute_metrics_for("audio-classification", ["a", "b", "c", "d"])
    everything = EvalPrediction(predictions=(logits, np.zeros((200, 7))), label_ids=labels)  # logits, hidden states
    first = metrics(everything)
    assert first["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
    assert metrics(everything) == first  # nothing of the first call is left
    metrics(EvalPrediction(predictions=logits, label_ids=labels), compute_result=False)
    metrics.reset()
    assert metrics(everything) == first


def test_memory_does_not_grow_with_the_rows():
    classes, batch = 1000, 500
    draw = np.random.default_rng(0)
    logits = torch.as_tensor(draw.normal(size=(batch, classes)).astype(np.float32))
    labels = torch.as_tensor(draw.integers(0, classes, size=batch))
    metrics = compute_metrics_for("image-classification", classes)
    traced, held = [], []
    tracemalloc.start()
    for step in range(200):  # 100,000 rows
        metrics(EvalPrediction(predictions=logits + step, label_ids=labels), compute_result=False)
        if step in (9, 199):
            traced.append(tracemalloc.get_traced_memory()[0])
            held.append(len(pickle.dumps(metrics)))  # tensors too, which tracemalloc does not see
    tracemalloc.stop()
    assert traced[1] - traced[0] < 10_000  # bytes; the logits alone would be 400 MB
    assert held[1] - held[0] < 100
    assert held[1] < 3 * classes * 8 + 1000
    assert metrics.accumulators[0].true.sum() == 100_000


def test_one_class_only_leaves_auroc_out_with_a_warning(caplog):
    metrics = compute_metrics_for("image-classification", 2)
    with caplog.at_level(logging.WARNING, logger="hf_transfer"):
        result = metrics(EvalPrediction(predictions=np.eye(2), label_ids=np.array([1, 1])))
    assert result["accuracy"] == 0.5
    assert "auroc" not in result
    assert "AUROC is undefined" in caplog.text
    assert AUROC().compute(predictions=[0.1, 0.2], references=[1, 1]) == {}


def test_an_absent_class_leaves_the_mean_with_a_warning(caplog):
    scores = [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1]]
    with caplog.at_level(logging.WARNING, logger="hf_transfer"):
        assert AUROC().compute(predictions=scores, references=[0, 1, 0]) == {"auroc": 1.0}
    assert "class 2 needs rows" in caplog.text


def test_tokens():
    labels = np.array([[-100, 1, 2, 0, -100], [-100, 3, 0, 0, 1]])
    guess = np.array([[3, 1, 2, 0, 1], [0, 3, 4, 0, 3]])  # PER right; LOC too long; PER as LOC
    logits = np.eye(5)[guess]
    metrics = compute_metrics_for("token-classification", TAGS)
    result = _stream(metrics, logits, labels, batch=1)
    expected = {"accuracy": 5 / 7, "entity_precision": 1 / 3, "entity_recall": 1 / 3, "entity_f1": 1 / 3}
    assert result == pytest.approx(expected)


@pytest.mark.parametrize("names", [["NOUN", "VERB", "DET"], ["O", "U-PER", "L-PER"]])
def test_tokens_without_tags_that_seqeval_reads_have_no_entity_f1(names):
    metrics = compute_metrics_for("token-classification", 3, names=names)
    result = metrics(EvalPrediction(predictions=np.eye(3)[[[0, 1, 2]]], label_ids=np.array([[0, 1, -100]])))
    assert result == {"accuracy": 1.0, "balanced_accuracy": 1.0, "macro_f1": 1.0}
    with pytest.raises(TransferError, match="label names"):
        compute_metrics_for("token-classification", 3)


@pytest.mark.parametrize("outputs", [1, 2])
def test_regression(outputs):
    draw = np.random.default_rng(0)
    targets = draw.normal(size=(200, outputs))
    predicted = targets + draw.normal(size=(200, outputs))
    labels = targets[:, 0] if outputs == 1 else targets  # (N,) as a label column gives it
    result = _stream(compute_metrics_for("regression", outputs), predicted, labels)
    modules = evaluate.combine([MeanSquaredError(), Pearson(), Spearman()])
    assert result == pytest.approx(modules.compute(predictions=predicted, references=targets))
    pearson = np.mean([np.corrcoef(targets[:, i], predicted[:, i])[0, 1] for i in range(outputs)])
    ranks = [[column.argsort().argsort() for column in side.T] for side in (targets, predicted)]
    spearman = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks, strict=True)])
    assert result == pytest.approx(
        {"mse": ((targets - predicted) ** 2).mean(), "pearson": pearson, "spearman": spearman}
    )


def test_a_constant_prediction_leaves_the_correlations_out(caplog):
    metrics = compute_metrics_for("regression", 1)
    with caplog.at_level(logging.WARNING, logger="hf_transfer"):
        result = metrics(EvalPrediction(predictions=np.ones((3, 1)), label_ids=np.array([1.0, 2.0, 3.0])))
    assert result == pytest.approx({"mse": 5 / 3})
    assert "Pearson correlation is undefined" in caplog.text


def test_next_tokens():
    # Position t is scored on the token at t + 1; p(right) is 1/2 where labelled, and -100 does not count.
    logits = np.zeros((2, 3, 4))
    logits[:, :, 1] = math.log(3)  # p = 3/6 for token 1, 1/6 for the others
    labels = np.array([[3, 1, 1], [0, 1, -100]])
    result = _stream(compute_metrics_for("causal-lm", None), logits, labels, batch=1)
    assert result == pytest.approx({"accuracy": 1.0, "perplexity": 2.0})


@pytest.mark.parametrize(
    ("arguments", "logits", "labels", "message"),
    [
        (("image-classification", 3), np.full((1, 3), np.nan), [0], "NaN"),
        (("image-classification", 3), np.zeros((1, 3)), [3], "Label 3 is not a class"),
        (("image-classification", 3), np.zeros((1, 4)), [0], "do not fit labels"),
        (("image-classification", 3), np.zeros((1, 3)), [[0.0, 0.5, 0.5]], "one class id"),
        (("regression", 2), np.zeros((4, 1)), [[1.0, 2.0]] * 4, "do not hold 2 number"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, logits, labels, message):
    with pytest.raises(TransferError, match=message):
        compute_metrics_for(*arguments)(EvalPrediction(predictions=logits, label_ids=np.array(labels)))


def test_unknown_task_and_labels_are_refused():
    with pytest.raises(TransferError, match="Unknown task 'segmentation'"):
        compute_metrics_for("segmentation", 3)
    with pytest.raises(TransferError, match="one name for each"):
        compute_metrics_for("image-classification", 3, names=["a", "b"])
    with pytest.raises(TransferError, match="at least one label"):
        compute_metrics_for("image-classification", None)


def test_the_trainer_streams(tmp_path):
    from transformers import Trainer, TrainingArguments

    class Net(torch.nn.Module):
        def forward(self, x, labels=None):
            return {"loss": x.sum() * 0, "logits": x}

    logits, labels = _classification(50, 8)
    rows = [{"x": torch.as_tensor(x), "labels": int(y)} for x, y in zip(logits, labels, strict=True)]
    arguments = TrainingArguments(
        tmp_path, per_device_eval_batch_size=16, batch_eval_metrics=True, report_to="none", use_cpu=True
    )
    metrics = compute_metrics_for("image-classification", 8)
    trainer = Trainer(Net(), arguments, eval_dataset=rows, compute_metrics=metrics)
    for _ in range(2):
        result = trainer.evaluate()
        assert result["eval_accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
        assert result["eval_top5_accuracy"] > result["eval_accuracy"]


def _drawn(task, labels):
    """Predictions and labels of a task, 30 rows of them."""
    draw, classes = np.random.default_rng(0), labels if isinstance(labels, int) else len(labels)
    if task == "regression":
        return draw.normal(size=(30, classes)), draw.normal(size=(30, classes))
    shape = (30,) if task.endswith(("image-classification", "text-classification")) else (30, 6)
    return draw.normal(size=(*shape, classes)), draw.integers(0, classes, size=shape)


TASKS = [
    ("image-classification", 2), ("text-classification", 3), ("image-classification", 7), ("regression", 1),
    ("regression", 2), ("token-classification", TAGS), ("token-classification", ["noun", "verb"]), ("causal-lm", 9),
]  # fmt: skip


@pytest.mark.parametrize(("task", "labels"), TASKS)
def test_names_are_those_of_the_result(task, labels):
    metrics = compute_metrics_for(task, labels)
    predictions, truth = _drawn(task, labels)
    assert metrics.names == list(metrics(EvalPrediction(predictions=predictions, label_ids=truth)))


def test_the_best_model_is_chosen_by_a_metric_that_there_is(tmp_path):
    names = compute_metrics_for("image-classification", ["cat", "dog"]).names

    def check(name, **options):
        options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, **options}
        arguments = TrainingArguments(output_dir=str(tmp_path), metric_for_best_model=name, **options)
        check_best_metric(arguments, names)

    for name in (None, "loss", "eval_loss", *names, "eval_auroc"):
        check(name)
    with pytest.raises(
        TransferError, match=r"'accurracy' is no metric .* did you mean 'accuracy'.*: loss, accuracy, b"
    ):
        check("accurracy")
    with pytest.raises(TransferError, match=r"'f1' is no metric of this task.*macro_f1"):
        check("f1")
    check("f1", eval_strategy="no", load_best_model_at_end=False)  # nothing is evaluated, and nothing chosen


def test_the_worst_model_is_not_kept_for_the_best(tmp_path):
    names = compute_metrics_for("regression", 1).names
    options = {"eval_strategy": "epoch", "load_best_model_at_end": True, "save_strategy": "epoch"}
    arguments = TrainingArguments(output_dir=str(tmp_path), metric_for_best_model="mse", **options)
    assert arguments.greater_is_better  # as the Trainer has it by default
    with pytest.raises(TransferError, match=r"'mse' is better when lower: pass greater_is_better=False"):
        check_best_metric(arguments, names)
    arguments.greater_is_better = False
    check_best_metric(arguments, names)
    check_best_metric(TrainingArguments(str(tmp_path), metric_for_best_model="pearson", **options), names)


def test_streaming_does_not_import_evaluate():
    program = "import sys; from hf_transfer.evaluation import compute_metrics_for as c; c('regression', 1);"
    subprocess.run([sys.executable, "-c", program + "assert 'evaluate' not in sys.modules"], check=True)
