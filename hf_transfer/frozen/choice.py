"""Whether a fine-tuning computes its frozen layers once: what stands against it, what it costs, and the cached data.

With cache="auto" the answer is that of a measurement, and never changes what is learnt: augmented rows are cached only
if `cache_views` is given, as a row then has so many versions and no more.
"""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from ..batch_sizes import a_few
from ..data.columns import EXAMPLE_ID, list_lengths
from ..data.replay import borrowed_generators, dataset_epoch, is_random
from ..data.stored_rows import StoredRows
from ..disk import SPARE, free_bytes
from ..distillation.signature import data_signature, transform_signature
from ..errors import TransferError
from ..memory_formats import to_channels_last
from ..objective import CONTRACT_COLUMNS, Objective, model_inputs
from ..store.decision import Costs, epochs_of
from ..store.folders import cache_folder
from ..store.manifest import MANIFEST
from .cache import CacheKey, PrefixCache, row_bytes, write_prefix_cache
from .cut import Cut, NoCut, lowest_trained
from .extraction import Extractor
from .prefix import find_cut
from .rows import CachedCollator, CachedRows
from .training import CachedTrainer

if TYPE_CHECKING:
    from ..backbones import Backbone
    from ..config import RunConfig
    from ..data.collate import Collator
    from ..transfer_config import TransferConfig

logger = logging.getLogger(__name__)

VIEWS = 4  # of augmented rows, where "always" is asked for and no number
MEASURED_BATCHES = 3
_KEPT = (EXAMPLE_ID, "attention_mask")  # of batches that were measured
_LOOKED_AT = 1024  # texts whose mean length stands for all


@dataclass
class CachedData:
    """What a trainer takes in place of the splits and the collator.

    Attributes:
        cut: Where the network is cut.
        train: The training rows.
        validation: The validation rows; as they were where they are not cached.
        collator: For both.
    """

    cut: Cut
    train: CachedRows
    validation: Any
    collator: CachedCollator

    def trainer(self, **options: Any) -> CachedTrainer:
        """The trainer that reads the cache.

        Args:
            **options: As for TransferTrainer, with the uncached data and collator.
        """
        own = {"train_dataset": self.train, "eval_dataset": self.validation, "data_collator": self.collator}
        return CachedTrainer(cut=self.cut, **{**options, **own})


def cached_data(
    backbone: Backbone,
    prepared: Mapping[str, Any],
    collator: Collator,
    args: TransferConfig,
    terms: Sequence[Objective],
    run: RunConfig,
) -> CachedData | None:
    """Caches what the frozen lower part of a network gives for training and validation rows, if that is worth it.

    Called by all processes at once. Says in the log what was decided, and why.

    Args:
        backbone: Its model is tuned as it will train; it is moved to the device of the arguments.
        prepared: The splits, as `data.transforms.prepare` made them.
        collator: Of their batches.
        args: The Trainer's arguments.
        terms: What is minimised.
        run: `cache`, `cache_views`, `cache_dtype`, `cache_dir`, `cache_max_bytes`.

    Returns:
        What to train with; None where the network is to run whole.

    Raises:
        TransferError: With cache="always", if there can be none; or if no space is left.
    """
    if run.cache == "never":
        return None
    try:
        with borrowed_generators():  # training is the same whether or not a cache was there already
            return _Plan(backbone, prepared, collator, args, terms, run).carried_out()
    except NoCut as error:
        if run.cache == "always":
            raise TransferError(f"cache='always' cannot be: {error} Leave it out, or pass cache='never'.") from error
        logger.info("Frozen layers run live: %s", error)
        return None


class _Plan:
    """One decision; NoCut where it is against a cache."""

    def __init__(
        self, backbone: Backbone, prepared: Mapping[str, Any], collator: Collator, args: Any, terms: Any, run: Any
    ) -> None:
        self.model: Any = backbone.model
        self.backbone, self.collator, self.args, self.run = backbone, collator, args, run
        lowest_trained(self.model, backbone.anatomy)
        self.train = _for_model(prepared["train"], self.model)
        evaluates = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"
        self.whole_validation = prepared.get("validation")
        self.validation = (
            _for_model(self.whole_validation, self.model) if evaluates and self.whole_validation else None
        )
        self._refuse(terms)
        self.views = self._views()
        if self.run.cache == "auto" and self._epochs() <= self.views:
            raise NoCut(f"{self._epochs():g} epoch(s) show no version of a row twice.")
        self.model.to(args.device)
        if args.channels_last:  # as the trainer will, so that frozen layers round here as they would there
            to_channels_last(self.model)
        sample = self._sample()
        inputs = {name: x.to(args.device) if torch.is_tensor(x) else x for name, x in model_inputs(sample).items()}
        self.cut = find_cut(self.model, inputs, backbone.anatomy)
        if args.torch_compile and self.cut.steps is None:
            raise NoCut("torch_compile compiles the network whole, where more of it trains than the head.")
        self.extractor = Extractor(self.cut, collator, args, sample)
        self.measured: list[tuple[Mapping[str, Any], Tensor]] = []  # training rows that are computed already

    def carried_out(self) -> CachedData:
        prefix = self.cut.fingerprint(self.backbone.anatomy, str(self.extractor.dtype))
        train, folder = self._key(prefix, self.train, self.views)
        size, free = self._say_and_check(folder)
        if self.run.cache == "auto" and not (folder / MANIFEST).exists():
            self._compare(size, free)
        caches = [self._write(folder, train, self.train, self.measured)]
        validation: Any = self.whole_validation
        if self.validation is not None:
            key, folder = self._key(prefix, self.validation, 1)
            caches.append(self._write(folder, key, self.validation, []))
            validation = self._rows(self.validation, caches[1], 1)
        return CachedData(
            self.cut, self._rows(self.train, caches[0], 0), validation, CachedCollator(self.collator, caches)
        )

    def _rows(self, rows: Any, cache: PrefixCache, number: int) -> CachedRows:
        """Without their tokens, where neither the rest of the network nor the count of tokens reads them."""
        text = "input_ids" in rows.column_names
        tokens = text and (self.cut.steps is None or self.args.include_num_input_tokens_seen != "no")
        return CachedRows(rows, cache, number, None if tokens or self.cut.per_token else self.collator)

    # ---- what stands against it -------------------------------------------------------------------------------------

    def _refuse(self, terms: Sequence[Objective]) -> None:
        args, layered = self.args, [term.name for term in terms if term.student_layers]
        foreign = [term.name for term in terms if not type(term).__module__.startswith("hf_transfer.")]
        reasons = {
            "sounds are padded to the longest of their batch, on which their values depend": (
                self.backbone.modality == "audio"
            ),
            "mixup and CutMix make new images of each batch": self.collator.mixing is not None,
            "gradient_checkpointing runs layers again in the backward pass": args.gradient_checkpointing,
            f"sampling={args.sampling!r} needs the rows themselves": args.sampling != "random",
            f"the terms {layered} read layers that would not run": bool(layered),
            f"the terms {foreign} may read the inputs (cache='always' if they do not)": (
                bool(foreign) and self.run.cache == "auto"
            ),
            "there is one row": len(self.train) < 2,
        }
        for reason, applies in reasons.items():
            if applies:
                raise NoCut(f"{reason}.")

    def _views(self) -> int:
        if not is_random(self.train):
            return 1
        if self.run.cache_views is None and self.run.cache == "auto":
            raise NoCut(
                "the rows are augmented at random, and each would have fewer versions than epochs. Pass "
                "cache_views=4 for so many, or augment='none'."
            )
        return min(self.run.cache_views or VIEWS, max(1, math.ceil(self._epochs())))

    def _say_and_check(self, folder: Path) -> tuple[int, int]:
        """The plan, and whether there is room for it; bytes that are needed, and that are free."""
        each = row_bytes(self.cut.shape, self.run.cache_dtype)
        if self.cut.per_token:  # the sample's longest text stands for all
            each = row_bytes((self._tokens_a_row(), *self.cut.shape[1:]), self.run.cache_dtype)
        rows = len(self.train) * self.views + (len(self.validation) if self.validation is not None else 0)
        free = free_bytes(folder)
        plan = (
            f"{len(self.train):,} rows x {self.views} view(s) x {each:,} bytes, with validation "
            f"{rows * each / 2**20:,.1f} MiB of {free / 2**20:,.0f} MiB free in {folder.parent}"
        )
        logger.info("Prefix cache, cut %s: %s", self.cut, plan)
        there = (folder / MANIFEST).exists()
        if rows * each > self.run.cache_max_bytes:
            limit = self.run.cache_max_bytes / 2**20
            raise NoCut(f"{plan}: more than cache_max_bytes allows ({limit:,.1f} MiB).")
        if rows * each > SPARE * free and not there:
            raise NoCut(f"{plan}: too little is free.")
        return rows * each, free

    def _tokens_a_row(self) -> int:
        """The mean length of the texts that are looked at, rounded up."""
        looked_at = self.train.select(range(min(_LOOKED_AT, len(self.train))))
        return math.ceil(list_lengths(looked_at, "input_ids").mean())

    def _compare(self, size: int, free: int) -> None:
        """Measures both ways; the first process's choice is every process's."""
        if str(self.args.resume_from_checkpoint or "false").lower() != "false":
            raise NoCut("the training that is resumed had no cache.")
        costs, what = self._costs(size, free)
        chosen = [(costs.worth, f"{what}: {costs}")]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(chosen)
        worth, why = chosen[0]
        if not worth:
            raise NoCut(f"{why}.")
        logger.info("Frozen layers are computed once: %s", why)

    def _costs(self, size: int, free: int) -> tuple[Costs, str]:
        """Computes the first batches of the cache, and from that what both ways cost; what was measured, as text.

        Live layers take at least as long as they do here, where the batches are of the size that suits them.
        """
        loading, prefix, reading = [], [], []
        batches = self.extractor.batches(self.train, np.empty(0))
        with self.extractor.running() as run:
            began = time.perf_counter()
            for batch in self.extractor.loaded(self.train, batches[:MEASURED_BATCHES]):
                loaded = time.perf_counter()
                value = run(batch).cpu()
                computed = time.perf_counter()
                value.clone()
                loading.append(loaded - began)
                prefix.append(computed - loaded)
                reading.append(time.perf_counter() - computed)
                self.measured.append(({name: batch[name] for name in _KEPT if name in batch}, value))
                began = time.perf_counter()
        load, compute, read = (len(batches) * median(times[1:] or times) for times in (loading, prefix, reading))
        views = self.views
        costs = Costs(load + compute, views * (load + compute + read), read, self._epochs(), size, free)
        of = 1000 / max(1, len(batches))
        return costs, f"loading takes {of * load:.1f} ms a batch and the frozen layers {of * compute:.1f} ms"

    def _epochs(self) -> float:
        return epochs_of(self.args, len(self.train))

    # ---- doing it ---------------------------------------------------------------------------------------------------

    def _sample(self) -> dict[str, Any]:
        """A few rows as a batch; texts of unequal length."""
        return self.collator([self.train[row] for row in a_few(self.train)])

    def _key(self, prefix: str, rows: Any, views: int) -> tuple[CacheKey, Path]:
        key = CacheKey(prefix, data_signature(rows), transform_signature(rows), views)
        return key, cache_folder(self.run.cache_dir, "prefixes", key, self.run.cache_dtype)

    def _write(
        self, folder: Path, key: CacheKey, rows: Any, measured: Sequence[tuple[Mapping[str, Any], Tensor]]
    ) -> PrefixCache:
        """The cache of some rows; `measured` are batches of view 0 that need not be computed again."""
        counter = dataset_epoch(rows)
        known = np.array([i for batch, _ in measured for i in batch[EXAMPLE_ID].tolist()], dtype=np.int64)

        def computed(view: int, there: np.ndarray) -> Iterator[tuple[Mapping[str, Any], Tensor]]:
            if counter is not None:
                counter.set(view)
            if view == 0:
                yield from measured
            batches = self.extractor.batches(rows, there, known if view == 0 else None)
            for batch in self.extractor.loaded(rows, batches):
                yield batch, run(batch)

        try:
            with self.extractor.running() as run:
                return write_prefix_cache(
                    folder,
                    key,
                    computed,
                    dtype=self.run.cache_dtype,
                    about=f"{self.backbone.name}, {self.cut}; {len(rows):,} rows, {key.views} view(s)",
                    rank=self.args.process_index,
                    world_size=self.args.world_size,
                    wait=_barrier(self.args),
                )
        finally:
            if counter is not None:
                counter.set(0)


def _for_model(rows: Any, model: Any) -> Any:
    """The columns that the model takes, as the Trainer chooses them, and the contract's."""
    from datasets import Dataset

    if isinstance(rows, StoredRows):
        return rows
    if not isinstance(rows, Dataset):
        raise NoCut(f"{type(rows).__name__} has no rows that can be told apart; prepare() gives a datasets.Dataset.")
    if rows.format["type"] == "custom":
        return rows
    taken = [*inspect.signature(model.forward).parameters, *CONTRACT_COLUMNS]
    return rows.select_columns([name for name in rows.column_names if name in taken])


def _barrier(args: Any) -> Callable[[], None] | None:
    return cast(Any, torch.distributed.barrier) if args.world_size > 1 else None
