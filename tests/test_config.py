"""The one command line: what overrides what, what is converted, and what each mistake says."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from hf_transfer.config import RunConfig, parse, parse_given
from hf_transfer.errors import TransferError
from hf_transfer.transfer_config import TransferConfig

RECIPE = {"model": "timm/resnet18.a1_in1k", "dataset": "uoft-cs/cifar10"}

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(text)` is the path of a YAML file that holds `text`."""

    def path(text: str) -> str:
        file = tmp_path / "run.yaml"
        file.write_text(text)
        return str(file)

    return path


def read(*argv: str, **defaults: Any) -> tuple[RunConfig, TransferConfig]:
    return parse(argv, defaults={**RECIPE, **defaults}, description="a test")


# Layers


def test_command_line_over_yaml_over_recipe_over_field(write: Write) -> None:
    file = write("learning_rate: 0.002\nweight_decay: 0.02\ntuning: lora\nlora_r: 4\n")
    run, args = read(
        "--config", file, "--learning_rate", "0.003", "--lora_r", "8",
        learning_rate=0.001, weight_decay=0.01, adam_beta1=0.8, lora_r=2,
    )  # fmt: skip
    assert (args.learning_rate, args.weight_decay, args.adam_beta1) == (0.003, 0.02, 0.8)
    assert (run.lora_r, run.tuning, run.model) == (8, "lora", RECIPE["model"])
    assert args.adam_beta2 == TransferConfig(output_dir="x").adam_beta2
    assert isinstance(args, TransferConfig)


def test_yaml_may_give_what_is_required(write: Write) -> None:
    run, _ = parse(["--config", write("model: resnet18\ndataset: digits\n")], defaults={}, description="")
    assert (run.model, run.dataset) == ("resnet18", "digits")


def test_argv_is_the_process_own_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["recipe.py", "--model", "resnet18", "--seed=7"])
    run, args = parse(defaults=RECIPE, description="")
    assert (run.model, args.seed) == ("resnet18", 7)


def test_every_shared_flag_of_the_recipes(tmp_path: Path) -> None:
    run, args = read(
        "--model", "m", "--dataset", "d", "--tuning", "partial", "--output_dir", str(tmp_path), "--image_size", "96",
        "--max_length", "48", "--max_train_samples", "10", "--max_eval_samples", "5", "--lora_r", "4",
        "--train_blocks", "3", "--layer_decay", "0.75", "--seed", "3", "--push_to_hub", "true",
    )  # fmt: skip
    assert run == RunConfig(
        model="m", dataset="d", tuning="partial", image_size=96, max_length=48, max_train_samples=10,
        max_eval_samples=5, lora_r=4, train_blocks=3,
    )  # fmt: skip
    assert (args.output_dir, args.layer_decay, args.seed, args.push_to_hub) == (str(tmp_path), 0.75, 3, True)


def test_given_holds_what_was_given_and_nothing_else(write: Write) -> None:
    file = write("weight_decay: 1e-2\nlora_r: 4\neval_steps: null\n")
    _, given = parse_given(
        ["--config", file, "--no_dataloader_pin_memory", "--seed=5", "--output-dir", "here"],
        defaults=RECIPE | {"learning_rate": 1e-3, "eval_steps": 10},
        description="",
    )
    assert given == {
        "weight_decay": 0.01,
        "learning_rate": 0.001,
        "eval_steps": None,
        "dataloader_pin_memory": False,
        "seed": 5,
        "output_dir": "here",
    }


def test_each_given_value_is_logged_with_its_source(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    file = write("weight_decay: 0.02\nlora_r: 4")
    with caplog.at_level(logging.INFO, "hf_transfer.config"):
        read("--config", file, "--lora-r", "8", learning_rate=1e-3)
    assert {
        "learning_rate = 0.001 (from the recipe)",
        f"weight_decay = 0.02 (from {file})",
        "lora_r = 8 (from the command line)",
    } <= set(caplog.messages)
    assert not any(message.startswith("adam_beta1") for message in caplog.messages)


# Output folder


def test_output_dir_tells_runs_apart_unless_given() -> None:
    assert read()[1].output_dir == "runs/resnet18.a1_in1k-cifar10-full"
    assert read("--model", "../a/my net/", "--tuning", "lora")[1].output_dir == "runs/my-net-cifar10-lora"
    assert read(output_dir="mine")[1].output_dir == "mine"
    assert read("--output_dir", "yours", output_dir="mine")[1].output_dir == "yours"


# Conversion


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("learning_rate: 1e-3", 1e-3),  # a str to YAML 1.1
        ("learning_rate: 1.0e-3", 1e-3),
        ("learning_rate: '0.5'", 0.5),
        ("num_train_epochs: 2", 2.0),
        ("max_steps: -1", -1),
        ("bf16: false", False),
        ("dataloader_pin_memory: no", False),
        ("eval_strategy: no", "no"),  # a bool to YAML 1.1
        ("eval_strategy: epoch", "epoch"),
        ("run_name: 7", "7"),
        ("eval_steps: null", None),
        ("report_to: [tensorboard, wandb]", ["tensorboard", "wandb"]),
        ("include_for_metrics: [loss]", ["loss"]),
        ("include_for_metrics: loss", ["loss"]),
        ("lr_scheduler_kwargs: {num_cycles: 2}", {"num_cycles": 2}),
        ("lr_scheduler_type: multistep", "multistep"),
        ("gradient_checkpointing_kwargs: {use_reentrant: false}", {"use_reentrant": False}),
    ],
)
def test_yaml_values(write: Write, line: str, value: object) -> None:
    _, given = parse_given(["--config", write(line)], defaults=RECIPE, description="")
    assert given[line.partition(":")[0]] == value
    assert type(given[line.partition(":")[0]]) is type(value)


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--bf16", "false"], False),
        (["--load_best_model_at_end", "--seed", "1"], True),
        (["--stop_on_nonfinite_loss", "false"], False),
        (["--no_stop_on_nonfinite_loss"], False),
        (["--greater_is_better", "false"], False),
        (["--greater-is-better=true"], True),
        (["--warmup_steps", "0.1"], 0.1),
        (["--learning_rate", "1e-3"], 1e-3),
        (["--lr_scheduler_type", "step"], "step"),
        (["--lr_scheduler_kwargs", '{"gamma": 0.5}'], '{"gamma": 0.5}'),  # TrainingArguments reads the JSON
        (["--include_for_metrics", "loss", "inputs"], ["loss", "inputs"]),
    ],
)
def test_command_line_values(flags: list[str], value: object) -> None:
    _, given = parse_given(flags, defaults=RECIPE, description="")
    (name,) = given.keys() - {"output_dir", "seed"}
    assert given[name] == value
    assert type(given[name]) is type(value)


def test_parsed_config_is_the_one_python_would_build(write: Write) -> None:
    file = write("lr_scheduler_type: cosine\nwarmup_steps: 0.1\neval_strategy: steps\neval_steps: 10\n")
    _, args = read("--config", file, "--lr_scheduler_kwargs", '{"num_cycles": 2}', output_dir="x")
    expected = TransferConfig(
        output_dir="x", lr_scheduler_type="cosine", warmup_steps=0.1, eval_strategy="steps", eval_steps=10,
        lr_scheduler_kwargs={"num_cycles": 2},
    )  # fmt: skip
    assert args.to_dict() == expected.to_dict()


@pytest.mark.parametrize(
    ("text", "value"), [("3", 3), ("0.5", 0.5), ("layer4", ("layer4",)), ("layer3, layer4", ("layer3", "layer4"))]
)
def test_train_blocks_on_the_command_line(text: str, value: object) -> None:
    run, _ = read("--train_blocks", text)
    assert run.train_blocks == value and type(run.train_blocks) is type(value)


@pytest.mark.parametrize(("text", "value"), [("3", 3), ("0.5", 0.5), ("[layer3, layer4]", ["layer3", "layer4"])])
def test_train_blocks_in_yaml(write: Write, text: str, value: object) -> None:
    run, _ = read("--config", write(f"train_blocks: {text}"))
    assert run.train_blocks == value and type(run.train_blocks) is type(value)


# Mistakes, each one error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat", "1"], r"^unknown flag --learning_rat, did you mean --learning_rate"),
        (["--evaluation_strategy=epoch"], r"^unknown flag --evaluation_strategy, did you mean .*--eval_strategy"),
        (
            ["--data_set", "x", "--modle", "y"],
            r"--data_set, did you mean --dataset.*; unknown flag --modle, .*--model",
        ),
        (["--zzzzz"], r"^unknown flag --zzzzz \(--help lists all\)"),
        (["resnet18"], r"^Unexpected 'resnet18': every value follows a flag, as in --model resnet18\."),
        (["--learning_rate", "fast"], r"--learning_rate.*invalid float value: 'fast'"),
        (["--max_steps", "1.5"], r"--max_steps.*invalid int value: '1.5'"),
        (["--bf16", "maybe"], r"--bf16.*maybe"),
        (["--on_bad_example", "ignore"], r"--on_bad_example.*'ignore'.*raise.*skip"),
        (["--lr_scheduler_type", "cosin"], r"--lr_scheduler_type.*'cosin'.*cosine.*multistep"),
        (["--model"], r"--model.*expected one argument"),
        (["--image_size", "0"], r"^image_size=0 is not valid: it must be a whole number from 1"),
        (["--lora_r", "-2"], r"^lora_r=-2 is not valid"),
        (["--mixup", "-0.1"], r"^mixup=-0.1 is not valid: it must be a number from 0"),
        (["--cutmix", "nan"], r"^cutmix=nan is not valid"),
        (["--class_weights", "even"], r"--class_weights.*'even'.*balanced"),
        (["--layer_decay", "2"], r"^layer_decay=2.0 is not valid"),
        (["--load_best_model_at_end"], r"(?s)load_best_model_at_end.*strategy"),  # TrainingArguments' own ValueError
    ],
)
def test_mistakes_on_the_command_line(flags: list[str], message: str) -> None:
    with pytest.raises(TransferError, match=message):
        read(*flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", r"run.yaml: unknown key learning_rat, did you mean learning_rate"),
        ("a_b_c: 1\nlayer_deca: 1", r"unknown key a_b_c \(--help lists all\); unknown key layer_deca, .*layer_decay"),
        ("config: other.yaml", r"run.yaml: unknown key config"),
        ("learning_rate: fast", r"run.yaml: learning_rate: 'fast' is not valid: it must be float\."),
        ("learning_rate: true", r"learning_rate: True is not valid: it must be float"),
        ("learning_rate: [1, 2]", r"learning_rate: \[1, 2\] is not valid: it must be float"),
        ("learning_rate: null", r"learning_rate: None is not valid"),
        ("max_steps: 1.5", r"max_steps: 1.5 is not valid: it must be int"),
        ("bf16: maybe", r"bf16: 'maybe' is not valid: it must be bool"),
        ("tuning: on", r"tuning: True is not valid: it must be str"),
        ("eval_strategy: yes", r"eval_strategy: True is not valid: it must be one of no, steps, epoch"),
        ("on_bad_example: ignore", r"'ignore' is not valid: it must be one of raise, skip"),
        ("image_size: [96]", r"image_size: \[96\] is not valid: it must be int"),
        ("a: [1", r"--config .*run.yaml cannot be read"),
        ("- 1", r"run.yaml must hold lines such as"),
        ("", r"run.yaml must hold lines such as"),
    ],
)
def test_mistakes_in_yaml(write: Write, text: str, message: str) -> None:
    with pytest.raises(TransferError, match=message):
        read("--config", write(text))


def test_missing_yaml_file() -> None:
    with pytest.raises(TransferError, match=r"--config nowhere.yaml cannot be read: .*No such file"):
        read("--config", "nowhere.yaml")


def test_mistake_in_a_recipe_names_the_recipe() -> None:
    with pytest.raises(TransferError, match="the recipe: unknown key learning_rat, did you mean learning_rate"):
        read(learning_rat=1)


def test_model_and_dataset_must_come_from_somewhere() -> None:
    with pytest.raises(TransferError, match=r"^--model and --dataset must be given"):
        parse([], defaults={}, description="")
    with pytest.raises(TransferError, match=r"^--dataset must be given"):
        parse(["--model", "resnet18"], defaults={}, description="")


def test_help_lists_both_configs_with_the_recipe_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], defaults=RECIPE | {"learning_rate": 0.0123}, description="Trains a thing.")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "Trains a thing." in text and "timm/resnet18.a1_in1k" in text and "0.0123" in text
    names = {*RunConfig.__dataclass_fields__, *TransferConfig.__dataclass_fields__, "config"}
    assert [name for name in names if f"--{name}" not in text and TransferConfig.__dataclass_fields__[name].init] == []


def test_no_name_stands_in_both_configs() -> None:
    assert RunConfig.__dataclass_fields__.keys().isdisjoint(TransferConfig.__dataclass_fields__)
    assert TrainingArguments.__dataclass_fields__.keys() <= TransferConfig.__dataclass_fields__.keys()
