"""DistillationTrainer: a TransferTrainer whose terms see what a teacher says of each batch.

    trainer = DistillationTrainer(
        model=student, teacher="runs/teacher",
        objectives=[SoftTargets(temperature=4.0, weight=0.9), Hint(layers="last")],
        args=DistillationConfig(output_dir="student", hard_weight=0.1),
        train_dataset=train, eval_dataset=validation, processing_class=processor)
    trainer.train()

The teacher is asked outside the module that is trained and wrapped: it is placed once a process, never trained, never
saved. What is known of transformers' Trainer stays in trainer.py: here are the methods that it offers for this.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import EvalPrediction

from .. import fsdp
from ..backbones import Backbone
from ..data.replay import borrowed_generators, dataset_epoch, is_random
from ..data.stored_rows import StoredRows
from ..disk import free_bytes
from ..errors import TransferError
from ..memory_formats import to_channels_last
from ..objective import TEACHER_PREFIX, UNLABELLED, Learner, Objective, model_inputs
from ..objectives import JSD, MSE, CrossEntropy, LogitMSE, SoftTargets
from ..objectives._layers import FeatureTerm
from ..store.decision import Costs, epochs_of
from ..store.folders import cache_folder
from ..store.manifest import MANIFEST
from ..trainer import TransferTrainer
from .adapter_off import AdapterOffTeacher
from .cache import CachedTeacher, CacheKey, TeacherCache, cache_bytes, write_cache
from .cache_batches import CacheBatches, suited
from .config import DistillationConfig
from .fidelity import Fidelity, gain_recovered, miscalibrated
from .live import LiveTeacher, NetworkTeacher, shares_weights
from .mapping import connect
from .memory import MOST_BYTES, RememberingTeacher
from .signature import data_signature, transform_signature
from .teacher import Teacher, as_teacher, backbone_of
from .teacher_inputs import TeacherInputRows

if TYPE_CHECKING:
    from .chunked import ChunkedLearner
    from .signal import TeacherSignal

logger = logging.getLogger(__name__)

MEASURED_BATCHES = 3


class DistillationTrainer(TransferTrainer):
    """A TransferTrainer with a teacher.

    Args:
        model: The student: a network, or a Backbone.
        teacher: A folder, a Hub id, a network, a Backbone, a Teacher (a cache among them), or a list of these, whose
            probabilities are averaged.
        objectives: The terms that learn from the teacher; by default `SoftTargets(temperature=4.0, weight=0.9)`, at
            temperature 1 for language models, and `LogitMSE(weight=0.9)` for regression. The
            task's own loss against the labels joins them with `args.hard_weight`.
        args: A DistillationConfig.
        processing_class: The student's processor; by it the teacher's inputs are made from the student's.
        **kwargs: As for `transformers.Trainer`.

    Raises:
        TransferError: If teacher, student, terms and data do not fit together.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
    """

    args: DistillationConfig

    def __init__(
        self,
        model: nn.Module | Backbone,
        teacher: Any,
        objectives: Sequence[Objective] | None = None,
        args: DistillationConfig | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        args = DistillationConfig() if args is None else args
        if not isinstance(args, DistillationConfig):
            raise TransferError(f"args must be a DistillationConfig, got {type(args).__name__}.")
        if not isinstance(model, (nn.Module, Backbone)):
            raise TransferError(f"model must be the student, a network or a Backbone, got {model!r}.")
        self.student = model if isinstance(model, Backbone) else backbone_of(model, processing_class)
        self._teacher = teacher
        self.teacher: Teacher
        self.training_teacher: Teacher
        self._scoring_teacher: Teacher | None = None  # None where only a cache of training rows answers
        self._chunks: ChunkedLearner | None = None
        self._chunked_teacher: Teacher | None = None
        self._scored: Any = None  # the dataset whose rows it remembers
        self._fidelity: Fidelity | None = None
        super().__init__(
            model=self.student.model,
            args=args,
            objectives=self._with_hard_term(objectives, args.hard_weight),
            processing_class=self.student.processor if processing_class is None else processing_class,
            **kwargs,
        )

    def _with_hard_term(self, objectives: Sequence[Objective] | None, weight: float) -> list[Objective]:
        causal = self.student.task == "causal-lm"
        if objectives is None and self.student.task == "regression":
            objectives = [LogitMSE(weight=0.9)]
        elif objectives is None:
            objectives = [SoftTargets(1.0 if causal else 4.0, shift=causal, weight=0.9)]
        terms: list[Objective] = list(objectives)
        if not weight:
            return terms
        hard = MSE(weight=weight) if self.student.task == "regression" else CrossEntropy(shift=causal, weight=weight)
        return [*terms, hard]

    # ---- teacher and terms ------------------------------------------------------------------------------------------

    def make_learner(self) -> Learner:
        """The Learner, its terms connected to the teacher's layers; in chunks of tokens if the arguments say so."""
        self.teacher = as_teacher(
            self._teacher, self.student, dtype=_dtype(self.args.teacher_dtype), compile=self.args.teacher_compile,
            quantize=self.args.teacher_quantize,
        )  # fmt: skip
        self._check_parts()
        if not self.args.teacher_sharded:
            self.teacher = self.teacher.to(self.args.device)
        self.training_teacher = self.teacher
        if self.args.channels_last and isinstance(self.teacher, NetworkTeacher):
            to_channels_last(self.teacher.backbone.model)
        if not isinstance(self.teacher, CachedTeacher):
            self._scoring_teacher = self._remembering()
        self._connect_terms()
        if self.args.teacher_sharded:
            cast(LiveTeacher, self.teacher).shard()
        if self.args.chunk_tokens is None:
            return super().make_learner()
        from .chunked import ChunkedLearner, ChunkedTeacher

        if isinstance(self.teacher, NetworkTeacher):
            self.training_teacher = self._chunked_teacher = ChunkedTeacher(cast(Any, self.teacher))
        elif not isinstance(self.teacher, CachedTeacher) and self.args.teacher_cache != "always":
            raise TransferError(
                f"chunk_tokens={self.args.chunk_tokens} needs one network as a teacher, or a cache of it, and "
                f"{type(self.teacher).__name__} is neither: leave chunk_tokens out, or cache its answers, "
                "teacher_cache='always'."
            )
        self._chunks = ChunkedLearner(
            self.model, self.objectives, self.student.anatomy, chunk_tokens=self.args.chunk_tokens
        )
        return self._chunks

    def _check_parts(self) -> None:
        """Whether a teacher can answer where processes hold parts of a network."""
        if self.is_fsdp_enabled and isinstance(self.teacher, AdapterOffTeacher):
            raise TransferError(
                "Under FSDP the base of a LoRA student cannot be its teacher: each process holds a part of it only. "
                "Give a network of its own, a copy of the base too, or a cache; or launch with DDP."
            )
        if not self.args.teacher_sharded:
            return
        if not self.is_fsdp_enabled:
            raise TransferError("teacher_sharded=True is for training under FSDP: set fsdp=True, or leave it out.")
        if not isinstance(self.teacher, LiveTeacher) or self.args.chunk_tokens is not None:
            raise TransferError(
                "teacher_sharded=True needs one live teacher, and no chunk_tokens: give one network, or leave it out."
            )

    def _remembering(self) -> RememberingTeacher:
        """For evaluations; what is in parts is asked each time, as all processes must ask together."""
        return RememberingTeacher(self.teacher, 0 if self.args.teacher_sharded else MOST_BYTES)

    def _connect_terms(self) -> None:
        terms = [term for term in self.objectives if isinstance(term, FeatureTerm)]
        if not terms:
            return
        if not isinstance(self.teacher, NetworkTeacher):
            raise TransferError(
                f"The terms {[term.name for term in terms]} compare layers, and {type(self.teacher).__name__} has one "
                "set of predictions, not one network with layers. Give one live teacher, or leave these terms out."
            )
        batch = self.sample_batch()
        teacher = self.teacher
        connect(terms, self.student, teacher.backbone, model_inputs(batch), teacher.bridge(batch))
        layers = dict.fromkeys(layer for term in terms for layer in term.teacher_layers)
        teacher.watch(list(layers), any(term.uses_features for term in terms))

    # ---- live or cached ---------------------------------------------------------------------------------------------

    def before_training(self, max_steps: int) -> None:
        """Chooses whether the teacher answers live or from a cache, and writes the cache."""
        with borrowed_generators():  # training is the same whether or not a cache was there already
            self._choose_teacher(max_steps)

    def _choose_teacher(self, max_steps: int) -> None:
        mode = self.args.teacher_cache
        if isinstance(self.teacher, CachedTeacher):
            self._check_given_cache(self.teacher)
            return
        if mode == "never":
            return
        obstacle = self._why_no_cache()
        if obstacle is not None:
            if mode == "always":
                raise TransferError(f"teacher_cache='always': {obstacle}")
            logger.info("Teacher live: %s", obstacle)
            return
        epochs = epochs_of(self.args, len(cast(Any, self.train_dataset)))
        views = min(self.args.teacher_cache_views, max(1, round(epochs))) if is_random(self.train_dataset) else 1
        key = self._cache_key(views)
        folder = self._cache_folder(key)
        is_there = self._agreed((folder / MANIFEST).exists())
        batches = CacheBatches(self.args.eval_batch_size) if is_there else self._cache_batches()
        if not is_there and mode == "auto":
            costs, measured = self._costs(views, epochs, folder, batches)
            logger.info("Teacher %s: %s; %s", "cached" if costs.worth else "live", measured, costs)
            if not self._agreed(costs.worth):
                return
        cache = self._write_cache(folder, key, batches)
        self.training_teacher = CachedTeacher(cache, self.teacher.labels).to(self.args.device)
        logger.info("Teacher cached in %s: %d view(s) of each row", folder, views)

    def _check_given_cache(self, teacher: CachedTeacher) -> None:
        """Whether a cache that the user opened is one of these rows, as they are seen here."""
        if (obstacle := self._why_no_cache()) is not None:
            raise TransferError(f"The teacher is a cache: {obstacle}")
        self._cache_key(teacher.views).check(teacher.cache.key, teacher.cache.folder, teacher.cache.kind)

    def _why_no_cache(self) -> str | None:
        """What stands against a cache; None if nothing does."""
        if self.args.teacher_sharded:
            return "teacher_sharded=True, and processes need not all have as much of a cache left to write."
        layered = [t.name for t in self.objectives if isinstance(t, FeatureTerm) and t.teacher_layers]
        if layered:
            return f"the terms {layered} read the teacher's layers, which are not cached."
        if not isinstance(self.train_dataset, (Dataset, StoredRows, TeacherInputRows)):
            return "the training data is not a datasets.Dataset of prepare(), whose rows can be told apart."
        if "example_id" not in self.sample_batch():
            return "the rows have no example_id: prepare them with hf_transfer.data.transforms.prepare()."
        if getattr(self.data_collator, "mixing", None) is not None:
            return "mixup and CutMix make new images of each batch, which no cache holds."
        if self.args.teacher_cache_top_k is None:
            return None
        others = [t.name for t in self.objectives if getattr(t, "needs_all_logits", False)]
        if others:
            return f"the terms {others} need all logits, and teacher_cache_top_k keeps some."
        moving = [t.name for t in self.objectives if callable(getattr(t, "temperature", None))]
        return f"the temperature of {moving} moves, and the tail of teacher_cache_top_k is of one." if moving else None

    def _cache_key(self, views: int) -> CacheKey:
        return CacheKey(
            source=self.teacher.fingerprint(),
            data=data_signature(self.train_dataset),
            transform=transform_signature(self.train_dataset),
            views=views,
        )

    def _cache_folder(self, key: CacheKey) -> Path:
        kept = "all"
        if self.args.teacher_cache_top_k is not None:
            kept = (
                f"top{self.args.teacher_cache_top_k}-at-{'-'.join(f'{t:g}' for t in _temperatures(self.objectives))}"
            )
        if self._caches_features():
            kept += "-features"
        return cache_folder(self.args.teacher_cache_dir, "teachers", key, kept)

    def _caches_features(self) -> bool:
        return any(isinstance(term, FeatureTerm) for term in self.objectives)

    def _cache_batches(self) -> CacheBatches:
        """In which batches the teacher is asked for a cache; the first process's choice is every process's."""
        usual = self.args.eval_batch_size
        if self.student.modality == "audio":  # padded to the longest of the batch, on which answers may depend
            return CacheBatches(usual)
        most = usual if self.student.task == "causal-lm" else None  # a token's logits are large
        asked = self._asked_for_cache()
        chosen = [suited(asked, self._prepared_rows(), self.batch_of, self.args.device, usual, most)]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(chosen)
        return chosen[0]

    def _prepared_rows(self) -> Any:
        """The student's rows, as `prepare` made them."""
        data: Any = self.train_dataset
        return data.dataset if isinstance(data, TeacherInputRows) else data

    def _costs(self, views: int, epochs: float, folder: Path, chosen: CacheBatches) -> tuple[Costs, str]:
        """What both ways cost, and what was measured, for the log.

        Live the teacher takes at least as long as it does here, in batches of the size that suits it.
        """
        rows = len(cast(Any, self.train_dataset))
        order = chosen.order(self._prepared_rows())
        if order is not None:
            order = [*order[rows // 2 :], *order[: rows // 2]]  # first the texts of typical length
        batches = iter(self.rows_in_order(self.train_dataset, order, chosen.rows))
        teacher_asked = self._asked_for_cache()
        teacher: list[float] = []
        loading: list[float] = []
        signal = None
        while len(teacher) <= MEASURED_BATCHES:
            started = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            loaded = time.perf_counter()
            for part in chosen.parts(batch):
                signal = teacher_asked(part)
            _wait_for(self.args.device)
            loading.append(loaded - started)
            teacher.append(time.perf_counter() - loaded)
        assert signal is not None  # the data has rows: the Trainer has looked
        shape = signal.logits_shape or ()
        kept = self.args.teacher_cache_top_k
        numbers = torch.Size(shape[1:-1]).numel() * (shape[-1] if kept is None else 2 * kept + 2)
        in_all = max(1, round(rows / self.args.world_size / chosen.rows))
        asking, reading = (median(times[1:] or times) for times in (teacher, loading))  # the first one warms up
        costs = Costs(
            live=in_all * asking,
            writing=views * in_all * (asking + reading),
            reading=0.0,
            epochs=epochs,
            size=cache_bytes(rows, numbers, views),
            free=free_bytes(folder),
        )
        times = f"the teacher takes {1000 * asking:.1f} ms a batch and loading {1000 * reading:.1f} ms"
        return costs, f"{times}, {views} view(s)"

    def _agreed(self, choice: bool) -> bool:
        """The first process's choice, which all follow."""
        chosen = torch.tensor(float(choice and self.is_world_process_zero()), device=self.args.device)
        return bool(self.accelerator.reduce(chosen, "sum") > 0)

    def _asked_for_cache(self) -> Teacher:
        """The teacher; of language models in chunks, one that never makes all logits where a few are kept."""
        from .chunked import ChunkedTeacher, LargestTeacher

        k, tokens = self.args.teacher_cache_top_k, self.args.chunk_tokens
        if k is None or tokens is None or not isinstance(self._chunked_teacher, ChunkedTeacher):
            return self.teacher
        return LargestTeacher(self._chunked_teacher, k, _temperatures(self.objectives), tokens)

    def _write_cache(self, folder: Path, key: CacheKey, chosen: CacheBatches) -> TeacherCache:
        counter = dataset_epoch(self.train_dataset)
        order = chosen.order(self._prepared_rows())

        def batches(view: int) -> Iterator[Any]:
            if counter is not None:
                counter.set(view)
            for batch in self.rows_in_order(self.train_dataset, order, chosen.rows):
                yield from chosen.parts(batch)

        return write_cache(
            folder,
            key,
            self._asked_for_cache(),
            batches,
            top_k=self.args.teacher_cache_top_k,
            temperatures=_temperatures(self.objectives),
            features=self._caches_features(),
            about=f"{self._teacher_name()}; {len(cast(Any, self.train_dataset)):,} rows, {key.views} view(s)",
            rank=self.args.process_index,
            world_size=self.args.world_size,
            wait=self.accelerator.wait_for_everyone,
        )

    def _teacher_name(self) -> str:
        return self.teacher.backbone.name if isinstance(self.teacher, NetworkTeacher) else type(self.teacher).__name__

    def extra_columns(self) -> Sequence[str]:
        """The teacher's own inputs, where it reads the rows in another way."""
        takes = self.teacher.bridge.takes if isinstance(self.teacher, NetworkTeacher) else ()
        return sorted(TEACHER_PREFIX + name for name in takes)

    def data_epoch(self, epoch: int) -> int:
        """With a cache, the view that is read; augmentation draws it again."""
        if not isinstance(self.training_teacher, CachedTeacher):
            return epoch
        self.training_teacher.view = epoch % self.training_teacher.views
        return self.training_teacher.view

    def teacher_signal(self, inputs: Mapping[str, Any]) -> TeacherSignal:
        """What the teacher says of a training batch, live or from the cache."""
        return self.training_teacher(inputs)

    # ---- fidelity ---------------------------------------------------------------------------------------------------

    def may_merge_adapters(self) -> bool:
        """Not where the student's own base may be what the student is compared with."""
        teacher = self.teacher
        return self._scoring_teacher is None or (
            isinstance(teacher, NetworkTeacher) and not shares_weights(teacher.backbone.model, self.model)
        )

    @torch.no_grad()
    def observe_evaluation(self, inputs: Mapping[str, Any], logits: Tensor) -> None:
        """Compares student and teacher on a batch of an evaluation, all processes' rows once."""
        if self._scoring_teacher is None or self._in_stretches(inputs):
            return
        if self._scored is not self.evaluated:  # two datasets may number their rows alike
            self._scored, self._scoring_teacher = self.evaluated, self._remembering()
        said = self._scoring_teacher(inputs).logits
        assert said is not None  # a live teacher gives all logits
        self._compare(*self._everywhere(logits, said, inputs.get("labels")))

    def _compare(self, logits: Tensor, said: Tensor, labels: Tensor | None) -> None:
        if self._fidelity is None:
            self._fidelity = Fidelity(regression=self.student.task == "regression")
        if self.student.task == "causal-lm":  # token t's logits are for token t + 1; vocabularies may be padded
            words = min(logits.shape[-1], said.shape[-1])
            logits, said = logits[:, :-1, :words], said[:, :-1, :words]
            labels = None if labels is None else labels[:, 1:]
        self._fidelity.update(logits, said, labels)

    def _everywhere(self, logits: Tensor, said: Any, labels: Any) -> tuple[Tensor, Any, Any]:
        """All processes' rows; as the Trainer does, without those that fill up the last batch."""
        if self.args.world_size == 1:
            return logits, said, labels
        return self._gathered(logits, 0), self._gathered(said, 0), self._gathered(labels, UNLABELLED)

    def _gathered(self, values: Tensor | None, filler: int) -> Any:
        if values is None:
            return None
        if values.dim() > 1 and self.student.task in ("token-classification", "causal-lm"):
            values = self.accelerator.pad_across_processes(values, dim=1, pad_index=filler)
        return self.accelerator.gather_for_metrics(values)

    # ---- language models, a stretch of tokens at a time -------------------------------------------------------------

    def _in_stretches(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the logits of this evaluation batch are shown to `see` as they are made, and never all held."""
        return self._chunks is not None and not self.predictions_kept and inputs.get("labels") is not None

    def evaluation_signal(self, inputs: Mapping[str, Any]) -> TeacherSignal | None:
        """What the teacher says of an evaluation batch, where its tokens are looked at a stretch at a time."""
        stretches = self._in_stretches(inputs)
        if self._chunks is not None:
            self._chunks.observer = self if stretches else None
        teacher = self._chunked_teacher or self._scoring_teacher
        return teacher(inputs) if stretches and teacher is not None else None

    def longest(self, tokens: int) -> int:
        """The most tokens that a row of this batch has on any process."""
        return int(self.accelerator.gather(torch.tensor([tokens], device=self.args.device)).max())

    @torch.no_grad()
    def see(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> None:
        """Takes a stretch of tokens of an evaluation into fidelity and metrics (see chunked.Observer)."""
        logits, teacher, labels = self._everywhere(logits, teacher, labels)
        if teacher is not None:
            self._compare(logits, teacher, labels)
        if self.compute_metrics is not None:
            cast(Any, self.compute_metrics)(EvalPrediction(logits, labels), compute_result=False)  # type: ignore[arg-type]

    def labels_left(self, inputs: Mapping[str, Any], labels: Any) -> Any:
        """The last token's, where `see` was shown the others."""
        return labels[:, -1:] if self._in_stretches(inputs) else labels

    def evaluation_metrics(self) -> dict[str, float]:
        """How near the student is to its teacher, on the rows of the last evaluation."""
        fidelity, self._fidelity = self._fidelity, None
        if fidelity is None:
            return {}
        found = fidelity.result()
        if self.args.baseline_score is not None and "student_accuracy" in found:
            scores = found["student_accuracy"], found["teacher_accuracy"]
            found["gain_recovered"] = gain_recovered(*scores, self.args.baseline_score)
        if self.is_world_process_zero():
            self._warn_of(found)
        return found

    def _warn_of(self, found: Mapping[str, float]) -> None:
        if "student_accuracy" not in found:
            return
        if found["teacher_accuracy"] < found["student_accuracy"]:
            logger.warning(
                "The student (accuracy %.4f) is better than its teacher (%.4f) on these rows: is it the right "
                "teacher, and does it see its inputs as in its training?",
                found["student_accuracy"],
                found["teacher_accuracy"],
            )
        if (flag := miscalibrated(found["student_ece"], found["teacher_ece"])) is not None:
            logger.warning("%s", flag)

    @torch.no_grad()
    def student_logits(self, dataset: Any) -> tuple[Tensor, Tensor]:
        """The student's logits and the labels of a dataset, on the CPU, the same on every process.

        Args:
            dataset: Prepared rows with labels.

        Returns:
            (N, C) float32 and (N,).
        """
        model, training = self.model, self.model.training
        model.eval()
        logits, labels = [], []
        for batch in self.rows_in_order(dataset):
            outputs = model(**model_inputs(batch))
            seen = outputs.logits if hasattr(outputs, "logits") else outputs["logits"]
            logits.append(self.accelerator.gather_for_metrics(seen.float()).cpu())
            labels.append(self.accelerator.gather_for_metrics(batch["labels"]).cpu())
        model.train(training)
        if self.is_fsdp_enabled:
            fsdp.reshard(model)
        return torch.cat(logits), torch.cat(labels)


def _temperatures(terms: Sequence[Objective]) -> tuple[float, ...]:
    """Those at which terms that can do with the largest logits will ask."""
    asked = {term.temperature for term in terms if isinstance(term, (SoftTargets, JSD))}
    return tuple(sorted(float(t) for t in asked if not callable(t))) or (1.0,)


def _dtype(name: str) -> Any:
    return name if name == "auto" else getattr(torch, name)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
