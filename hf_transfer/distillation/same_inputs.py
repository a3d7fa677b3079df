"""Whether two networks read the same inputs: tokenizers and feature extractors compared by what they do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Case, accents, digits, punctuation, contractions, runs of spaces, scripts: whatever tokenizers of one vocabulary may
# still cut differently.
_TEXTS = ("The naïve Café-owners don't  PAY $1,250.75 today!", "new york", "Ünïcode ΑΒΓ 東京 :-)\n\tend")
_IDENTITY = ("feature_extractor_type", "processor_class", "image_processor_type", "auto_map", "_processor_class")


def difference(student: Any, teacher: Any, modality: str) -> str | None:
    """In what the student's and the teacher's tokenizers or feature extractors differ.

    Args:
        student: The student's tokenizer or extractor.
        teacher: The teacher's.
        modality: "text" or "audio".

    Returns:
        A phrase; None where what one makes is what the other makes.
    """
    if student is teacher:
        return None
    if student is None or teacher is None:
        return f"the {'student' if student is None else 'teacher'} came without one"
    return _of_tokenizers(student, teacher) if modality == "text" else _of_extractors(student, teacher)


def _of_tokenizers(student: Any, teacher: Any) -> str | None:
    own, theirs = student.get_vocab(), teacher.get_vocab()
    if own != theirs:
        return f"their vocabularies differ ({len(own)} and {len(theirs)} tokens)"
    for text in _TEXTS:
        if student(text)["input_ids"] != teacher(text)["input_ids"]:
            return f"they cut {text!r} differently"
    pair, taught = student(*_TEXTS[:2]), teacher(*_TEXTS[:2])
    if pair["input_ids"] != taught["input_ids"]:
        return "they join pairs of texts differently"
    if any(taught.get("token_type_ids", ())):
        marks = pair.get("token_type_ids") or _marks(teacher, pair["input_ids"])
        if marks != taught["token_type_ids"]:
            return "they mark the second text of a pair differently"
    return None


def _of_extractors(student: Any, teacher: Any) -> str | None:
    own, theirs = ({k: v for k, v in x.to_dict().items() if k not in _IDENTITY} for x in (student, teacher))
    names = sorted(name for name in {*own, *theirs} if not _equal(own.get(name), theirs.get(name)))
    return f"they differ in {', '.join(names)}" if names else None


def _equal(a: Any, b: Any) -> bool:
    """Equality of settings, of which some are arrays (filter banks)."""
    import numpy as np

    return np.array_equal(np.asarray(a, dtype=object), np.asarray(b, dtype=object))


def _marks(tokenizer: Any, ids: list[int]) -> list[int] | None:
    """What `second_text` makes of a row."""
    separator = tokenizer.sep_token_id
    row = torch.tensor([ids])
    return None if separator is None else second_text(row, torch.ones_like(row), separator)[0].tolist()


def marks_pairs(tokenizer: Any) -> bool:
    """Whether a tokenizer tells the second text of a pair from the first by `token_type_ids`."""
    return any(tokenizer(*_TEXTS[:2]).get("token_type_ids", ()))


def second_text(ids: Tensor, attention_mask: Tensor, separator: int) -> Tensor:
    """The `token_type_ids` that a tokenizer of BERT's kind gives, for rows whose tokenizer gave none (DistilBERT's).

    Args:
        ids: (N, T).
        attention_mask: (N, T).
        separator: The token that closes each of the two texts.

    Returns:
        (N, T) int64, 1 between the first separator and the second, which is included; else 0.
    """
    closing = ((ids == separator) & attention_mask.bool()).long()  # padding may be the same token
    return ((closing.cumsum(dim=1) - closing) == 1).long() * attention_mask.long()
