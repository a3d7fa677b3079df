"""Text and words to token ids, with a label a row, a label a word, or the text itself as its label."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..errors import TransferError
from .columns import DOMAIN, EXAMPLE_ID, LABELS, Columns
from .labels import UNLABELLED

if TYPE_CHECKING:
    from datasets import Dataset

    from ..backbones import Backbone

logger = logging.getLogger(__name__)

_UNLIMITED = 10**6  # tokenizers without a limit write a number beyond this


def tokenise(dataset: Dataset, backbone: Backbone, columns: Columns, *, max_length: int | None = None) -> Dataset:
    """Token ids for each row, cut to a length; not padded, which the collator does by batch.

    Args:
        dataset: Rows with the input, and `labels`, `domain`, `example_id` as they have them.
        backbone: Its tokenizer, and the number of positions it knows.
        columns: What the columns mean.
        max_length: Tokens kept, special ones included; as many as the backbone takes by default.

    Returns:
        Rows of the tokenizer's inputs with the contract's columns. Word labels become one label a token: the word's on
        its first token, -100 on the others and on special tokens. In language modelling the labels are the tokens,
        and -100 on a prompt.

    Raises:
        TransferError: If max_length is out of range, or the tokenizer cannot take words.
    """
    tokenizer = backbone.processor
    limit = token_limit(backbone)
    if max_length is not None and not 3 <= max_length <= (limit or max_length):
        raise TransferError(f"max_length={max_length}: valid are 3 to {limit or 'any'} tokens, which the model takes.")
    length = max_length or limit
    if columns.modality == "tokens":
        encode: Any = Words(tokenizer, columns.input, length)
    elif columns.label is None:
        encode = Continuations(tokenizer, columns.input, columns.pair, length)
    else:
        encode = Texts(tokenizer, columns.input, columns.pair, length)
    kept = {EXAMPLE_ID, DOMAIN, *(() if columns.modality == "tokens" else (LABELS,))}
    removed = [name for name in dataset.column_names if name not in kept]
    encoded = dataset.map(encode, batched=True, remove_columns=removed, desc="tokenising")
    if columns.modality == "tokens" and LABELS in encoded.column_names:
        _warn_of_cut_words(dataset, encoded, length)
    return encoded


def token_limit(backbone: Backbone) -> int | None:
    """The most tokens a backbone takes: the smaller of what its tokenizer and its config say; None if neither does."""
    config = backbone.model.config
    limits = [backbone.processor.model_max_length]
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        # RoBERTa and its descendants number positions from padding_idx + 1, and count those in the table's size
        offset = "roberta" in config.model_type or config.model_type in ("camembert", "mpnet", "longformer", "luke")
        limits.append(positions - (config.pad_token_id + 1 if offset and config.pad_token_id is not None else 0))
    known = [limit for limit in limits if 0 < limit < _UNLIMITED]
    return int(min(known)) if known else None


class Texts:
    """Texts, or pairs of texts, to token ids."""

    def __init__(self, tokenizer: Any, text: str, pair: str | None, length: int | None) -> None:
        self.tokenizer, self.text, self.pair, self.length = tokenizer, text, pair, length

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [_present(text, i) for text, i in zip(batch[self.text], batch[EXAMPLE_ID], strict=True)]
        pairs = batch[self.pair] if self.pair is not None else None
        return dict(self.tokenizer(texts, pairs, truncation=self.length is not None, max_length=self.length))


class Words:
    """Lists of words to token ids; word labels to token labels."""

    def __init__(self, tokenizer: Any, words: str, length: int | None) -> None:
        if not tokenizer.is_fast:
            raise TransferError(
                f"{type(tokenizer).__name__} cannot tell which word a token is of: load a fast tokenizer."
            )
        self.tokenizer, self.words, self.length = tokenizer, words, length
        self.prefix = word_prefix(tokenizer)

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        rows = [[self.prefix + word for word in words] for words in batch[self.words]]
        encoded = self.tokenizer(
            rows, is_split_into_words=True, truncation=self.length is not None, max_length=self.length
        )
        result = dict(encoded)
        if LABELS in batch:
            result[LABELS] = [token_labels(encoded.word_ids(i), labels) for i, labels in enumerate(batch[LABELS])]
        return result


class Continuations:
    """Texts, or prompts with completions, for language modelling; an end token closes each."""

    def __init__(self, tokenizer: Any, text: str, completion: str | None, length: int | None) -> None:
        self.tokenizer, self.text, self.completion, self.length = tokenizer, text, completion, length

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        ids, labels = [], []
        for i, text in enumerate(batch[self.text]):
            prompt = self.tokenizer(_present(text, batch[EXAMPLE_ID][i]))["input_ids"]
            rest: list[int] = []
            if self.completion is not None:
                rest = self.tokenizer(batch[self.completion][i], add_special_tokens=False)["input_ids"]
            end = self.tokenizer.eos_token_id
            whole = prompt + rest
            if end is not None and whole[-1:] != [end]:
                whole = [*whole, end]
            hidden = len(prompt) if self.completion is not None else 0
            ids.append(whole[: self.length])
            labels.append(([UNLABELLED] * hidden + whole[hidden:])[: self.length])
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], LABELS: labels}


def word_prefix(tokenizer: Any) -> str:
    """What to write before each word of a list so that it is cut as within a text: nothing, or a space.

    Byte-level tokenizers mark the start of a word by its space, which a list of words lacks: they would read
    ["New", "York"] as "NewYork", and say nothing.

    Raises:
        TransferError: If neither serves.
    """
    for prefix in ("", " "):
        words = tokenizer([f"{prefix}a", f"{prefix}a"], is_split_into_words=True)["input_ids"]
        if words == tokenizer(f"{prefix}a a")["input_ids"]:
            return prefix
    raise TransferError(
        f"{type(tokenizer).__name__} cuts a list of words otherwise than their text. Load it with "
        "add_prefix_space=True, or use another backbone."
    )


def token_labels(word_ids: list[int | None], labels: list[int]) -> list[int]:
    """One label a token from one a word: on the first token of each word, -100 elsewhere.

    Args:
        word_ids: (T,) the word each token is of; None for special tokens.
        labels: (W,) the words' labels.
    """
    previous: list[int | None] = [None, *word_ids][:-1]
    return [
        UNLABELLED if word is None or word == before else labels[word]
        for word, before in zip(word_ids, previous, strict=True)
    ]


def _present(text: str | None, example_id: int) -> str:
    from .identity import describe

    if text is None:
        raise TransferError(f"No text in {describe(example_id)}: remove that row, or give it a text.")
    return text


def _warn_of_cut_words(before: Dataset, after: Dataset, length: int | None) -> None:
    """Words beyond the length are neither trained on nor scored: say how many."""
    words = sum(map(len, before[LABELS]))
    seen = sum(label != UNLABELLED for row in after[LABELS] for label in row)
    unlabelled = sum(label == UNLABELLED for row in before[LABELS] for label in row)
    if (lost := words - unlabelled - seen) > 0:
        logger.warning(
            "%d of %d words have no label: they lie beyond %s tokens, or the tokenizer gives them none", lost, words,
            length,
        )  # fmt: skip
