"""Every recipe runs, on tiny data and tiny random networks, by the command lines that it opens with."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import timm
import tiny_runs as tiny
from transformers import AutoModelForImageClassification

import hf_transfer
from hf_transfer import DistillationConfig, TransferError, finetune, load_backbone
from hf_transfer.cli import results_table
from hf_transfer.config import parse_given
from hf_transfer.distill import DistillationRun
from hf_transfer.written_terms import terms_from_text

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
FINETUNES = [recipe for recipe in RECIPES if recipe.name.startswith("finetune_")]
DISTILLS = [recipe for recipe in RECIPES if recipe.name.startswith("distill_")]
FLAGS = (  # every recipe's, beside all of TrainingArguments'
    *("model", "dataset", "tuning", "output_dir", "image_size", "max_length", "max_train_samples", "max_eval_samples"),
    *("lora_r", "train_blocks", "layer_decay", "seed", "config", "push_to_hub"),
)
SHORT = ("--num_train_epochs", "1", "--per_device_train_batch_size", "20", "--use_cpu", "--disable_tqdm", "true")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A recipe sets up logging, as a program may."""
    logger = logging.getLogger("hf_transfer")
    level, handlers = logger.level, logging.root.handlers[:]
    yield
    logger.setLevel(level)
    logging.root.handlers[:] = handlers


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny backbones and data, as a user keeps them."""
    home = tmp_path_factory.mktemp("home")
    tiny.image_backbone(home / "vit", "test_vit")
    tiny.text_backbone(home / "bert")
    tiny.wav2vec2(home / "wav2vec2")
    for split, rows in tiny.digits(classes=["3", "7"]).items():
        for row in rows:
            folder = home / "images" / split / ("three", "seven")[row["label"]]
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{len(list(folder.iterdir()))}.png")
    tiny.parquet_folder(tiny.digits(), home / "digits")
    tiny.parquet_folder(tiny.sentences(), home / "texts")
    tiny.parquet_folder(tiny.tagged_words(), home / "words")
    tiny.parquet_folder(tiny.tones(), home / "sounds")
    tiny.language_model(home / "gpt2")
    lines = datasets.Dataset.from_dict({"text": tiny.texts(12)})
    tiny.parquet_folder(datasets.DatasetDict(train=lines, validation=lines), home / "lines")
    return home


@pytest.fixture(scope="module")
def teachers(home: Path) -> Path:
    """Runs of finetune() to learn from: of two classes of images, and of sentences."""
    quick = {**tiny.QUICK, "save_strategy": "no"}
    finetune("test_resnet", home / "images", pretrained=False, image_size=32, output_dir=home / "resnet", **quick)
    finetune(home / "bert", home / "texts", output_dir=home / "classifier", **quick)
    return home


def launch(recipe: str, *arguments: Any) -> None:
    """`python recipes/RECIPE ARGUMENTS`, in this process."""
    path = str(ROOT / "recipes" / recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path, *map(str, arguments)])
        runpy.run_path(path, run_name="__main__")


# ---- what they do ---------------------------------------------------------------------------------------------------


SMALL = {  # recipe -> (model, data, more flags, what the test split is scored by)
    "finetune_cifar.py": ("vit", "images", ["--tuning", "partial", "--train_blocks", "1"], "accuracy"),
    "finetune_text.py": ("bert", "texts", ["--max_length", "16", "--tuning", "lora", "--lora_r", "2"], "accuracy"),
    "finetune_tokens.py": ("bert", "words", ["--max_length", "16", "--layer_decay", "0.8"], "entity_f1"),
    "finetune_speech.py": ("wav2vec2", "sounds", ["--label_column", "label", "--max_length", "1"], "accuracy"),
    "finetune_xray.py": ("vit", "images", ["--image_size", "32"], "auroc"),
}


@pytest.mark.parametrize("recipe", SMALL)
def test_fine_tuning(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str) -> None:
    if recipe == "finetune_speech.py":
        pytest.importorskip("soundfile")
    model, data, flags, metric = SMALL[recipe]
    folder = tmp_path / "run"
    launch(recipe, "--model", home / model, "--dataset", home / data, "--output_dir", folder, *SHORT, *flags)
    written = tiny.results(folder)
    assert 0 <= written["metrics"]["test"][metric] <= 1
    assert written["model"] == model and written["data"]["name"] == data
    assert (folder / "README.md").is_file() and list(folder.glob("*model.safetensors"))
    printed = capsys.readouterr().out
    assert results_table(folder) in printed
    assert f"{written['trainable_parameters']:,}" in printed and str(folder) in printed
    if recipe == "finetune_xray.py":  # the epoch is chosen on validation, and the rare class weighs more
        assert written["selection"].startswith("The best auroc on validation")
        assert written["options"]["class_weights"] == "balanced"


def test_fine_tuning_by_a_file(home: Path, tmp_path: Path) -> None:
    """The YAML file sets the recipe's defaults aside, and the command line wins over it."""
    config = ROOT / "recipes/configs/finetune_cifar_lora.yaml"
    places = ["--model", home / "vit", "--dataset", home / "images", "--output_dir", tmp_path / "run"]
    launch("finetune_cifar.py", "--config", config, *places, *SHORT, "--learning_rate", "1e-3", "--lora_r", "4")
    written = tiny.results(tmp_path / "run")
    assert written["tuning"] == "lora" and written["options"]["lora_r"] == 4
    assert written["training_arguments"]["learning_rate"] == 1e-3
    assert written["training_arguments"]["num_train_epochs"] == 1
    assert json.loads((tmp_path / "run/adapter_config.json").read_text())["r"] == 4


DISTILLED: dict[tuple[str, str], tuple[str, str, list[str], list[str]]] = {
    # recipe, student -> (teacher, data, more flags, metrics of the last split)
    ("distill_cifar.py", "test_vit"): (
        "resnet", "images",
        ["--image_size", "32", "--objectives", "DKD(beta=2.0)", "AttentionTransfer(layers='last', weight=10.0)"],
        ["accuracy", "agreement", "kl", "teacher_ece"],
    ),
    ("distill_cifar.py", "born-again"): ("resnet", "images", [], ["accuracy", "agreement"]),
    ("distill_sst2.py", "carve:1"): ("classifier", "texts", ["--max_length", "16"], ["accuracy", "agreement"]),
    ("distill_sst2.py", "bilstm"): (
        "classifier", "texts", ["--learning_rate", "2e-3", "--objectives", "LogitMSE(weight=0.9)"], ["student_nll"]
    ),
    ("distill_lm.py", "carve:1"): (
        "gpt2", "lines", ["--max_length", "16", "--chunk_tokens", "8"], ["perplexity", "agreement", "kl"]
    ),
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "student"), DISTILLED)
def test_distilling(
    teachers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, student: str
) -> None:
    teacher, data, flags, metrics = DISTILLED[recipe, student]
    folder = tmp_path / "run"
    places = ["--teacher", teachers / teacher, "--dataset", teachers / data, "--output_dir", folder]
    launch(recipe, "--model", student, *places, *SHORT, "--save_strategy", "no", "--teacher_cache", "never", *flags)
    written = tiny.results(folder)
    split = "test" if data != "lines" else "validation"
    assert set(metrics) <= written["metrics"][split].keys()
    assert written["teacher"] == teacher and written["steps"] > 0
    assert len(written["objectives"]) == 1 + max(1, sum("(" in flag for flag in flags))  # and the labels' own
    assert load_backbone(folder).model.config.model_type
    printed = capsys.readouterr().out
    assert results_table(folder) in printed and str(folder) in printed


@pytest.mark.slow
def test_distilling_into_alexnet(teachers: Path, tmp_path: Path) -> None:
    """57 million parameters, at random: no weights lie here."""
    folder = tmp_path / "run"
    places = ["--teacher", teachers / "resnet", "--dataset", teachers / "images", "--output_dir", folder]
    flags = ["--pretrained", "false", "--image_size", "64", "--save_strategy", "no"]
    launch("distill_cnn_alexnet.py", *places, *flags, *SHORT)
    written = tiny.results(folder)
    assert "SoftTargets" in written["objectives"][0] and "Hint" in written["objectives"][1]
    assert written["costs"]["parameters"]["student"] == written["total_parameters"]
    assert 0 <= written["metrics"]["test"]["agreement"] <= 1
    assert load_backbone(folder).model.config.architecture == "alexnet"


def test_a_language_models_largest_logits_from_a_cache(teachers: Path, tmp_path: Path) -> None:
    places = ["--teacher", teachers / "gpt2", "--dataset", teachers / "lines", "--output_dir", tmp_path / "run"]
    cache = ["--teacher_cache", "always", "--teacher_cache_top_k", 4, "--teacher_cache_dir", tmp_path / "caches"]
    launch("distill_lm.py", "--model", "carve:1", *places, *SHORT, "--max_length", "16", *cache)
    assert tiny.results(tmp_path / "run")["metrics"]["validation"]["kl"] >= 0
    (manifest,) = (tmp_path / "caches").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["kept"]["top_k"] == 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "error: teacher must be given"),
        (["--teacher", "resnet", "--temperature", "2"], "error: unknown flag --temperature"),
        (
            ["--teacher", "resnet", "--objectives", "SoftTarget"],
            "error: The term 'SoftTarget': 'SoftTarget' is neither",
        ),
        (["--teacher", "resnet", "--teacher_cache", "sometimes"], "error: teacher_cache='sometimes' is not valid"),
    ],
    ids=["teacher", "flag", "term", "cache"],
)
def test_bad_input_of_a_distillation_is_one_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    flags = [str(home / flag) if flag == "resnet" else flag for flag in flags]
    with pytest.raises(SystemExit) as stopped:
        launch("distill_cifar.py", "--dataset", home / "images", "--output_dir", tmp_path / "run", *SHORT, *flags)
    written = capsys.readouterr()
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    assert next(line for line in written.err.splitlines() if line.startswith("error:")).startswith(said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--learning_rat", "1e-3"], "error: unknown flag --learning_rat, did you mean --learning_rate"),
        (["--tuning", "lorra"], "error: Unknown tuning 'lorra'. There are: full, "),
        (["--label_column", "labell"], "error: label_column='labell' is not a column of the data."),
    ],
    ids=["flag", "tuning", "column"],
)
def test_bad_input_is_one_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    places = ["--model", home / "vit", "--dataset", home / "images", "--output_dir", tmp_path / "run"]
    with pytest.raises(SystemExit) as stopped:
        launch("finetune_cifar.py", *places, *SHORT, *flags)
    written = capsys.readouterr()
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    line = next(line for line in written.err.splitlines() if line.startswith("error:"))
    assert line.startswith(said) and written.out == ""


def test_unknown_key_in_the_file(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("learning_rat: 1e-3\n")
    with pytest.raises(SystemExit) as stopped:
        launch("finetune_cifar.py", "--config", tmp_path / "run.yaml", "--output_dir", tmp_path / "run")
    assert stopped.value.code == 2
    assert "run.yaml: unknown key learning_rat, did you mean learning_rate" in capsys.readouterr().err


def test_adapting_across_domains(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inverted = datasets.DatasetDict(
        {
            split: rows.map(lambda row: {"image": row["image"].point(lambda ink: 255 - ink)})
            for split, rows in tiny.digits().items()
        }
    )
    target = tiny.parquet_folder(inverted, tmp_path / "inverted")
    flags = ["--seeds", 0, 1, "--max_steps", 4, "--output_dir", tmp_path / "runs"]
    launch("adapt_digits.py", "--source", home / "digits", "--target", target, *flags)
    printed = capsys.readouterr().out
    for method in ("source only", "DANN"):
        scores = re.search(
            rf"^{method} +([\d.]+) \+- [\d.]+ %.*seeds \[0, 1\]: ([\d.]+), ([\d.]+)\)", printed, re.MULTILINE
        )
        assert scores and float(scores[1]) == pytest.approx((float(scores[2]) + float(scores[3])) / 2, abs=0.11)


def quickstart(folder: Path, monkeypatch: pytest.MonkeyPatch, steps: int | None = None) -> dict[str, dict[str, Any]]:
    """Runs the quickstart; with `steps`, every training is cut to so many. Returns results.json by run."""
    if steps is not None:
        whole = hf_transfer.finetune
        monkeypatch.setattr(hf_transfer, "finetune", lambda *args, **way: whole(*args, **{**way, "max_steps": steps}))
    launch("quickstart.py", "--output_dir", folder)
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/results.json")}


def test_quickstart_prints_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = quickstart(tmp_path / "runs", monkeypatch, steps=2)
    assert set(runs) == {"pretrained", "from-scratch", "linear-probe", "partial-freeze", "LoRA", "full"}
    printed = capsys.readouterr().out
    for name, facts in runs.items():
        if name == "pretrained":
            continue
        accuracy, trained, total = (
            f"{facts['metrics']['test']['accuracy']:.1%}",
            f"{facts['trainable_parameters']:,}",
            f"{facts['total_parameters']:,}",
        )
        row = rf"^{name.replace('-', '[ -]')} +{re.escape(accuracy)} +{trained} +{total}"
        assert re.search(row, printed, re.MULTILINE), (name, printed)
    probe, full = runs["linear-probe"], runs["full"]
    assert probe["trainable_parameters"] < runs["LoRA"]["trainable_parameters"] < full["trainable_parameters"]
    assert "Next:" in printed
    with pytest.raises(SystemExit):  # it does not write over an earlier run
        launch("quickstart.py", "--output_dir", tmp_path / "runs")
    assert "holds an earlier run: delete it" in capsys.readouterr().err


@pytest.mark.slow
def test_quickstart_shows_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy = {
        name: facts["metrics"]["test"]["accuracy"]
        for name, facts in quickstart(tmp_path / "runs", monkeypatch).items()
    }
    transferred = [accuracy[name] for name in ("linear-probe", "partial-freeze", "LoRA", "full")]
    assert accuracy["pretrained"] > 0.9
    assert max(transferred) > accuracy["from-scratch"] + 0.02, accuracy


@pytest.mark.slow
def test_two_processes_make_one_run_folder(home: Path, tmp_path: Path) -> None:
    """torchrun with gloo on the CPU: half the steps of one process, every row once, one folder, one print."""
    folder = tmp_path / "run"
    places = ["--model", home / "vit", "--dataset", home / "digits", "--output_dir", folder]
    flags = ["--num_train_epochs", "2", "--per_device_train_batch_size", "9", "--use_cpu", "--disable_tqdm", "true"]
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            str(ROOT / "recipes/finetune_cifar.py"), *map(str, places), *flags,
        ],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    written = tiny.results(folder)
    assert written["processes"] == 2 and written["steps"] == 2 * 54 // (2 * 9)
    assert written["counts"] == {"train": 54, "validation": 6, "test": 40}
    correct = written["metrics"]["test"]["accuracy"] * 40
    assert correct == pytest.approx(round(correct), abs=1e-6)  # of exactly 40 rows: none was gathered twice
    assert done.stdout.count("Saved to") == 1
    AutoModelForImageClassification.from_pretrained(folder)
    leftovers = [
        path.name for path in folder.iterdir() if path.name.endswith(".partial") or path.name.startswith(".run")
    ]
    assert not leftovers and not list(tmp_path.glob(".run*"))


def accelerate_launch(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """`accelerate launch --cpu recipes/finetune_cifar.py ARGUMENTS`, as its docstring opens."""
    accelerate, recipe = Path(sys.executable).with_name("accelerate"), ROOT / "recipes/finetune_cifar.py"
    command = [str(accelerate), "launch", "--cpu", str(recipe), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


OFFLINE = ("--model", "test_resnet", "--pretrained", "false", "--dataset", "digits", "--image_size", "32")


@pytest.mark.slow
def test_accelerate_launches_a_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = accelerate_launch(*OFFLINE, "--max_train_samples", 200, "--max_steps", 3, "--output_dir", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    written = tiny.results(folder)
    assert (written["steps"], written["processes"], written["pretrained"]) == (3, 1, False)
    assert written["counts"] == {"train": 200, "validation": 144, "test": 360}
    assert 0 <= written["metrics"]["test"]["accuracy"] <= 1 and 0 <= written["metrics"]["validation"]["accuracy"] <= 1
    assert results_table(folder) in done.stdout and f"Saved to {folder}" in done.stdout
    assert "max_steps = 3 (from the command line)" in done.stderr
    assert AutoModelForImageClassification.from_pretrained(folder).config.num_labels == 10


@pytest.mark.slow
def test_accelerate_launches_a_recipe_by_a_file(tmp_path: Path) -> None:
    """The file sets the recipe's defaults aside, the command line the file's; what neither knows stops the launch."""
    config = tmp_path / "run.yaml"
    config.write_text("tuning: partial\ntrain_blocks: 1\nlearning_rate: 1e-2\nmax_steps: 2\nmax_train_samples: 100\n")
    arguments = (*OFFLINE, "--config", config, "--learning_rate", "1e-3", "--output_dir", tmp_path / "run")
    done = accelerate_launch(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    written = tiny.results(tmp_path / "run")
    assert (written["tuning"], written["options"]["train_blocks"], written["steps"]) == ("partial", 1, 2)
    assert written["training_arguments"]["learning_rate"] == 1e-3
    assert written["training_arguments"]["label_smoothing_factor"] == 0.1  # the recipe's own
    config.write_text(config.read_text() + "learning_rat: 1e-2\n")
    refused = accelerate_launch(*arguments[:-1], tmp_path / "other")
    assert refused.returncode != 0 and not (tmp_path / "other").exists()
    assert f"error: {config}: unknown key learning_rat, did you mean learning_rate" in refused.stderr


# ---- what they say --------------------------------------------------------------------------------------------------


def docstring(recipe: Path) -> str:
    return ast.get_docstring(ast.parse(recipe.read_text(encoding="utf-8"))) or ""


def commands(recipe: Path) -> list[list[str]]:
    """The command lines of a recipe's docstring, split into words."""
    text = docstring(recipe).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [shlex.split(line, comments=True) for line in lines]


COMMANDS = [(recipe, words) for recipe in RECIPES for words in commands(recipe)]


def test_every_recipe_opens_with_its_commands() -> None:
    distills = {recipe for recipe, _ in DISTILLED} | {"distill_cnn_alexnet.py"}
    assert {recipe.name for recipe in DISTILLS} == distills
    assert {recipe.name for recipe in RECIPES} >= {*SMALL, *distills, "adapt_digits.py", "quickstart.py"}
    assert all(len(commands(recipe)) >= 2 for recipe in RECIPES)


@pytest.mark.parametrize(("recipe", "words"), COMMANDS, ids=[" ".join(words) for _, words in COMMANDS])
def test_the_docstrings_commands_parse(
    recipe: Path,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    start = 1 if words[0] == "python" else 2
    assert words[:start] in (["python"], ["accelerate", "launch"])
    assert ROOT / words[start] in RECIPES
    own = ROOT / words[start] == recipe
    assert own or (recipe in DISTILLS and words[start].startswith("recipes/finetune_"))  # the one for its teacher
    recipe, flags = ROOT / words[start], words[start + 1 :]
    if "--help" in flags:
        with pytest.raises(SystemExit) as stopped:
            launch(recipe.name, *flags)
        assert stopped.value.code == 0
        shown = capsys.readouterr().out
        assert not [flag for flag in FLAGS if f" --{flag}" not in shown]
    elif recipe in FINETUNES:
        defaults = runpy.run_path(str(recipe))["DEFAULTS"]
        run, given = parse_given(flags, defaults=defaults, description="")
        assert run.model and run.dataset and given["output_dir"].startswith("runs/")
    elif recipe in DISTILLS:
        defaults = runpy.run_path(str(recipe))["DEFAULTS"]
        run, given = parse_given(
            flags, defaults=defaults, description="", run_config=DistillationRun, training_config=DistillationConfig
        )
        assert isinstance(run, DistillationRun) and run.teacher and run.model and run.dataset
        assert terms_from_text(run.objectives or [])
        named = run.model.isidentifier() and run.model not in ("bilstm", "carve")
        assert not named or timm.is_model(run.model)
        DistillationConfig(**{**given, "output_dir": str(tmp_path), "use_cpu": True})
    else:
        reached: list[Any] = []

        def stop(*args: Any, **kwargs: Any) -> None:
            reached.append(args)
            raise TransferError("the flags are read")

        monkeypatch.setattr(hf_transfer, "load_data", stop)
        folder = [] if "--output_dir" in flags else ["--output_dir", "/nonexistent/runs"]
        with pytest.raises(SystemExit):
            launch(recipe.name, *flags, *folder)
        assert reached, capsys.readouterr().err


def test_yaml_files_of_the_recipes_parse() -> None:
    files = sorted((ROOT / "recipes/configs").glob("*.yaml"))
    assert files
    for file in files:
        recipe = next(recipe for recipe in FINETUNES if file.stem.startswith(recipe.stem))
        run, given = parse_given(
            ["--config", str(file)], defaults=runpy.run_path(str(recipe))["DEFAULTS"], description=""
        )
        assert run.tuning in file.stem and given["output_dir"].endswith(run.tuning)


def test_no_recipe_starts_from_a_script_of_the_hub() -> None:
    """datasets 4 and later do not run these, which other examples still name."""
    scripts = {"leondz/wnut_17", "tner/wnut2017", "keremberke/chest-xray-classification", "PolyAI/banking77"}
    for recipe in FINETUNES:
        assert runpy.run_path(str(recipe))["DEFAULTS"]["dataset"].partition(":")[0] not in scripts
