"""The teacher's classes in the student's order: mended by name, or refused."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_transfer.backbones import Backbone
from hf_transfer.distillation.label_map import class_map
from hf_transfer.errors import TransferError


def backbone(labels: list[str] | int | None, task: str = "image-classification", processor: Any = None) -> Backbone:
    """A network of which only the labels are looked at."""
    outputs = labels if isinstance(labels, int) else len(labels or [])
    text = SimpleNamespace(vocab_size=outputs)
    config = SimpleNamespace(num_labels=outputs, get_text_config=lambda: text)
    names = None if isinstance(labels, int) else labels
    model: Any = SimpleNamespace(config=config)
    return Backbone(model, processor, "text" if task == "causal-lm" else "image", task, "some/net", names, None)


def test_equal_labels_pass_the_tensor_itself() -> None:
    logits = torch.rand(2, 3)
    assert class_map(backbone(["a", "b", "c"]), backbone(["a", "b", "c"]))(logits) is logits


def test_a_permutation_is_mended_and_logged(caplog) -> None:
    with caplog.at_level(logging.INFO, "hf_transfer"):
        mapped = class_map(backbone(["cat", "dog", "eel"]), backbone(["eel", "cat", "dog"]))
    torch.testing.assert_close(mapped(torch.tensor([[3.0, 1.0, 2.0]])), torch.tensor([[1.0, 2.0, 3.0]]))
    assert "matched by name, cat, dog, eel" in caplog.text


def test_spelling_in_capitals_is_the_same_name_unless_that_is_ambiguous() -> None:
    mapped = class_map(backbone(["negative", "positive"]), backbone(["POSITIVE", "NEGATIVE"]))
    assert mapped.index is not None
    assert mapped.index.tolist() == [1, 0]
    with pytest.raises(TransferError, match="does not know the student's classes a"):
        class_map(backbone(["a", "b", "c"]), backbone(["A", "A ", "b"]))


def test_classes_that_only_the_teacher_knows_are_cut(caplog) -> None:
    with caplog.at_level(logging.INFO, "hf_transfer"):
        mapped = class_map(backbone(["dog", "cat"]), backbone(["cat", "bat", "dog", "owl"]))
    assert mapped(torch.tensor([[0.0, 1.0, 2.0, 3.0]])).tolist() == [[2.0, 0.0]]
    assert "learns 2 of the teacher's 4 classes, without bat, owl" in caplog.text
    first = class_map(backbone(["cat", "bat"]), backbone(["cat", "bat", "dog"]))
    assert first(torch.tensor([[0.0, 1.0, 2.0]])).tolist() == [[0.0, 1.0]]


def test_classes_that_the_teacher_lacks_are_refused_by_name() -> None:
    with pytest.raises(TransferError, match="does not know the student's classes fox: its are cat, dog"):
        class_map(backbone(["cat", "fox"]), backbone(["cat", "dog"]))
    with pytest.raises(TransferError, match=r"2 classes and the student 3.*it lacks fox"):
        class_map(backbone(["cat", "dog", "fox"]), backbone(["cat", "dog"]))


def test_a_name_that_stands_for_two_classes_of_the_teacher_is_refused() -> None:
    with pytest.raises(TransferError, match="it lacks crane"):
        class_map(backbone(["crane", "owl"]), backbone(["crane", "owl", "crane"]))


def test_nameless_classes_are_kept_with_a_warning_if_as_many(caplog) -> None:
    logits = torch.rand(2, 3)
    for own in (3, ["0", "1", "2"]):
        caplog.clear()
        assert class_map(backbone(own), backbone(3))(logits) is logits
        assert "taken to be in the same order" in caplog.text
    with pytest.raises(TransferError, match="has 4 classes and the student 3"):
        class_map(backbone(3), backbone(4))


def test_names_on_one_side_only_are_refused_with_the_fix() -> None:
    with pytest.raises(TransferError, match=r"The teacher does not name its 2 classes.*labels=\[...\]"):
        class_map(backbone(["cat", "dog"]), backbone(2))
    with pytest.raises(TransferError, match="The student does not name"):
        class_map(backbone(2), backbone(["cat", "dog"]))


def test_a_regression_needs_no_names_for_one_number_and_as_many_for_several(caplog) -> None:
    logits = torch.rand(2, 1)
    assert class_map(backbone(["score"], "regression"), backbone(1, "regression"))(logits) is logits
    assert not caplog.text
    with pytest.raises(TransferError, match="has 1 classes and the student 2"):
        class_map(backbone(2, "regression"), backbone(1, "regression"))


def test_logits_of_another_number_than_the_configuration_says_are_refused() -> None:
    mapped = class_map(backbone(["a", "b"]), backbone(["b", "a"]))
    with pytest.raises(TransferError, match="gave 3 logits where its configuration says 2"):
        mapped(torch.rand(1, 3))


def test_padding_of_vocabularies_is_cut_to_the_shared_part() -> None:
    tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 6})
    for theirs, own in ((9, 8), (8, 9)):
        mapped = class_map(backbone(own, "causal-lm", tokenizer), backbone(theirs, "causal-lm"))
        assert mapped.width == 8
        assert mapped(torch.arange(float(theirs))).tolist() == list(range(8))
    with pytest.raises(TransferError, match="7 tokens, and the student has logits for 8, the teacher for 6"):
        class_map(backbone(8, "causal-lm", tokenizer), backbone(6, "causal-lm"))
