"""While adapters are merged the network computes the same; afterwards its weights are those before, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, set_seed

from hf_transfer import LoRA, TransferConfig, TransferTrainer
from hf_transfer.adapter_merging import merged
from hf_transfer.evaluation import compute_metrics_for
from hf_transfer.objectives import CrossEntropy
from hf_transfer.tuning import Peft

IDS = torch.arange(24).reshape(2, 12)


def adapted(tuning: Any | None = None) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50, num_labels=3
    )
    model = (tuning or LoRA()).apply(BertForSequenceClassification(config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # they start at 0
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def test_the_same_outputs_and_the_weights_back_bit_for_bit() -> None:
    model = adapted()
    before, live = state(model), model(input_ids=IDS).logits
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    with merged(model) as whether:
        assert whether
        assert all(layer.merged for layer in layers)
        changed = state(model)
        torch.testing.assert_close(model(input_ids=IDS).logits, live, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(changed[name], before[name]) for name in before)
    assert not any(layer.merged for layer in layers)
    after = state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model(input_ids=IDS).logits, live)


def test_the_weights_are_back_after_an_error() -> None:
    model = adapted()
    before = state(model)
    with pytest.raises(KeyboardInterrupt), merged(model):
        raise KeyboardInterrupt
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


def test_what_does_not_merge_exactly_is_left() -> None:
    from peft import IA3Config, LoraConfig

    targets = ["query", "value"]
    ia3 = adapted(Peft(IA3Config(target_modules=[*targets, "output.dense"], feedforward_modules=["output.dense"])))
    dora = adapted(Peft(LoraConfig(target_modules=targets, use_dora=True)))
    for model in (ia3, dora, adapted().to(torch.bfloat16), nn.Linear(2, 2)):
        with merged(model) as whether:
            assert not whether


def test_a_weight_that_another_module_shares_is_left() -> None:
    model = adapted()
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    model.twin = nn.Linear(16, 16)
    model.twin.weight = layer.get_base_layer().weight
    with merged(model) as whether:
        assert not whether


class Watch(TrainerCallback):
    """Whether layers are merged in the middle of an evaluation, and at its end."""

    def __init__(self) -> None:
        self.within: set[bool] = set()
        self.after: set[bool] = set()

    def _merged(self, model: Any) -> bool:
        return any(module.merged for module in model.modules() if hasattr(module, "lora_A"))

    def on_prediction_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.within.add(self._merged(model))

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.after.add(self._merged(model))


def trainer(folder: Path, rows: int = 40, **options: Any) -> TransferTrainer:
    draw = torch.Generator().manual_seed(1)
    data = Dataset.from_dict({
        "input_ids": torch.randint(1, 50, (rows, 12), generator=draw).tolist(),
        "labels": torch.randint(0, 3, (rows,), generator=draw).tolist(),
        "example_id": list(range(rows)),
    })  # fmt: skip
    args = TransferConfig(
        output_dir=str(folder), per_device_train_batch_size=8, per_device_eval_batch_size=8, num_train_epochs=2,
        use_cpu=True, report_to="none", disable_tqdm=True, eval_strategy="epoch", save_strategy="no",
        learning_rate=1e-2, batch_eval_metrics=True, **options,
    )  # fmt: skip
    return TransferTrainer(
        model=adapted(), args=args, train_dataset=data, eval_dataset=data, objectives=[CrossEntropy()],
        compute_metrics=compute_metrics_for("text-classification", 3),
    )  # fmt: skip


def test_evaluations_and_predictions_are_merged_and_training_is_not_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, live = trainer(tmp_path / "merged"), trainer(tmp_path / "live")
    seen = Watch()
    watch.add_callback(seen)
    monkeypatch.setattr(live, "may_merge_adapters", lambda: False)
    for each in (watch, live):
        set_seed(0)  # dropout
        each.train()
    assert seen.within == {True} and seen.after == {False}
    a, b = state(watch.model), state(live.model)
    assert all(torch.equal(a[name], b[name]) for name in a)
    losses = [
        [entry["eval_loss"] for entry in each.state.log_history if "eval_loss" in entry] for each in (watch, live)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    predicted = [each.predict(each.eval_dataset).predictions for each in (watch, live)]
    assert predicted[0] == pytest.approx(predicted[1], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("options", [{"rows": 24}, {"bf16": True}], ids=["few batches", "autocast"])
def test_where_it_does_not_pay_or_rounds_it_is_left(tmp_path: Path, options: dict[str, Any]) -> None:
    seen = Watch()
    each = trainer(tmp_path, **options)
    each.add_callback(seen)
    each.evaluate()
    assert seen.within == {False}
