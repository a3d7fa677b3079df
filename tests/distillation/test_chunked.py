"""Chunks of tokens: the sums are those of one pass, and no tensor is as large as the logits of a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_transfer.anatomy import Anatomy
from hf_transfer.backbones import Backbone
from hf_transfer.distillation.chunked import ChunkedLearner, ChunkedTeacher
from hf_transfer.distillation.language_head import LanguageHead
from hf_transfer.distillation.signal import TeacherSignal, TopLogits
from hf_transfer.distillation.teacher import AdapterOffTeacher, EnsembleTeacher, LiveTeacher
from hf_transfer.errors import TransferError
from hf_transfer.objective import Learner, Objective
from hf_transfer.objectives import (
    CKA,
    DIST,
    DKD,
    JSD,
    L2,
    MSE,
    NKD,
    CrossEntropy,
    Hint,
    LogitMSE,
    LogitStandardization,
    SoftTargets,
)
from hf_transfer.tuning import Peft

WORDS, ROWS, TOKENS = 23, 3, 9
SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def language_model(words: int = WORDS, seed: int = 0, kind: str = "Llama", **options: Any) -> Any:
    """A random float64 model whose logits are far from uniform."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(vocab_size=words, **{**SIZE, **SPECIAL, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def backbone(model: Any) -> Backbone:
    return Backbone(model, None, "text", "causal-lm", type(model).__name__, None, None)


def text_batch(padding: str = "right", rows: int = ROWS, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Prompts of 2, 3 ... tokens without labels; the last row is padded, the first has one token only to learn."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, WORDS - 4, (rows, tokens), generator=draw)
    mask = torch.ones_like(ids)
    padded = slice(tokens - 2, None) if padding == "right" else slice(0, 2)
    mask[-1, padded] = 0
    ids[-1, padded] = 0
    labels = ids.masked_fill(mask == 0, -100)
    for row in range(rows):
        labels[row, : 2 + row] = -100
    labels[0, :-1] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "example_id": torch.arange(rows)}


def dense(teacher: Any, batch: dict[str, Tensor]) -> TeacherSignal:
    with torch.inference_mode():
        return TeacherSignal(teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).logits)


def chunked_signal(teacher: Any, student: Any, batch: dict[str, Tensor]) -> TeacherSignal:
    return ChunkedTeacher(LiveTeacher(backbone(teacher), backbone(student)))(batch)


def taken(learner: Learner, batch: dict[str, Tensor], teacher: Any, **options: Any) -> dict[str, Tensor]:
    """Loss, terms and gradients of one step."""
    learner.train().zero_grad()
    signal = learner(batch, progress=0.4, teacher=teacher, **options)
    signal.loss.backward()
    gradients = {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}
    return {"loss": signal.loss.detach(), **signal.terms, **{k: v.clone() for k, v in gradients.items()}}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def both(
    student: Any, teacher: Any, terms: Callable[[], list[Objective]], chunk_tokens: int, batch: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the chunked and the plain Learner take of one batch."""
    anatomy = Anatomy.of(student)
    chunked = ChunkedLearner(student, terms(), anatomy, chunk_tokens=chunk_tokens)
    found = taken(chunked, batch, chunked_signal(teacher, student, batch))
    return found, taken(Learner(student, terms(), anatomy), batch, dense(teacher, batch))


TERMS: dict[str, Callable[[], list[Objective]]] = {
    "labels": lambda: [CrossEntropy(shift=True, label_smoothing=0.1, weight=0.3)],
    "weighted_labels": lambda: [CrossEntropy(shift=True, class_weights=[0.0] + [1.0, 0.5] * 11)],
    "unshifted": lambda: [CrossEntropy(), SoftTargets(weight=2.0)],
    "soft_targets": lambda: [CrossEntropy(shift=True), SoftTargets(temperature=2.0, shift=True, weight=0.7)],
    "other_terms": lambda: [JSD(shift=True), LogitMSE(shift=True), DKD(shift=True), NKD(shift=True, weight=0.1)],
    "both_reaches": lambda: [SoftTargets(shift=True), SoftTargets(name="here"), CrossEntropy(shift=True)],
    "standardized": lambda: [LogitStandardization(SoftTargets(temperature=2.0, shift=True))],
}


@pytest.mark.parametrize("terms", TERMS)
def test_chunks_sum_to_the_whole(terms: str) -> None:
    student, teacher = language_model(seed=0), language_model(seed=1, hidden_size=24, intermediate_size=8)
    found, expected = both(student, teacher, TERMS[terms], 7, text_batch())
    assert_equal(found, expected)
    assert found["model.model.embed_tokens.weight"].abs().sum() > 0


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("chunk_tokens", [1, 6, 12, 24, 27, 1000])
def test_the_size_of_a_chunk_and_the_side_of_the_padding_do_not_matter(chunk_tokens: int, padding: str) -> None:
    student, teacher = language_model(seed=0), language_model(seed=1)
    found, expected = both(student, teacher, TERMS["soft_targets"], chunk_tokens, text_batch(padding))
    assert_equal(found, expected)


@pytest.mark.parametrize("chunk_tokens", [4, 1000])
def test_the_gradient_is_the_difference_of_the_probabilities(chunk_tokens: int) -> None:
    student, teacher, batch = language_model(seed=0), language_model(seed=1), text_batch()
    learner = ChunkedLearner(
        student, [SoftTargets(temperature=1.0, shift=True)], Anatomy.of(student), chunk_tokens=chunk_tokens
    )
    found = taken(learner, batch, chunked_signal(teacher, student, batch))["model.lm_head.weight"]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        hidden = student.model(**inputs).last_hidden_state  # (N, T, D)
        difference = student(**inputs).logits.softmax(-1) - teacher(**inputs).logits.softmax(-1)  # (N, T, V)
    counts = F.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100  # (N, T): a token is judged by the next one
    expected = torch.einsum("mv,md->vd", difference[counts], hidden[counts]) / counts.sum()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cut", [[3, 3], [1, 4, 1], [1] * 6])
def test_accumulated_micro_batches_give_the_gradients_of_one_batch(cut: list[int]) -> None:
    student, teacher, batch = language_model(seed=0), language_model(seed=1), text_batch(rows=6)
    learner = ChunkedLearner(student, TERMS["soft_targets"](), Anatomy.of(student), chunk_tokens=5).train()
    whole = taken(learner, batch, dense(teacher, batch))
    parts = [{k: v[rows] for k, v in batch.items()} for rows in torch.arange(6).split(cut)]
    counted = [learner.counts(part) for part in parts]
    counts = {name: sum(count[name] for count in counted) for name in counted[0]}
    learner.zero_grad()
    for part in parts:
        signal = chunked_signal(teacher, student, part)
        learner(part, progress=0.4, teacher=signal, counts=counts, micro_batches=len(parts)).loss.backward()
    assert_equal(
        {name: p.grad for name, p in learner.named_parameters()}, {k: v for k, v in whole.items() if "." in k}
    )


def test_the_largest_logits_of_a_cache_are_cut_along_tokens() -> None:
    student, teacher, batch = language_model(seed=0), language_model(seed=1), text_batch()
    logits = dense(teacher, batch).logits
    assert logits is not None
    signal = TeacherSignal(top=TopLogits.of(logits, 4, temperatures=(1.0, 2.0)))
    anatomy = Anatomy.of(student)

    def terms() -> list[Objective]:
        return [SoftTargets(temperature=2.0, shift=True), JSD(shift=True)]

    found = taken(ChunkedLearner(student, terms(), anatomy, chunk_tokens=4), batch, signal)
    assert_equal(found, taken(Learner(student, terms(), anatomy), batch, signal))


@pytest.mark.parametrize("words", [WORDS + 9, WORDS - 3])
def test_vocabularies_of_different_padding_are_compared_in_their_shared_part(words: int) -> None:
    student, teacher, batch = language_model(seed=0), language_model(words, seed=1), text_batch()
    terms = [CrossEntropy(shift=True), SoftTargets(temperature=2.0, shift=True)]
    learner = ChunkedLearner(student, terms, Anatomy.of(student), chunk_tokens=6)
    found = taken(learner, batch, chunked_signal(teacher, student, batch))
    shared = min(words, WORDS)
    logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    counts = labels != -100
    answer = dense(teacher, batch).logits[:, :-1, :shared]
    divergence = 4 * F.kl_div(
        F.log_softmax(logits[..., :shared][counts] / 2, -1), F.softmax(answer[counts] / 2, -1), reduction="batchmean"
    )
    labelled = F.cross_entropy(logits[counts], labels[counts])  # labels are judged over all of the student's words
    student.zero_grad()
    (divergence + labelled).backward()
    expected = {f"model.{name}": p.grad for name, p in student.named_parameters()}
    assert_equal({k: v for k, v in found.items() if k in expected}, expected)
    assert_equal({k: found[k] for k in terms_of(learner)}, {"cross_entropy": labelled, "soft_targets": divergence})


def terms_of(learner: Learner) -> list[str]:
    return [term.name for term in learner.terms()]


def test_the_largest_logits_of_words_that_the_student_lacks_are_refused() -> None:
    student, batch = language_model(), text_batch()
    logits = dense(language_model(WORDS + 2, seed=1), batch).logits
    assert logits is not None
    learner = ChunkedLearner(student, [SoftTargets(1.0, shift=True)], Anatomy.of(student)).train()
    with pytest.raises(TransferError, match="25 words and the student has 23"):
        learner(batch, teacher=TeacherSignal(top=TopLogits.of(logits, 4)))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, (tuple, list)) else (made,):
            if torch.is_tensor(value):
                self.elements = max(self.elements, value.numel())
        return made


@pytest.mark.parametrize("terms", ["soft_targets", "other_terms", "standardized"])
def test_no_tensor_is_larger_than_a_chunks_logits_and_none_waits_for_the_backward_pass(terms: str) -> None:
    words, rows, tokens, width = 1000, 4, 40, 5
    student, teacher = language_model(words), language_model(words, seed=1)
    batch = text_batch(rows=rows, tokens=tokens)
    anatomy = Anatomy.of(student)
    learners = {
        "plain": Learner(student, TERMS[terms](), anatomy),
        "chunked": ChunkedLearner(student, TERMS[terms](), anatomy, chunk_tokens=width * rows),
    }
    largest, kept = dict.fromkeys(learners, 0), dict.fromkeys(learners, 0)
    for kind, learner in learners.items():

        def keep(value: Tensor, kind: str = kind) -> Tensor:
            by_word = value.dim() > 1 and value.shape[-1] == words and value.shape[0] != SIZE["hidden_size"]
            kept[kind] += by_word * value.numel()
            return value

        with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            signal = dense(teacher, batch) if kind == "plain" else chunked_signal(teacher, student, batch)
            taken(learner, batch, signal)
        largest[kind] = seen.elements
    assert largest["plain"] >= rows * tokens * words
    assert largest["chunked"] == rows * (width + 1) * words  # terms look one token ahead
    assert kept["plain"] > 10 * rows * words
    assert kept["chunked"] == 0


HEADS = {
    "Llama": {},
    "GPTNeoX": {},
    "OPT": {"word_embed_proj_dim": 8, "ffn_dim": 16},
    "Gemma2": {"head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 3.0},
    "Cohere": {"num_key_value_heads": 2, "logit_scale": 0.3},
    "Granite": {"num_key_value_heads": 2, "logits_scaling": 7.0},
}


@pytest.mark.parametrize("kind", HEADS)
def test_scales_and_soft_caps_of_a_head_are_the_models_own(kind: str) -> None:
    model, batch = language_model(kind=kind, **HEADS[kind]), text_batch()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    head = LanguageHead(model)
    with torch.no_grad():
        whole = model(**inputs).logits
        with head.held() as held:
            last = model(**inputs).logits
        hidden = head.settle(held, last)
        torch.testing.assert_close(last, whole[:, -1:], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(head(hidden), whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model(**inputs).logits, whole)  # no hook is left
        bare = model.get_output_embeddings()(hidden)
        assert torch.allclose(bare, whole) == (kind not in ("Gemma2", "Cohere", "Granite"))


def test_a_soft_cap_is_found_where_the_first_logits_are_too_small_to_show_it() -> None:
    model, batch = language_model(kind="Gemma2", **{**HEADS["Gemma2"], "final_logit_softcapping": 30.0}), text_batch()
    model.bfloat16()
    head = LanguageHead(model)
    with torch.no_grad(), head.held() as held:
        model.get_output_embeddings().weight.mul_(1e-4)
        last = model(batch["input_ids"]).logits
    hidden = head.settle(held, last)
    assert head(1e6 * hidden).abs().max() <= 30


class Cubed(transformers.LlamaForCausalLM):
    """A head of its own making."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits**3
        return outputs


def test_a_head_that_the_config_does_not_tell_of_is_refused() -> None:
    model, batch = Cubed(language_model().config).double(), text_batch()
    learner = ChunkedLearner(model, [CrossEntropy(shift=True)], Anatomy.of(model)).train()
    with pytest.raises(TransferError, match="Cubed does something to the output of its last layer"):
        learner(batch)


@pytest.mark.parametrize(
    "term",
    [
        DIST(shift=True),
        L2(),
        MSE(),
        LogitStandardization(DIST(shift=True)),
        Hint(layers="features"),
        CKA(layers="last"),
    ],
    ids=lambda term: type(term).__name__,
)
def test_terms_that_need_the_whole_are_refused(term: Objective) -> None:
    student = language_model()
    with pytest.raises(TransferError, match=f"'{term.name}' cannot be computed for a chunk of tokens"):
        ChunkedLearner(student, [CrossEntropy(shift=True), term], Anatomy.of(student))


def test_networks_and_batches_without_tokens_to_predict_are_refused() -> None:
    config = transformers.LlamaConfig(vocab_size=WORDS, num_labels=3, **SIZE, **SPECIAL)
    classifier = transformers.LlamaForSequenceClassification(config)
    with pytest.raises(TransferError, match="LlamaForSequenceClassification gives no logits of each word"):
        ChunkedLearner(classifier, [CrossEntropy()], Anatomy.of(classifier))
    with pytest.raises(TransferError, match="Linear gives no logits of each word"):
        ChunkedLearner(nn.Linear(3, 4), [CrossEntropy()], None)
    student = language_model()
    with pytest.raises(TransferError, match="chunk_tokens must be a whole number from 1, got 0"):
        ChunkedLearner(student, [CrossEntropy(shift=True)], Anatomy.of(student), chunk_tokens=0)
    learner = ChunkedLearner(student, [SoftTargets(shift=True)], Anatomy.of(student)).train()
    batch = text_batch()
    for labels in (None, batch["labels"][:, 1:]):
        with pytest.raises(TransferError, match=r"a label for each of the \(3, 9\) tokens"):
            learner({**batch, "labels": labels}, teacher=dense(student, batch))


def test_teachers_without_one_network_are_refused() -> None:
    student = language_model()
    live = LiveTeacher(backbone(language_model(seed=1)), backbone(student))
    with pytest.raises(TransferError, match="EnsembleTeacher has no one network"):
        ChunkedTeacher(EnsembleTeacher([live, live]))
    with pytest.raises(TransferError, match="compile=True leaves out"):
        ChunkedTeacher(LiveTeacher(backbone(language_model(seed=1)), backbone(student), compile=True))
    teacher = ChunkedTeacher(live)
    assert teacher.fingerprint() == live.fingerprint()
    with pytest.raises(TransferError, match="a term asks for"):
        teacher.watch(["model.norm"])


def test_a_teacher_of_its_own_precision_answers_as_itself_under_autocast() -> None:
    student, teacher, batch = language_model().float(), language_model(seed=1).bfloat16(), text_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        signal = chunked_signal(teacher, student, batch)
        assert signal.head is not None
        found = signal.head(signal.features[:, 2:5])
    torch.testing.assert_close(found, dense(teacher, batch).logits[:, 2:5])
    learner = ChunkedLearner(student, TERMS["soft_targets"](), Anatomy.of(student), chunk_tokens=6)
    plain = Learner(student, TERMS["soft_targets"](), Anatomy.of(student))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunked, whole = (taken(x, batch, y) for x, y in ((learner, signal), (plain, dense(teacher, batch))))
    torch.testing.assert_close(chunked["loss"], whole["loss"], rtol=1e-3, atol=0)


def adapted(head: str) -> Any:
    """A student with a moved adapter, whose head is its own copy or has a LoRA of its own."""
    own = {"modules_to_save": ["lm_head"]} if head == "copied" else {}
    targets = ["q_proj"] if head == "copied" else ["q_proj", "lm_head"]
    model: Any = Peft(peft.LoraConfig(r=2, target_modules=targets, **own)).apply(language_model())
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.mark.parametrize("head", ["copied", "low_rank"])
def test_a_students_own_base_teaches_it_in_chunks(head: str) -> None:
    student, base, batch = adapted(head), language_model(), text_batch()
    teacher = ChunkedTeacher(AdapterOffTeacher(backbone(student)))
    learner = ChunkedLearner(student, TERMS["soft_targets"](), Anatomy.of(student), chunk_tokens=6)
    trains = {name for name, p in learner.named_parameters() if p.requires_grad}
    found = taken(learner, batch, teacher(batch))
    plain = Learner(student, TERMS["soft_targets"](), Anatomy.of(student))
    assert_equal(found, taken(plain, batch, dense(base, batch)))
    assert found["soft_targets"] > 0
    assert trains == {name for name, p in learner.named_parameters() if p.requires_grad}
    assert trains == {name for name in found if "." in name}
    assert any("lm_head" in name for name in trains)


def test_in_evaluation_all_logits_and_the_plain_loss_come_back() -> None:
    student, batch = language_model(), text_batch()
    learner = ChunkedLearner(student, TERMS["soft_targets"](), Anatomy.of(student), chunk_tokens=6).eval()
    signal = learner(batch)
    assert list(signal.terms) == ["cross_entropy"]
    assert signal.outputs.logits.shape == (ROWS, TOKENS, WORDS)
    expected = Learner(student, [CrossEntropy(shift=True)], None).eval()(batch)
    torch.testing.assert_close(signal.loss, expected.loss)


def test_a_batch_with_nothing_to_learn_has_a_gradient_of_zero() -> None:
    student, batch = language_model(), text_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    found = taken(
        ChunkedLearner(student, TERMS["soft_targets"](), Anatomy.of(student), chunk_tokens=6),
        batch,
        dense(student, batch),
    )
    assert found["loss"] == 0
    assert all(not value.any() for value in found.values())
    assert len(found) == 3 + len(list(student.parameters()))


def test_the_model_and_its_state_are_the_plain_learners() -> None:
    student = language_model()
    teacher = copy.deepcopy(student)
    batch = text_batch()
    learner = ChunkedLearner(student, [SoftTargets(shift=True)], Anatomy.of(student)).train()
    learner(batch, teacher=chunked_signal(teacher, student, batch)).loss.backward()
    assert list(learner.state_dict()) == [f"model.{name}" for name in student.state_dict()]
    assert all(p.grad is None for p in teacher.parameters())
    assert not student.lm_head._forward_pre_hooks
    assert not student.lm_head._forward_hooks


def take_share(rank: int, folder: str, batch: dict[str, Tensor]) -> None:
    """One of two processes: two micro-batches of its rows under DDP, synchronised at the second."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    student, teacher = language_model(seed=0), language_model(seed=1)
    learner = ChunkedLearner(student, TERMS["soft_targets"](), Anatomy.of(student), chunk_tokens=5).train()
    counts = {name: count / 2 for name, count in learner.counts(batch).items()}
    wrapped = nn.parallel.DistributedDataParallel(learner)
    for i, row in enumerate((rank, rank + 2)):
        part = {name: value[row : row + 1] for name, value in batch.items()}
        signal = chunked_signal(teacher, student, part)
        with wrapped.no_sync() if i == 0 else nullcontext():
            wrapped(part, progress=0.4, teacher=signal, counts=counts, micro_batches=2).loss.backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in learner.named_parameters()}, f"{folder}/gradients.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_take_the_gradients_of_one(tmp_path: Path) -> None:
    student, teacher, batch = language_model(seed=0), language_model(seed=1), text_batch(rows=4)
    torch.multiprocessing.spawn(take_share, (str(tmp_path), batch), nprocs=2)
    found = torch.load(tmp_path / "gradients.pt")
    plain = taken(Learner(student, TERMS["soft_targets"](), Anatomy.of(student)), batch, dense(teacher, batch))
    assert_equal(found, {name: plain[name] for name in found})
