"""A teacher's cache is written in batches that suit the machine, and holds what a direct forward pass gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_runs
import torch
from distillation.language_rows import WORDS, language_backbone, language_rows, language_trainer
from torch import Tensor, nn

from hf_transfer import Backbone, DistillationConfig, DistillationTrainer, batch_sizes, load_backbone, load_data
from hf_transfer.data.collate import collator_for
from hf_transfer.data.transforms import prepare
from hf_transfer.distillation.adapter_off import AdapterOffTeacher
from hf_transfer.distillation.cache_batches import CacheBatches
from hf_transfer.distillation.ensemble import EnsembleTeacher
from hf_transfer.distillation.live import LiveTeacher
from hf_transfer.objective import logits_of
from hf_transfer.tuning import LoRA

CLASSES = ["0", "1", "2"]
USUAL = 7  # rows of a batch of an evaluation
MAP = 32 * 16 * 16 * 4  # bytes of test_resnet's largest output at 32 px
HALF = {"rtol": 1e-3, "atol": 1e-3}  # kept in half precision


def network(seed: int, side: int = 32) -> Backbone:
    torch.manual_seed(seed)
    return load_backbone("test_resnet", labels=CLASSES, pretrained=False, image_size=side, in_chans=1)


@pytest.fixture(scope="module")
def digits() -> Any:
    return load_data(tiny_runs.digits(train=50, classes=CLASSES), seed=0)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> tuple[Callable[[], Backbone], Any]:
    folder = tiny_runs.text_backbone(tmp_path_factory.mktemp("bert"))
    torch.manual_seed(0)
    data = load_data(tiny_runs.sentences(50), seed=0)
    return lambda: load_backbone(folder, labels=data.labels), data


def make(folder: Path, data: Any, student: Backbone, teacher: Any, augment: str = "none") -> DistillationTrainer:
    rows = prepare(data.splits["train"], student, data.columns, train=True, augment=augment)
    args = DistillationConfig(
        output_dir=str(folder / "run"), per_device_train_batch_size=10, per_device_eval_batch_size=USUAL, max_steps=1,
        use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", teacher_cache="always",
        teacher_cache_dir=str(folder / "caches"),
    )  # fmt: skip
    return DistillationTrainer(student, teacher, None, args, train_dataset=rows, data_collator=collator_for(student))


class Watched:
    """Batches that a network runs, and the inputs of each."""

    def __init__(self, model: Any) -> None:
        self.inputs: list[dict[str, Any]] = []
        model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.inputs.append(kwargs)

    @property
    def sizes(self) -> list[int]:
        return [len(next(iter(inputs.values()))) for inputs in self.inputs]


def written(trainer: DistillationTrainer, *networks: Backbone) -> tuple[Any, list[Watched]]:
    """The cache that a trainer writes, and what of its writing each network ran."""
    chosen = trainer._cache_batches()
    watched = [Watched(each.model) for each in networks]
    cache = trainer._write_cache(trainer._cache_folder(trainer._cache_key(1)), trainer._cache_key(1), chosen)
    return cache, watched


def answers(trainer: DistillationTrainer, answer: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
    """example_ids and what is said of each row alone, (R,) and (R, C)."""
    batches = [trainer.batch_of([row]) for row in range(len(trainer.train_dataset))]
    with torch.inference_mode():
        return torch.cat([batch["example_id"] for batch in batches]), torch.cat([answer(batch) for batch in batches])


def test_images_run_so_many_at_a_time_that_no_output_is_large(
    tmp_path: Path, digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = network(1)
    trainer = make(tmp_path, digits, network(2), teacher)
    monkeypatch.setattr(batch_sizes, "_LARGEST", 3 * MAP + 1)
    cache, (watched,) = written(trainer, teacher)
    rows = len(cache.example_ids)
    assert watched.sizes == [3] * (rows // 3) + [rows % 3] * (rows % 3 > 0)
    ids, direct = answers(trainer, lambda batch: teacher.model(pixel_values=batch["pixel_values"]).logits)
    torch.testing.assert_close(cache.signal(ids, 0).logits.float(), direct, **HALF)


def test_a_bridged_teacher_is_measured_on_its_own_images(
    tmp_path: Path, digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = network(1, side=64)  # four times as large
    trainer = make(tmp_path, digits, network(2), teacher)
    monkeypatch.setattr(batch_sizes, "_LARGEST", 8 * MAP)
    cache, (watched,) = written(trainer, teacher)
    assert max(watched.sizes) == 2 and watched.inputs[0]["pixel_values"].shape[-1] == 64
    ids, direct = answers(trainer, lambda batch: trainer.teacher(batch).logits)
    torch.testing.assert_close(cache.signal(ids, 0).logits.float(), direct, **HALF)


def test_an_ensembles_largest_network_counts(tmp_path: Path, digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teachers = network(2), [network(1), network(3, side=64)]
    ensemble = EnsembleTeacher([LiveTeacher(teacher, student) for teacher in teachers])
    trainer = make(tmp_path, digits, student, ensemble)
    monkeypatch.setattr(batch_sizes, "_LARGEST", 8 * MAP)
    cache, watched = written(trainer, *teachers)
    assert [max(each.sizes) for each in watched] == [2, 2]
    ids, direct = answers(trainer, lambda batch: ensemble(batch).logits)
    torch.testing.assert_close(cache.signal(ids, 0).logits.float(), direct, **HALF)


def test_texts_run_from_long_to_short(tmp_path: Path, sentences: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load, data = sentences
    student, teacher = load(), load()
    trainer = make(tmp_path, data, student, LiveTeacher(teacher, student))
    chosen = trainer._cache_batches()
    assert chosen.rows == 64 and chosen.largest is not None and chosen.tokens is not None
    monkeypatch.setattr(batch_sizes, "_LARGEST", 4 * chosen.largest)
    trainer._cache_batches = lambda: replace(chosen, rows=10)  # type: ignore[method-assign]
    cache, (watched,) = written(trainer, teacher)
    lengths = [int(n) for inputs in watched.inputs for n in inputs["attention_mask"].sum(1)]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 2
    assert max(watched.sizes) < 10
    for inputs, size in zip(watched.inputs, watched.sizes, strict=True):  # of shorter texts more run at a time
        assert size * inputs["input_ids"].shape[1] <= 4 * chosen.tokens
    taken = ("input_ids", "attention_mask", "token_type_ids")
    ids, direct = answers(
        trainer, lambda batch: logits_of(teacher.model(**{n: v for n, v in batch.items() if n in taken}))
    )
    torch.testing.assert_close(cache.signal(ids, 0).logits.float(), direct, **HALF)


def test_a_lora_students_base_too(tmp_path: Path, sentences: Any) -> None:
    load, data = sentences
    student = load()
    student.model.fresh_parameters = ()
    student.model = LoRA().apply(student.model)
    trainer = make(tmp_path, data, student, AdapterOffTeacher(student))
    cache, _ = written(trainer, student)
    assert trainer._cache_batches().largest is not None
    ids, direct = answers(trainer, lambda batch: trainer.teacher(batch).logits)
    torch.testing.assert_close(cache.signal(ids, 0).logits.float(), direct, **HALF)


class OfTheBatch(nn.Module):
    """Adds what it sees of the whole batch to each row's logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Any:
        logits = logits_of(self.model(pixel_values=pixel_values))
        return SimpleNamespace(logits=logits + pixel_values.std())


def usual(trainer: DistillationTrainer) -> bool:
    return trainer._cache_batches() == CacheBatches(USUAL)


def test_a_teacher_whose_answers_depend_on_the_batch_keeps_its_batches(tmp_path: Path, digits: Any) -> None:
    student = network(2)
    teacher = network(1)
    teacher = Backbone(OfTheBatch(teacher.model), teacher.processor, "image", teacher.task, "odd", CLASSES,
                       teacher.data_config)  # fmt: skip
    trainer = make(tmp_path, digits, student, LiveTeacher(teacher, student))
    assert usual(trainer)
    _, (watched,) = written(trainer, teacher)
    rows = len(trainer.train_dataset)
    assert watched.sizes == [USUAL] * (rows // USUAL) + [rows % USUAL]


def test_others_that_keep_their_batches(tmp_path: Path, digits: Any, sentences: Any) -> None:
    load, data = sentences
    student = load()
    assert usual(make(tmp_path, data, student, LiveTeacher(load(), student, quantize=True)))  # scales of the batch
    student = network(2)
    live = LiveTeacher(network(1), student)
    assert usual(make(tmp_path, digits, student, LiveTeacher(network(1), student, compile=True)))
    assert usual(make(tmp_path, digits, student, EnsembleTeacher([live, Silent(student)])))
    assert usual(make(tmp_path, digits, student, EnsembleTeacher([live, live], route_by="labels")))
    assert not usual(make(tmp_path, digits, student, EnsembleTeacher([live, live])))


class Silent(LiveTeacher):
    """One whose networks are not known."""

    def __init__(self, student: Backbone) -> None:
        super().__init__(network(5), student)

    def networks(self) -> list[nn.Module]:
        return []


@pytest.mark.parametrize("options", [{}, {"chunk_tokens": 8}, {"chunk_tokens": 8, "teacher_cache_top_k": 3}])
@pytest.mark.parametrize("size", [1, 3])
def test_language_models_run_no_more_rows_than_an_evaluation(tmp_path: Path, size: int, options: Any) -> None:
    trainer = language_trainer(
        tmp_path, per_device_eval_batch_size=size, teacher_cache_dir=str(tmp_path / "caches"), **options
    )
    rows: Any = trainer.train_dataset
    trainer.train_dataset = rows.select(range(len(rows) - 1, -1, -1))  # from short to long
    cache, (watched,) = written(trainer, trainer.teacher.backbone)
    assert max(watched.sizes) == size
    lengths = [int(n) for inputs in watched.inputs for n in inputs["attention_mask"].sum(1)]
    assert (lengths == sorted(lengths, reverse=True)) == (size > 1)
    teacher = language_backbone(1, WORDS - 3)
    for row in language_rows():
        ids = torch.tensor([row["input_ids"]])
        with torch.inference_mode():
            direct = teacher.model(input_ids=ids).logits
        said = cache.signal(torch.tensor([row["example_id"]]), 0, torch.ones_like(ids))
        if said.top is not None:
            direct, found = direct.gather(2, said.top.indices.long()), said.top.values
        else:
            found = said.logits
        torch.testing.assert_close(found.float(), direct, **HALF)


def test_an_interrupted_cache_goes_on_in_other_batches(tmp_path: Path, digits: Any) -> None:
    teacher = network(1)
    trainer = make(tmp_path, digits, network(2), teacher)
    key = trainer._cache_key(1)
    folder = trainer._cache_folder(key)
    asked = Watched(teacher.model)

    def killed(module: nn.Module, args: tuple) -> None:
        if len(asked.inputs) == 3:
            raise KeyboardInterrupt

    hook = teacher.model.register_forward_pre_hook(killed)
    with pytest.raises(KeyboardInterrupt):
        trainer._write_cache(folder, key, CacheBatches(USUAL))
    hook.remove()
    cache, (watched,) = written(trainer, teacher)
    rows = len(trainer.train_dataset)
    assert len(cache.example_ids) == rows
    assert sum(watched.sizes) == rows  # one part, as some of it was not there
    ids, direct = answers(trainer, lambda batch: teacher.model(pixel_values=batch["pixel_values"]).logits)
    torch.testing.assert_close(cache.signal(ids, 0).logits.float(), direct, **HALF)
