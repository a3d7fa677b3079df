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
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..data.replay import borrowed_generators, dataset_epoch, is_random
from ..distillation.cache_choice import SPARE, free_bytes
from ..distillation.signature import data_signature, transform_signature
from ..errors import TransferError
from ..objective import CONTRACT_COLUMNS, Objective, model_inputs
from .cache import CacheKey, PrefixCache, row_bytes, write_prefix_cache
from .cut import Cut, NoCut, lowest_trained
from .prefix import find_cut
from .prefix_costs import Costs
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
_SAMPLE, _LOOKED_AT = 4, 64  # rows that a cut is found with; of texts, those of the first that differ most in length


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
        self.cut = find_cut(self.model, self._on_device(model_inputs(self._sample())))

    def carried_out(self) -> CachedData:
        computed_in = str(_autocast(self.args))
        prefix = self.cut.fingerprint(self.backbone.anatomy, computed_in)
        key, folder = self._key(prefix, self.train, self.views)
        self._say_and_check(folder)
        if self.run.cache == "auto" and not (folder / "manifest.json").exists():
            self._compare()
        caches = [self._write(folder, key, self.train)]
        validation: Any = self.whole_validation
        if self.validation is not None:
            key, folder = self._key(prefix, self.validation, 1)
            caches.append(self._write(folder, key, self.validation))
            validation = self._rows(self.validation, caches[1], 1)
        train = self._rows(self.train, caches[0], 0)
        return CachedData(self.cut, train, validation, CachedCollator(self.collator, caches))

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
            "torch_compile compiles the network whole": args.torch_compile,
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

    def _say_and_check(self, folder: Path) -> None:
        """The plan, and whether there is room for it."""
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
        there = (folder / "manifest.json").exists()
        if rows * each > self.run.cache_max_bytes:
            limit = self.run.cache_max_bytes / 2**20
            raise NoCut(f"{plan}: more than cache_max_bytes allows ({limit:,.1f} MiB).")
        if rows * each > SPARE * free and not there:
            raise NoCut(f"{plan}: too little is free.")

    def _tokens_a_row(self) -> int:
        """The mean length of the texts that are looked at, rounded up."""
        lengths = [len(ids) for ids in self.train[: 16 * _LOOKED_AT]["input_ids"]]
        return math.ceil(sum(lengths) / len(lengths))

    def _compare(self) -> None:
        """Measures both ways; the first process's choice is every process's."""
        if str(self.args.resume_from_checkpoint or "false").lower() != "false":
            raise NoCut("the training that is resumed had no cache.")
        costs = self._costs()
        chosen = [(costs.cached < costs.live, str(costs))]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(chosen)
        worth, why = chosen[0]
        if not worth:
            raise NoCut(f"{why}.")
        logger.info("Frozen layers are computed once: %s", why)

    def _costs(self) -> Costs:
        loading, prefix, reading = [], [], []
        batches = self._batches(self.train, self.args.train_batch_size)
        began = time.perf_counter()
        for _, batch in zip(range(MEASURED_BATCHES), batches, strict=False):
            loaded = time.perf_counter()
            value = self._prefix(batch).float().cpu()
            computed = time.perf_counter()
            value.clone()
            loading.append(loaded - began)
            prefix.append(computed - loaded)
            reading.append(time.perf_counter() - computed)
            began = time.perf_counter()
        in_all = len(self.train) / (self.args.train_batch_size * self.args.world_size)
        warm = [median(times[1:] or times) for times in (loading, prefix, reading)]  # the first one warms up
        return Costs(warm[0], warm[1], warm[2], in_all, self._epochs(), self.views)

    def _epochs(self) -> float:
        args = self.args
        if args.max_steps <= 0:
            return args.num_train_epochs
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return args.max_steps * rows / len(self.train)

    # ---- doing it ---------------------------------------------------------------------------------------------------

    def _sample(self) -> dict[str, Any]:
        """A few rows as a batch; texts of unequal length."""
        rows = list(range(min(_LOOKED_AT, len(self.train))))
        if "input_ids" in self.train.column_names:
            lengths = [len(ids) for ids in self.train[: len(rows)]["input_ids"]]
            rows.sort(key=lambda row: lengths[row])
            rows = [*rows[:1], *rows[-_SAMPLE + 1 :]]
        return self.collator([self.train[row] for row in dict.fromkeys(rows[:_SAMPLE])])

    def _on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {name: item.to(self.args.device) if torch.is_tensor(item) else item for name, item in batch.items()}

    def _prefix(self, batch: Mapping[str, Any]) -> Tensor:
        dtype = _autocast(self.args)
        with nullcontext() if dtype is None else torch.autocast(self.args.device.type, dtype):
            return self.cut.capture(self._on_device(model_inputs(batch)))

    def _batches(self, rows: Any, size: int) -> Iterator[dict[str, Any]]:
        """This process's share of the rows, in order."""
        own = torch.utils.data.Subset(rows, range(self.args.process_index, len(rows), self.args.world_size))
        return iter(
            torch.utils.data.DataLoader(
                own, batch_size=size, collate_fn=self.collator, num_workers=self.args.dataloader_num_workers
            )
        )

    def _key(self, prefix: str, rows: Any, views: int) -> tuple[CacheKey, Path]:
        from huggingface_hub import constants

        key = CacheKey(prefix, data_signature(rows), transform_signature(rows), views)
        root = self.run.cache_dir
        home = Path(constants.HF_HOME) / "hf_transfer" / "prefixes" if root is None else Path(root)
        parts = (prefix[:12], key.data[:12], key.transform[:12], str(views), self.run.cache_dtype)
        return key, home / "-".join(parts)

    def _write(self, folder: Path, key: CacheKey, rows: Any) -> PrefixCache:
        counter = dataset_epoch(rows)

        def batches(view: int) -> Iterator[dict[str, Any]]:
            if counter is not None:
                counter.set(view)
            yield from self._batches(rows, self.args.eval_batch_size)

        try:
            return write_prefix_cache(
                folder,
                key,
                self._prefix,
                batches,
                dtype=self.run.cache_dtype,
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

    if not isinstance(rows, Dataset):
        raise NoCut(f"{type(rows).__name__} has no rows that can be told apart; prepare() gives a datasets.Dataset.")
    if rows.format["type"] == "custom":
        return rows
    taken = [*inspect.signature(model.forward).parameters, *CONTRACT_COLUMNS]
    return rows.select_columns([name for name in rows.column_names if name in taken])


def _autocast(args: Any) -> torch.dtype | None:
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def _barrier(args: Any) -> Callable[[], None] | None:
    return cast(Any, torch.distributed.barrier) if args.world_size > 1 else None
