"""TransferTrainer: transformers' Trainer, minimising a sum of terms. ALL plumbing to its internals is in this file.

Without terms it is the stock Trainer with its loss scaling put right. With terms, one module (objective.Learner) holds
the user's model and the terms and computes the summed loss in its forward; it stands in the model's place only while
accelerate wraps the model and while the optimizer is made. `trainer.model` stays the user's; a checkpoint is an
ordinary one, with the terms' own state in a file beside it.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import IterableDataset, SequentialSampler

from ._torchvision import make_torchvision_importable

make_torchvision_importable()

from accelerate.data_loader import DataLoaderShard  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.utils import DistributedType, save_fsdp_model, save_fsdp_optimizer  # noqa: E402
from transformers import (  # noqa: E402
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)
from transformers.distributed.fsdp import get_fsdp_ckpt_kwargs  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402
from transformers.trainer import SCHEDULER_NAME  # noqa: E402
from transformers.trainer_pt_utils import LengthGroupedSampler  # noqa: E402
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, denumpify_detensorize, has_length  # noqa: E402
from transformers.utils import is_sagemaker_mp_enabled  # noqa: E402

from . import fsdp  # noqa: E402
from .anatomy import Anatomy, plain_model  # noqa: E402
from .checkpoints import last_complete_checkpoint  # noqa: E402
from .errors import TransferError  # noqa: E402
from .learning_rates import parameter_groups  # noqa: E402
from .memory_formats import contiguous, to_channels_last  # noqa: E402
from .objective import (  # noqa: E402
    CONTRACT_COLUMNS,
    Learner,
    Objective,
    Signal,
    logits_of,
    model_inputs,
)
from .pending_losses import PendingLosses  # noqa: E402
from .plans import plan  # noqa: E402
from .schedulers import DECAYS, decay_schedule  # noqa: E402
from .shards import cut_like, gathered  # noqa: E402
from .stepping import PreparedOptimizer, SparingCallbackHandler  # noqa: E402
from .transfer_config import TransferConfig  # noqa: E402
from .traversals import Traversals  # noqa: E402

if TYPE_CHECKING:
    from .weights import ExponentialAverage

logger = logging.getLogger(__name__)

STATE_FILE = "transfer_state.pt"


class NonFiniteLoss(TransferError):
    """The training loss became NaN or infinite; training stopped before the weights were touched."""


class SaveFailed(TransferError, OSError):
    """A checkpoint could not be written; the ones before it are whole."""


class TransferTrainer(Trainer):
    """A transformers Trainer that minimises a sum of terms over the data contract.

    Args:
        *args: As for `transformers.Trainer`.
        objectives: The terms, for example `[CrossEntropy(), DANN(weight=1.0)]`. None: the model's own loss, as the
            stock Trainer does.
        **kwargs: As for `transformers.Trainer`. `args` is a TransferConfig (or TrainingArguments).

    Raises:
        TransferError: If the terms cannot be combined with the arguments.
    """

    args: Any  # TransferConfig, or plain TrainingArguments
    model: Any
    _signature_columns: Any

    def __init__(self, *args: Any, objectives: Sequence[Objective] | None = None, **kwargs: Any) -> None:
        self.learner: Learner | None = None
        self.ema: ExponentialAverage | None = None
        self._counts: dict[str, Tensor] | None = None
        self._term_sums: dict[str, Tensor] = {}
        self._terms_logged_at = 0
        self.predictions_kept = True  # whether the evaluation under way returns all logits, as predict() does
        self.evaluated: Any = None  # the dataset of the last evaluation or prediction, as it was passed
        self._walks: Traversals | None = None  # None where the stock Trainer's step runs
        self._losses = PendingLosses()
        self._streamed: dict[str, Any] | None = None  # metrics so far; None where the Trainer asks for them
        self._flops_an_input: int | None = None
        super().__init__(*args, **kwargs)
        seen = self.callback_handler
        self.callback_handler = SparingCallbackHandler(
            seen.callbacks, seen.model, seen.processing_class, seen.optimizer, seen.lr_scheduler
        )
        self._lay_out()
        self.objectives = list(objectives or ())
        if self.objectives:
            self._take_objectives()
        elif _averages_its_own_loss(self.model):
            self.model_accepts_loss_kwargs = False
        if (self._option("sampling") or "random") != "random" and isinstance(self.train_dataset, IterableDataset):
            raise TransferError(
                f"sampling={self.args.sampling!r} needs a dataset with a length, and this one streams: balance it "
                "where it is made, or load it without streaming."
            )
        self._add_own_callbacks()

    def _lay_out(self) -> None:
        if self._option("channels_last"):
            to_channels_last(self.model)

    def _add_own_callbacks(self) -> None:
        if self._option("stop_on_nonfinite_loss"):
            self.add_callback(_StopAtNonFiniteLoss(self))
        if self._option("ema_decay"):
            self.add_callback(_UpdateAverage(self))
        if self._option("early_stopping_patience"):
            self.add_callback(EarlyStoppingCallback(self._option("early_stopping_patience")))
        if isinstance(self.args, TransferConfig) and self.args.disable_tqdm:
            self.remove_callback(PrinterCallback)
            self.add_callback(_LogToLogger)

    # ---- terms ------------------------------------------------------------------------------------------------------

    def _take_objectives(self) -> None:
        if self.args.label_smoothing_factor:
            raise TransferError(
                "label_smoothing_factor does not reach explicit objectives: pass "
                f"CrossEntropy(label_smoothing={self.args.label_smoothing_factor}) among them, and leave it 0."
            )
        if self.compute_loss_func is not None:
            raise TransferError("Pass objectives or compute_loss_func, not both: make the function an Objective.")
        if self.is_deepspeed_enabled:
            raise TransferError(
                "objectives are not supported under DeepSpeed: launch with FSDP or DDP (accelerate launch, torchrun), "
                "or train without terms."
            )
        if self.is_fsdp_enabled and (obstacle := self.why_no_fsdp()) is not None:
            raise TransferError(f"Under FSDP objectives do not go with {obstacle}; or launch with DDP.")
        if self.args.n_gpu > 1:
            logger.warning("Several GPUs in one process: only the first is used. Start with `accelerate launch`.")
            self.args._n_gpu = 1
        self.label_names = self.label_names or ["labels"]  # the model need not take labels: the terms do
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = False
        self._build_learner()

    def why_no_fsdp(self) -> str | None:
        """What of this run is not known to train under FSDP as under DDP, and what to do instead; None if nothing."""
        return fsdp.why_not(self.accelerator.state.fsdp_plugin, self.args, self.model)

    def _build_learner(self) -> None:
        """Made with the model as it starts, before a checkpoint is loaded: terms may remember the starting weights."""
        self.learner = self.make_learner()
        self.learner.objectives.to(self.args.device)
        if self.optimizer is not None:
            held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            if any(p.requires_grad and id(p) not in held for p in self.learner.objectives.parameters()):
                raise TransferError(
                    "The optimizer that was passed does not hold the parameters that the objectives own: they would "
                    "never train. Pass optimizer_cls_and_kwargs=(class, options) instead, or set `optim`."
                )

    def make_learner(self) -> Learner:
        """The module that computes the summed loss, around `self.model`; a subclass may connect its terms first."""
        return Learner(self.model, self.objectives, _anatomy(self.model))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if not any(p.requires_grad for p in self.model.parameters()):
            raise TransferError("Nothing is left to train: every parameter is frozen. Apply another tuning.")
        self._lay_out()  # of model_init a new one
        if self._option("ema_decay"):
            from .weights import ExponentialAverage

            self.ema = ExponentialAverage(self.model, self.args.ema_decay)
        self._term_sums, self._terms_logged_at = {}, self.state.global_step
        self._log_plan()
        self._losses, self._walks = PendingLosses(), None
        if self.learner is None:
            return self._prepared(max_steps, train_dataloader, resume_from_checkpoint)
        if self.learner.model is not self.model:  # model_init made a new one
            self._build_learner()
        by_ddp = self.accelerator.distributed_type in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        self.learner.answers_detached = by_ddp
        self.before_training(max_steps)
        with self._learner_in_place():
            return self._prepared(max_steps, train_dataloader, resume_from_checkpoint)

    def _prepared(self, *args: Any) -> Any:
        if self._why_stock_step() is None:
            optimizer: Any = self.create_optimizer()
            if not isinstance(optimizer, AcceleratedOptimizer):
                accelerator: Any = self.accelerator
                self.optimizer = PreparedOptimizer(optimizer, accelerator.device_placement, accelerator.scaler)
        if self.learner is None or not self.is_fsdp_enabled:
            return super()._prepare_for_training(*args)
        fsdp.reshard(self.learner)  # of a training before, whose model the user may have run
        fsdp.plan_cut(self.accelerator.state.fsdp_plugin, self.learner)
        prepared = super()._prepare_for_training(*args)
        fsdp.keep_gathered(self.learner)
        return prepared

    def _why_stock_step(self) -> str | None:
        """What of the arguments only the stock Trainer's own step knows; None where ours does the same."""
        plain = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        if self.accelerator.distributed_type not in plain or self.is_fsdp_enabled:
            return f"{self.accelerator.distributed_type} training"
        asked = {
            "a parallelism_config": getattr(self.accelerator, "parallelism_config", None) is not None,
            "a model that is sharded as it loads": self.is_distributed_loading_by_transformers,
            f"optim={self.args.optim!r}": "lomo" in str(self.args.optim),
            "several GPUs in one process": self.args.n_gpu > 1,
            "torch_empty_cache_steps": self.args.torch_empty_cache_steps is not None,
            "SageMaker's model parallelism": is_sagemaker_mp_enabled(),
        }
        return next((what for what, given in asked.items() if given), None)

    def _log_plan(self) -> None:
        if self.is_world_process_zero() and _anatomy(self.model) is not None:
            rates = ("learning_rate", "head_learning_rate", "layer_decay")
            logger.info("%s", plan(self.model, **{name: getattr(self.args, name, None) for name in rates}))

    # ---- what a subclass with a teacher adds ------------------------------------------------------------------------

    def before_training(self, max_steps: int) -> None:
        """Called once all is known, before the model is wrapped; here nothing."""

    def teacher_signal(self, inputs: Mapping[str, Any]) -> Any:
        """What a teacher says of a training batch, for `step.teacher`; None without one."""
        return None

    def evaluation_signal(self, inputs: Mapping[str, Any]) -> Any:
        """What a teacher says of an evaluation batch, for `step.teacher`; None without one."""
        return None

    def extra_columns(self) -> Sequence[str]:
        """Columns of the data that batches keep beside the model's own and the contract's."""
        return ()

    def data_epoch(self, epoch: int) -> int:
        """The epoch by which augmentation draws in this epoch of training."""
        return epoch

    def observe_evaluation(self, inputs: Mapping[str, Any], logits: Tensor) -> None:
        """Sees each batch of an evaluation, on this process; here nothing."""

    def labels_left(self, inputs: Mapping[str, Any], labels: Any) -> Any:
        """Those whose logits an evaluation returns, where metrics were shown the others already; here all."""
        return labels

    def evaluation_metrics(self) -> dict[str, float]:
        """Metrics of what `observe_evaluation` saw since the last call, the same on every process; here none."""
        return {}

    def rows_in_order(self, dataset: Any, order: Sequence[int] | None = None, size: int | None = None) -> Any:
        """This process's collated batches of a dataset on its device; all processes' together hold every row.

        Args:
            dataset: Rows that can be indexed.
            order: Positions of all of them; by default as they stand.
            size: Rows of a batch; by default those of an evaluation.
        """
        dropping, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return self._get_dataloader(
                dataset,
                "Rows in order",
                size or self.args.eval_batch_size,
                sampler_fn=lambda rows: cast(Any, order or SequentialSampler(cast(Any, rows))),
            )
        finally:
            self.args.dataloader_drop_last = dropping

    def sample_batch(self, rows: int = 2) -> dict[str, Any]:
        """The first rows of the training data as one batch, on the CPU; reads nothing else."""
        dataset: Any = self.train_dataset
        if isinstance(dataset, IterableDataset):
            return self.data_collator(list(islice(dataset, rows)))
        return self.batch_of(range(min(rows, len(dataset))))

    def batch_of(self, rows: Sequence[int]) -> dict[str, Any]:
        """These rows of the training data as one batch, on the CPU."""
        dataset: Any = self.train_dataset
        if hasattr(dataset, "column_names"):
            dataset = self._remove_unused_columns(dataset, description="training")
        return self.data_collator([dataset[row] for row in rows])

    @contextmanager
    def _learner_in_place(self) -> Iterator[None]:
        """The learner stands where the Trainer takes the model from; afterwards the user's model is back."""
        model = self.model
        if self.model_wrapped is model:
            self.model_wrapped = cast(Learner, self.learner)
        self.model = self.learner
        try:
            yield
        finally:
            self.model = model
            self.callback_handler.model = model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the Trainer's; with a layer decay or a head rate, over groups by depth (learning_rates.py)."""
        if self.optimizer is None and (self._option("layer_decay") or self._option("head_learning_rate")):
            user_model: Any = self.learner.model if self.learner is not None else self.model
            groups = parameter_groups(
                user_model,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                head_learning_rate=self.args.head_learning_rate,
                layer_decay=self.args.layer_decay,
            )
            if self.learner is not None and (own := list(self.learner.objectives.parameters())):
                rate = self.args.head_learning_rate or self.args.learning_rate
                groups.append({"params": own, "lr": rate, "weight_decay": self.args.weight_decay, "name": "terms"})
            optimizer_cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, user_model
            )
            self.optimizer_cls_and_kwargs = (optimizer_cls, {**kwargs, "params": groups})
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As the Trainer's, and "step" and "multistep"."""
        if self.lr_scheduler is None and self.args.lr_scheduler_type in DECAYS:
            factor = decay_schedule(
                self.args.lr_scheduler_type,
                num_training_steps,
                self.args.get_warmup_steps(num_training_steps),
                self.args.lr_scheduler_kwargs or {},
            )
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(cast(Any, optimizer or self.optimizer), factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    # ---- a step -----------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Also counts, over all processes, the items of each term in the batches about to be accumulated."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.learner is not None and samples:
            if not self.learner.training:  # an evaluation came between; terms count more in training
                self.learner.train()
            alone = len(samples) == 1 and self.args.world_size == 1
            self._counts = None if alone else self._counts_over_processes(samples)
        return samples, items

    def _counts_over_processes(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Items by term, divided by the number of processes, over which the engine averages gradients."""
        assert self.learner is not None
        counted = [self.learner.counts(batch) for batch in batches]
        names = list(counted[0])
        if not names:
            return {}
        totals = torch.stack(
            [torch.stack([count[name].to(self.args.device) for count in counted]).sum() for name in names]
        )
        totals = self.accelerator.reduce(totals, "sum") / self.accelerator.num_processes
        return dict(zip(names, totals, strict=True))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As the Trainer's, without a walk through the network; remembers the loss for `stop_if_not_finite`."""
        ids = inputs.get("example_id")
        if self._walks is None or self._walks.model is not model:
            loss = super().training_step(model, inputs, num_items_in_batch)
            if self._option("stop_on_nonfinite_loss"):
                self._losses.add(loss, ids)
            return loss
        self._walks.train()
        if hasattr(self.optimizer, "train"):
            cast(Any, self.optimizer).train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            with_counts = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = with_counts or self.compute_loss_func is not None
        if not scaled:
            loss = loss / self.current_gradient_accumulation_steps
        if self._option("stop_on_nonfinite_loss"):
            self._losses.add(loss.detach(), ids)
        if self.accelerator.scaler is None and self.accelerator.gradient_accumulation_steps == 1:
            loss.backward()  # as accelerate does after a division by 1
        else:
            self.accelerator.backward(loss)
        return loss.detach()

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        """As the Trainer's; with terms under FSDP accelerate's autocast, which else is around the model's forward."""
        if self.learner is not None and self.is_fsdp_enabled:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(cache_enabled)

    def stop_if_not_finite(self) -> None:
        """Before the optimizer uses the gradients of the losses since its last step.

        On every process at once: the gradient of one is in the average of all, and none may save it.

        Raises:
            NonFiniteLoss: If one of them is NaN or infinite.
        """
        found = self._losses.first_bad()
        if self.args.world_size > 1:
            bad = torch.tensor(float(found is not None), device=self.args.device)
            if self.accelerator.reduce(bad, "sum") > 0 and found is None:
                raise NonFiniteLoss(
                    f"The training loss of another process is not finite at step {self.state.global_step}; its "
                    "message names the examples."
                )
        if found is not None:
            raise NonFiniteLoss(self._describe_nonfinite(*found))

    def _describe_nonfinite(self, loss: float, ids: Tensor | None) -> str:
        rows = "unknown (the data has no example_id column)" if ids is None else str(ids.tolist())
        kept = last_complete_checkpoint(self.args.output_dir)
        return (
            f"The training loss is {loss} at step {self.state.global_step}. Examples in the batch: {rows}. "
            f"The weights were not updated with it; last good checkpoint: {kept or 'none was saved'}. "
            "Look at these rows, lower learning_rate, set max_grad_norm, or train in bf16 instead of fp16."
        )

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self._walks is None:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        return self._walks.clip_grad_norm(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._walks is not None:
            self.accelerator.unscale_gradients()
            grad_norm = self._walks.clip_grad_norm(math.inf)
        return super()._get_grad_norm(model, grad_norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As the Trainer's, which counts the network's parameters anew for every batch."""
        main = getattr(self.model, "main_input_name", "input_ids")
        if self._flops_an_input is None or main not in inputs:
            return super().floating_point_ops(inputs)
        return self._flops_an_input * inputs[main].numel()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The weighted sum of the terms; without terms, the model's own loss."""
        if self.learner is None:
            inputs = _for_model(inputs)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        if model is self.model:  # evaluation hands in the bare model
            model = self.learner
            if model.training != self.model.training:
                model.train(self.model.training)
        progress = self.state.global_step / max(self.state.max_steps, 1)
        training = self.model.training
        signal: Signal = model(
            inputs,
            progress=progress,
            counts=self._counts if training else None,
            micro_batches=self.current_gradient_accumulation_steps if training else 1,
            teacher=self.teacher_signal(inputs) if training else self.evaluation_signal(inputs),
        )
        if training:
            self._add_terms(signal.terms)
        else:
            self.observe_evaluation(inputs, logits_of(signal.outputs))
        loss = torch.full((), float("nan"), device=self.args.device) if signal.loss is None else signal.loss
        return (loss, _as_mapping(signal.outputs)) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As the Trainer's; rows without labels are predicted too, and streaming metrics take the batch at once."""
        if inputs.get("labels") is None:
            inputs = _for_model(inputs)
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if labels is not None:
            labels = self.labels_left(inputs, labels)
        if self._streamed is None or logits is None or labels is None:
            return loss, logits, labels
        last = self.accelerator.gradient_state.end_of_dataloader
        self._streamed = cast(Any, self.compute_metrics)(
            EvalPrediction(predictions=cast(Any, logits), label_ids=cast(Any, labels)), compute_result=last
        )
        return loss, None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As the Trainer's; with the metrics of `evaluation_metrics` beside the others."""
        if self.learner is not None and self.is_fsdp_enabled and not fsdp.is_cut(self.learner):
            raise TransferError(
                "Under FSDP a model is cut when training begins: evaluate it after train(), or in one process or "
                "under DDP before."
            )
        self.evaluation_metrics()  # forgets an evaluation that was interrupted
        self.predictions_kept = description != "Evaluation" or not self.args.batch_eval_metrics
        if self.accelerator.distributed_type == DistributedType.NO and not self.args.eval_use_gather_object:
            self.gather_function = self._gather_alone
        if self._may_stream(description):
            self._streamed = {}
        try:
            with self._adapters_merged(dataloader), self._loop_without_metrics():
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
                )
            own = {**denumpify_detensorize(self._streamed or {}), **self.evaluation_metrics()}
        finally:
            self._streamed = None
            if self.is_fsdp_enabled:
                fsdp.reshard(self.model if self.learner is None else self.learner)
        own = {f"{metric_key_prefix}_{name.removeprefix(f'{metric_key_prefix}_')}": own[name] for name in own}
        return output._replace(metrics={**(output.metrics or {}), **own})

    def may_merge_adapters(self) -> bool:
        """Whether an evaluation may fold adapters into the weights; not where something else needs these."""
        return True

    def _adapters_merged(self, dataloader: Any) -> AbstractContextManager[Any]:
        """In the precision of the weights, and for so many batches that it pays.

        Merging is a product of matrices a layer, and the adapters of a few batches cost less.
        """
        args = self.args
        rounds = args.bf16 or args.fp16 or args.bf16_full_eval or args.fp16_full_eval
        one = has_length(dataloader) and len(dataloader) < 4
        if rounds or one or self._why_stock_step() is not None or not self.may_merge_adapters():
            return nullcontext()
        from .adapter_merging import merged

        return merged(self.model)

    def _may_stream(self, description: str) -> bool:
        """Whether metrics can take each batch before the Trainer pads and gathers it, to no end in one process."""
        return (
            description == "Evaluation"
            and self.args.batch_eval_metrics
            and self.compute_metrics is not None
            and self.preprocess_logits_for_metrics is None
            and not self.args.include_for_metrics
            and self.accelerator.distributed_type == DistributedType.NO
        )

    @contextmanager
    def _loop_without_metrics(self) -> Iterator[None]:
        """Where metrics are streamed, the Trainer's loop is not told: it would empty a GPU's cache after every batch.

        Delete this when `evaluation_loop` does so no more with `batch_eval_metrics` (transformers 5.24, trainer.py).
        """
        asked = self.args.batch_eval_metrics
        self.args.batch_eval_metrics = asked and self._streamed is None
        try:
            yield
        finally:
            self.args.batch_eval_metrics = asked

    def _gather_alone(self, values: Any, *args: Any, **kwargs: Any) -> Any:
        """As accelerate's `gather_for_metrics` in one process: only what fills up the last batch goes."""
        if self.accelerator.gradient_state.end_of_dataloader:
            return self.accelerator.gather_for_metrics(values, *args, **kwargs)
        return values

    def get_train_dataloader(self) -> Any:
        """As the Trainer's; what is random about stored images is left to an accelerator (data/on_device.py)."""
        from .data.on_device import handing_over

        collator = self.data_collator
        self.data_collator = handing_over(collator, self.train_dataset, self.args.device)
        try:
            loader: Any = super().get_train_dataloader()
        finally:
            self.data_collator = collator
        if self.args.device.type == "cpu" and isinstance(loader, DataLoaderShard):
            loader.device = None  # where the batches are: accelerate would look through each for what to move
        return loader

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As the Trainer's, which looks through a batch that is on the device for what to move there."""
        from .data.on_device import finished

        device = self.args.device
        placed = type(inputs) is dict and all(torch.is_tensor(x) and x.device == device for x in inputs.values())
        as_is = placed and inputs and not self.is_deepspeed_enabled
        return finished(dict(inputs) if as_is else super()._prepare_inputs(inputs), self.train_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As the Trainer's; a dataset never gets the persistent workers of another.

        The Trainer keeps every loader under the key "eval" (https://github.com/huggingface/transformers, trainer.py,
        get_eval_dataloader). Delete this when it keeps them by dataset.
        """
        named = isinstance(eval_dataset, str)
        dataset: Any = self.eval_dataset if eval_dataset is None or named else eval_dataset
        if named:
            dataset = dataset[eval_dataset]
        elif dataset is not self.evaluated:
            getattr(self, "_eval_dataloaders", {}).pop("eval", None)
        self.evaluated = dataset
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As the Trainer's."""
        self.evaluated = test_dataset
        return super().get_test_dataloader(test_dataset)

    # ---- data -------------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known = list(self._signature_columns or ())
        wanted = [*CONTRACT_COLUMNS, *self.extra_columns()]
        self._signature_columns = [*known, *(name for name in wanted if name not in known)]

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        if getattr(dataset, "format", {}).get("type") == "custom":
            return dataset  # with_transform: the columns the model sees are made from these
        return super()._remove_unused_columns(dataset, description)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampling = self._option("sampling") or "random"
        if sampling == "random":
            return super()._get_train_sampler(train_dataset)
        from .data.sampling import BalancedSampler

        dataset = self.train_dataset if train_dataset is None else train_dataset
        if sampling == "balanced_classes":
            return BalancedSampler.over_classes(dataset, seed=self.args.data_seed)
        return BalancedSampler.over_domains(dataset, batch_size=self._train_batch_size, seed=self.args.data_seed)

    def _run_epoch(self, model: nn.Module, epoch: int, train_dataloader: Any, *args: Any, **kwargs: Any) -> None:
        """Tells the epoch to all that draws by (seed, epoch): the order of rows, augmentation, mixing."""
        from .data.replay import dataset_epoch

        for counter in filter(None, map(dataset_epoch, (self.train_dataset, self.data_collator))):
            counter.set(self.data_epoch(epoch))
        for sampler in _samplers(train_dataloader):
            if isinstance(sampler, LengthGroupedSampler):  # it draws from the global generator, which a resume moves
                sampler.generator = torch.Generator().manual_seed((self.args.data_seed or self.args.seed) + epoch)
            elif hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        if self._walks is None:
            self._find_what_steps_touch(model)
        with self.learner.listening() if self.learner is not None else nullcontext():
            super()._run_epoch(model, epoch, train_dataloader, *args, **kwargs)

    def _find_what_steps_touch(self, model: nn.Module) -> None:
        """Once a training: its optimizer holds the same parameters to the end."""
        self._flops_an_input = None
        if hasattr(self.model, "num_parameters"):
            self._flops_an_input = 6 * self.model.num_parameters(exclude_embeddings=True)
        if (reason := self._why_stock_step()) is not None:
            logger.info("The stock Trainer's step runs, because of %s.", reason)
            return
        self._walks = Traversals(model)
        if self.learner is not None:
            self.learner.trained = self._walks.parameters if model is self.learner else None

    # ---- log --------------------------------------------------------------------------------------------------------

    def _add_terms(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():  # a CUDA graph writes the next step's over them
            self._term_sums[name] = self._term_sums[name] + value if name in self._term_sums else value.clone()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; a training log also carries every term's unweighted mean, under its own name."""
        if "loss" in logs and self._term_sums:
            steps = max(self.state.global_step - self._terms_logged_at, 1)
            sums = self.accelerator.reduce(torch.stack([v.float() for v in self._term_sums.values()]), "mean")
            logs.update(zip(self._term_sums, (sums / steps).tolist(), strict=True))
            self._term_sums, self._terms_logged_at = {}, self.state.global_step
        super().log(logs, start_time)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's. `resume_from_checkpoint=True` takes the last checkpoint that was saved whole."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise TransferError(
                    f"No valid checkpoint found in output directory ({self.args.output_dir}): none there was saved "
                    "whole. Train anew, or name the checkpoint."
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        existed = folder.exists()
        if self.is_fsdp_enabled:
            # With SHARDED_STATE_DICT the Trainer asks whether the best checkpoint's folder exists before anything is
            # in it, and processes may disagree: one would wait for ever for the others to load it. Delete this when
            # it makes the folder first (transformers 5.24, trainer.py, _save_checkpoint).
            self.accelerator.wait_for_everyone()  # all have looked whether it existed
            folder.mkdir(parents=True, exist_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if self.args.should_save and not existed:
                shutil.rmtree(folder, ignore_errors=True)
            if not isinstance(error, (OSError, RuntimeError, SafetensorError)):  # what a full disk shows as
                raise
            kept = last_complete_checkpoint(folder.parent)
            raise SaveFailed(
                f"Could not save {folder}: {error}. What was half written is removed; the last whole checkpoint is "
                f"{kept or 'none'}. Free some space and resume with resume_from_checkpoint=True."
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        ours = state_dict is None or self.is_fsdp_enabled
        if not ours or not isinstance(plain_model(self.model), PreTrainedModel):
            if state_dict is None and self._option("channels_last"):
                state_dict = contiguous(self.model.state_dict())
            return super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return None
        from transformers.trainer import TRAINING_ARGS_NAME

        from .hub import bundle

        folder = Path(output_dir or self.args.output_dir)
        processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        bundle.save(  # a run may write a checkpoint again
            self.model, folder, processor=processor, overwrite=True, state_dict=state_dict
        )
        torch.save(self.args, folder / TRAINING_ARGS_NAME)
        return None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.learner is not None and self.is_fsdp_enabled:
            self._save_sharded(output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
        state = self._own_state()
        if self.args.should_save and state:
            torch.save(state, Path(output_dir) / STATE_FILE)

    def _save_sharded(self, output_dir: str) -> None:
        """As the Trainer's: weights by the model's names, not the learner's; the optimizer holds the terms' too."""
        plugin: Any = self.accelerator.state.fsdp_plugin
        save_fsdp_model(plugin, self.accelerator, self.model, output_dir, **get_fsdp_ckpt_kwargs())
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.learner, output_dir)
        if self.args.should_save:
            torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.learner is not None and model is self.learner:  # FSDP loads into what it has wrapped
            model = self.learner.model
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _own_state(self) -> dict[str, Any]:
        """What the Trainer's checkpoint lacks; every process calls this, as under FSDP all gather it."""
        state: dict[str, Any] = {}
        if self.learner is not None:
            state["objectives"] = gathered(self.learner.objectives.state_dict())
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        if plain_model(self.model) is not self.model:  # an adapter folder leaves out what moved in the base
            state["buffers"] = dict(plain_model(self.model).named_buffers())
        return state

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not (Path(checkpoint) / STATE_FILE).is_file():
            return
        state = torch.load(Path(checkpoint) / STATE_FILE, map_location="cpu", weights_only=True)
        user_model = self.learner.model if self.learner is not None else self.model
        if self.learner is not None:
            there = self.learner.objectives.state_dict()
            self.learner.objectives.load_state_dict(
                {name: cut_like(value, there[name]) for name, value in state["objectives"].items()}
            )
        if self.ema is not None and "ema" in state:
            self.ema.load_state_dict(state["ema"])
        buffers = dict(plain_model(user_model).named_buffers())
        for name, value in state.get("buffers", {}).items():
            buffers[name].copy_(value)

    # ---- the average of the weights ---------------------------------------------------------------------------------

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Evaluation sees the averaged weights, training goes on with its own."""
        if self.ema is None:
            yield
            return
        self.ema.swap(self.model)
        try:
            yield
        finally:
            self.ema.swap(self.model)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's; on the averaged weights where there are any."""
        with self._averaged():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; on the averaged weights where there are any."""
        with self._averaged():
            return super().predict(*args, **kwargs)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.ema is not None:
            path = Path(str(self.state.best_model_checkpoint)) / STATE_FILE
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.ema.load_state_dict(state["ema"])

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._finalize_training(*args, **kwargs)
        cast(Any, plain_model(self.model)).was_trained = True  # a new head is new no more: it may teach
        if self.ema is not None:  # from here on the average is the model
            self.ema.swap(self.model)
            self.ema = None
        return output

    def _option(self, name: str) -> Any:
        """An option of TransferConfig; None where the arguments are plain TrainingArguments."""
        return getattr(self.args, name) if isinstance(self.args, TransferConfig) else None


class _UpdateAverage(TrainerCallback):
    """Takes each new state of the weights into their average."""

    def __init__(self, trainer: TransferTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.ema is not None:
            self.trainer.ema.update(self.trainer.model)


class _StopAtNonFiniteLoss(TrainerCallback):
    """Looks at the losses before the optimizer uses their gradients."""

    def __init__(self, trainer: TransferTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.stop_if_not_finite()


class _LogToLogger(TrainerCallback):
    """In the place of transformers' PrinterCallback, which prints: a library logs."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_local_process_zero:
            logger.info("%s", {k: round(v, 6) if isinstance(v, float) else v for k, v in (logs or {}).items()})


def _anatomy(model: nn.Module) -> Anatomy | None:
    """The model's map; None for a model without any layer that could give logits."""
    try:
        return Anatomy.of(model)
    except TransferError:
        return None


def _samplers(loader: Any) -> Iterator[Any]:
    """The samplers under a prepared loader, outermost first.

    accelerate's set_epoch does not reach through SkipBatchSampler over BatchSamplerShard, so that a run resumed on
    several processes would draw the first epoch's order again.
    """
    sampler = getattr(loader, "batch_sampler", None)
    while sampler is not None:
        yield sampler
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)


def _averages_its_own_loss(model: nn.Module) -> bool:
    """Whether a model's loss is a mean over its batch, though its forward takes **kwargs.

    The stock Trainer believes that any forward with **kwargs divides by `num_items_in_batch`; classification heads do
    not, so accumulated gradients come out multiplied (https://github.com/huggingface/transformers/issues/47688).
    Delete this when the Trainer asks the loss instead of the signature.
    """
    heads = ("SEQUENCE", "TOKEN", "IMAGE", "AUDIO")
    tables = [getattr(modeling_auto, f"MODEL_FOR_{head}_CLASSIFICATION_MAPPING_NAMES") for head in heads]
    return type(plain_model(model)).__name__ in {name for table in tables for name in _flat(table.values())}


def _flat(names: Any) -> Iterator[str]:
    for name in names:
        yield from (name,) if isinstance(name, str) else name


def _for_model(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs without the contract's columns that no model takes."""
    kept = model_inputs(inputs)
    return kept if inputs.get("labels") is None else {**kept, "labels": inputs["labels"]}


def _as_mapping(outputs: Any) -> Mapping[str, Any]:
    """A model's outputs as the Trainer's evaluation reads them."""
    if isinstance(outputs, Mapping):
        return outputs
    return {"logits": outputs if torch.is_tensor(outputs) else outputs[0]}
