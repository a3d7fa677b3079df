"""What a teacher writes: the likeliest tokens, whatever stands beside them in a batch, as rows a student trains on."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_runs import tokenizer
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM

from hf_transfer.backbones import Backbone
from hf_transfer.data.columns import infer
from hf_transfer.data.transforms import prepare
from hf_transfer.distillation.generation import generate_targets
from hf_transfer.errors import TransferError

PROMPTS = ["the film", "a great new actor was not fine and the plot", "dull", "poor york", "a"]
END = 3


def teacher(end_bias: float = 0.0) -> Backbone:
    """A random float64 language model of 18 words; a bias makes the end likelier."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": END}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=18, max_position_embeddings=24, **size, **special)).double().eval()
    model.lm_head = torch.nn.Linear(16, 18).double()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        model.lm_head.bias.zero_()
        model.lm_head.bias[:3] = -1e3  # words only, and the end
        model.lm_head.bias[END] = end_bias
    reader = tokenizer()
    reader.backend_tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 2)])
    return Backbone(model, reader, "text", "causal-lm", "tiny", None, None)


def likeliest(backbone: Backbone, prompt: str, new: int) -> tuple[str, bool]:
    """One token after another, alone and without a cache."""
    ids = backbone.processor(prompt)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + new and (len(ids) == start or ids[-1] != END):
            ids.append(int(backbone.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return backbone.processor.decode(ids[start:], skip_special_tokens=True), ids[-1] == END


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("end_bias", [0.0, 2.0])
def test_greedy_completions_are_the_likeliest_tokens_in_the_prompts_order(batch_size: int, end_bias: float) -> None:
    backbone = teacher(end_bias)
    rows = generate_targets(backbone, Dataset.from_dict({"prompt": PROMPTS}), max_new_tokens=5, batch_size=batch_size)
    assert rows.column_names == ["example_id", "prompt", "completion", "finished"]
    assert rows["prompt"][:] == PROMPTS
    expected = [likeliest(backbone, prompt, 5) for prompt in PROMPTS]
    assert list(zip(rows["completion"], rows["finished"], strict=True)) == expected
    assert len({text for text, _ in expected}) > 2


def test_some_teachers_end_and_some_are_cut_off() -> None:
    def finished(bias: float) -> list[bool]:
        return generate_targets(teacher(bias), Dataset.from_dict({"prompt": PROMPTS}), max_new_tokens=5)["finished"][:]

    assert not any(finished(-1e3))
    assert all(finished(1e3))


def test_completions_that_were_cut_off_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_transfer"):
        generate_targets(teacher(-1e3), Dataset.from_dict({"prompt": PROMPTS}), max_new_tokens=2)
    assert "5 of 5 completions were cut off at 2 tokens" in caplog.text


def test_sampling_depends_on_its_seed_only_and_moves_no_other_generator() -> None:
    def drawn(seed: int) -> list[str]:
        rows = generate_targets(
            backbone, prompts, max_new_tokens=6, batch_size=2, seed=seed, do_sample=True, temperature=5.0
        )
        return rows["completion"][:]

    backbone, prompts = teacher(-1e3), Dataset.from_dict({"prompt": PROMPTS})
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = drawn(0)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert drawn(0) == first
    assert drawn(1) != first


def test_a_student_trains_on_the_completions_and_not_on_the_prompts() -> None:
    backbone = teacher(2.0)
    prompts = Dataset.from_dict({"question": PROMPTS, "example_id": [7, 5, 3, 1, 0], "domain": [0, 1, 0, 1, 0]})
    rows = generate_targets(backbone, prompts, prompt_column="question", max_new_tokens=4)
    assert rows["example_id"][:] == [7, 5, 3, 1, 0]
    assert rows["domain"][:] == [0, 1, 0, 1, 0]
    prepared = prepare(rows, backbone, infer(rows, task="causal-lm"), train=True)
    for row, made in zip(prepared, rows, strict=True):
        prompt = backbone.processor(made["prompt"])["input_ids"]
        completion = backbone.processor(made["completion"], add_special_tokens=False)["input_ids"]
        assert row["input_ids"] == [*prompt, *completion, END]
        assert row["labels"] == [-100] * len(prompt) + [*completion, END]


def test_the_teachers_mode_comes_back_and_its_tokenizer_is_left_alone() -> None:
    backbone: Any = teacher()
    backbone.model.train()
    backbone.processor.pad_token = None
    backbone.processor.padding_side = "right"
    rows = generate_targets(backbone, Dataset.from_dict({"prompt": PROMPTS}), max_new_tokens=3)
    assert backbone.model.training
    assert (backbone.processor.pad_token, backbone.processor.padding_side) == (None, "right")
    assert rows["completion"][:] == [likeliest(teacher(), prompt, 3)[0] for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ({"text": ["a"]}, {}, "prompt_column='prompt' is no column of the prompts, which have text"),
        ({"prompt": ["a", None]}, {}, "The prompt of train row 1 .* is no text but None"),
        ({"prompt": ["a", ""]}, {}, "The prompt of train row 1 .* is no text but ''"),
        ({"prompt": [[{"role": "user", "content": "a"}]]}, {}, "apply_chat_template"),
        ({"prompt": ["a"]}, {"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1, got 0"),
        ({"prompt": ["a"]}, {"batch_size": 0}, "batch_size must be a whole number from 1, got 0"),
        ({"prompt": ["a", "a " * 19]}, {"max_new_tokens": 5}, "train row 1 .* has 20 tokens, .* passes the 24"),
    ],
)
def test_bad_prompts_are_refused(rows: dict, options: dict, message: str) -> None:
    with pytest.raises(TransferError, match=message):
        generate_targets(teacher(), Dataset.from_dict(rows), **{"max_new_tokens": 2, **options})


def test_other_teachers_are_refused() -> None:
    prompts = Dataset.from_dict({"prompt": PROMPTS})
    model: Any = teacher().model
    classifier = Backbone(model, tokenizer(), "text", "text-classification", "tiny", ["x", "y"], None)
    with pytest.raises(TransferError, match="was made for text-classification"):
        generate_targets(classifier, prompts)
    with pytest.raises(TransferError, match="has no tokenizer"):
        generate_targets(Backbone(model, None, "text", "causal-lm", "tiny", None, None), prompts)
