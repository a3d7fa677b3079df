"""Sequence-level distillation: the student trains on what the teacher writes.

    rows = generate_targets(teacher, prompts, prompt_column="question", max_new_tokens=256)
    rows = rows.filter(lambda row: row["finished"])
    finetune(student, rows, task="causal-lm")

The student needs neither the teacher's tokenizer nor its logits. For students that write themselves and are corrected
by the teacher (on-policy distillation) use TRL's GKDTrainer, which takes rows of prompts too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.columns import DOMAIN, EXAMPLE_ID
from ..data.identity import add_example_id, describe
from ..data.text_transforms import token_limit
from ..errors import TransferError

if TYPE_CHECKING:
    from datasets import Dataset

    from ..backbones import Backbone

logger = logging.getLogger(__name__)


def generate_targets(
    teacher: Backbone,
    prompts: Dataset,
    *,
    prompt_column: str = "prompt",
    max_new_tokens: int = 256,
    batch_size: int = 8,
    seed: int = 0,
    do_sample: bool = False,
    **options: Any,
) -> Dataset:
    """Lets a teacher complete prompts.

    Source: Kim & Rush 2016, "Sequence-Level Knowledge Distillation", arXiv:1606.07947. They take the best of a beam:
    `num_beams=5`.

    Args:
        teacher: A causal language model with its tokenizer, on the device where it is to run.
        prompts: Rows with texts; `tokenizer.apply_chat_template(..., tokenize=False)` makes one of a chat's messages.
            Several processes take `prompts.shard(...)` each.
        prompt_column: Where the texts are.
        max_new_tokens: Most tokens of a completion, from 1.
        batch_size: Prompts that are completed together, from 1.
        seed: Of the sampling; the draws depend on it, the prompts and the batch size, and move no other generator.
        do_sample: Whether to draw the tokens, rather than to take the likeliest.
        **options: For the model's `generate`: num_beams, temperature, top_p, ...

    Returns:
        A row a prompt, in their order: example_id, prompt, completion (without special tokens), finished (False where
        the teacher was cut off by max_new_tokens), and `domain` where the prompts have it.

    Raises:
        TransferError: If the teacher is no causal language model, an argument is out of range, or a prompt is missing
            or too long.
    """
    _check(teacher, prompts, prompt_column, max_new_tokens, batch_size)
    from datasets import Dataset

    prompts = add_example_id(prompts)
    encoded = _encoded(teacher, prompts, prompt_column, max_new_tokens)
    order = sorted(range(len(encoded)), key=lambda row: -len(encoded[row]))  # little padding, the largest batch first
    options = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, **options}
    written: dict[int, list[int]] = {}
    with _generating(teacher.model, seed):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            written.update(zip(rows, _complete(teacher, [encoded[row] for row in rows], options), strict=True))
            logger.debug("%d of %d prompts completed", len(written), len(order))
    ends = _ends(teacher)
    finished = [bool(ends.intersection(written[row])) for row in range(len(prompts))]
    completions = _texts(teacher.processor, [_before(ends, written[row]) for row in range(len(prompts))])
    if not all(finished):
        logger.warning(
            "%d of %d completions were cut off at %d tokens: leave them out, or raise max_new_tokens",
            finished.count(False), len(finished), max_new_tokens,
        )  # fmt: skip
    kept = {name: prompts[name] for name in (EXAMPLE_ID, DOMAIN) if name in prompts.column_names}
    rest = {"prompt": prompts[prompt_column], "completion": completions, "finished": finished}
    return Dataset.from_dict({name: list(column) for name, column in {**kept, **rest}.items()})


def _check(teacher: Backbone, prompts: Dataset, column: str, max_new_tokens: int, batch_size: int) -> None:
    if teacher.task != "causal-lm" or teacher.processor is None:
        missing = "has no tokenizer" if teacher.task == "causal-lm" else f"was made for {teacher.task}"
        raise TransferError(
            f"The teacher {teacher.name!r} {missing}: texts are written by a causal language model with its "
            "tokenizer, load_backbone(..., task='causal-lm')."
        )
    if column not in prompts.column_names:
        columns = ", ".join(prompts.column_names)
        raise TransferError(f"prompt_column={column!r} is no column of the prompts, which have {columns}.")
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise TransferError(f"{name} must be a whole number from 1, got {value!r}.")


def _encoded(teacher: Backbone, prompts: Dataset, column: str, new: int) -> list[list[int]]:
    """Token ids of each prompt, as a student's training reads them."""
    for text, example_id in zip(prompts[column], prompts[EXAMPLE_ID], strict=True):
        if not isinstance(text, str) or not text:
            raise TransferError(
                f"The prompt of {describe(example_id)} is no text but {text!r}. Remove the row, or make a chat's "
                "messages a text by tokenizer.apply_chat_template(..., tokenize=False)."
            )
    encoded = teacher.processor(list(prompts[column]))["input_ids"] if len(prompts) else []
    limit = token_limit(teacher)
    for ids, example_id in zip(encoded, prompts[EXAMPLE_ID], strict=True):
        if limit is not None and len(ids) + new > limit:
            raise TransferError(
                f"The prompt of {describe(example_id)} has {len(ids)} tokens, and with max_new_tokens={new} more "
                f"passes the {limit} that the teacher takes: shorten it, or lower max_new_tokens."
            )
    return encoded


@contextmanager
def _generating(model: Any, seed: int) -> Iterator[None]:
    """The model in eval mode and the random numbers seeded; afterwards both are as they were."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        model.train(training)


def _complete(teacher: Backbone, prompts: Sequence[list[int]], options: dict[str, Any]) -> list[list[int]]:
    """The new tokens of each prompt, with whatever follows an end."""
    model: Any = teacher.model
    ends = _ends(teacher)
    padding = teacher.processor.pad_token_id
    filler = next(iter(ends), 0) if padding is None else padding  # not attended to, so that any will do
    length = max(map(len, prompts))
    ids = torch.tensor([[filler] * (length - len(row)) + row for row in prompts], device=model.device)  # (N, T)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    written: Tensor = model.generate(
        input_ids=ids, attention_mask=mask, pad_token_id=filler, eos_token_id=sorted(ends) or None, **options
    )
    return written[:, length:].tolist()


def _ends(teacher: Backbone) -> set[int]:
    """Tokens that end a text: those of the model's generation_config, else the tokenizer's."""
    model: Any = teacher.model
    ends = model.generation_config.eos_token_id
    ends = teacher.processor.eos_token_id if ends is None else ends
    return set() if ends is None else set(ends if isinstance(ends, list) else [ends])


def _before(ends: set[int], ids: list[int]) -> list[int]:
    """Tokens up to the first end, without it."""
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def _texts(tokenizer: Any, completions: list[list[int]]) -> list[str]:
    """Completions as texts; says how many the tokenizer would not cut into the tokens they were."""
    texts = [
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in completions
    ]
    again = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    changed = sum(a != b for a, b in zip(again, completions, strict=True))
    if changed:
        logger.info("%d of %d completions are cut into other tokens when read again", changed, len(texts))
    return texts
