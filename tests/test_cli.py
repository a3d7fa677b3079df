"""The command `hf-transfer`."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny_runs as tiny

from hf_transfer import __version__, cli, finetune, load_backbone
from hf_transfer.errors import TransferError

FACTS = {
    "metrics": {"validation": {"accuracy": 0.5, "macro_f1": 0.25}, "test": {"accuracy": 0.75, "mse": 0.000123456}},
    "trainable_parameters": 1234567,
    "seed": 42,
    "selection": "last step",
    "versions": {"torch": "2.15.0"},
}


def main(argv: list[str]) -> int:
    """The exit code of the command; what the interpreter would write to stderr is written."""
    try:
        cli.main(argv)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            sys.stderr.write(f"{stop.code}\n")
            return 1
        return stop.code or 0
    return 0


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "results.json").write_text(json.dumps(FACTS))
    return tmp_path


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, name: str, result: Any) -> list[tuple[tuple, dict]]:
    """Puts a recorder in the place of `module.name`; returns the calls it gets."""
    calls: list[tuple[tuple, dict]] = []

    def record(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        if isinstance(result, Exception):
            raise result
        return result

    fake = ModuleType(module)
    setattr(fake, name, record)
    monkeypatch.setitem(sys.modules, module, fake)
    return calls


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_load_no_library(flag: str) -> None:
    code = (
        "import sys\nfrom hf_transfer.cli import main\n"
        f"try: main([{flag!r}])\nexcept SystemExit as stop: assert stop.code == 0\n"
        "print(sorted({'torch', 'transformers', 'timm', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *text, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    if flag == "--version":
        assert text == [f"hf-transfer-learning {__version__}"]
    else:
        assert all(command in done.stdout for command in ("finetune", "distill", "probe", "report", "push"))


def test_module_runs_as_accelerate_launch_runs_it() -> None:
    done = subprocess.run([sys.executable, "-m", "hf_transfer.cli", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"hf-transfer-learning {__version__}\n")


def test_finetune_hands_over_what_was_given(
    monkeypatch: pytest.MonkeyPatch, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = stand_in(monkeypatch, "hf_transfer.finetune", "finetune", SimpleNamespace(folder=run_folder))
    flags = ["--model", "m", "--dataset", "digits", "--lora_r", "4", "--learning_rate", "1e-3"]
    assert main(["finetune", *flags, "--output_dir", str(run_folder)]) == 0
    ((args, options),) = calls
    assert args == ()
    assert options["model"] == "m" and options["dataset"] == "digits" and options["tuning"] == "full"
    assert options["lora_r"] == 4 and options["learning_rate"] == 1e-3 and options["output_dir"] == str(run_folder)
    assert "weight_decay" not in options  # left to finetune's recommendation
    assert "0.75" in capsys.readouterr().out


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    """A program sets up logging."""
    logger = logging.getLogger("hf_transfer")
    level, handlers = logger.level, logging.root.handlers[:]
    yield
    logger.setLevel(level)
    logging.root.handlers[:] = handlers


@pytest.mark.usefixtures("logging_as_it_was")
def test_distill_by_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Teacher, student made from it and a list of terms come from the file; the command line wins over it."""
    quick = {**tiny.QUICK, "save_strategy": "no"}
    data = tiny.parquet_folder(tiny.sentences(), tmp_path / "data")
    finetune(tiny.text_backbone(tmp_path / "base"), data, output_dir=tmp_path / "teacher", **quick)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""teacher: {tmp_path / "teacher"}
model: carve:1
dataset: {data}
objectives:
  - SoftTargets(temperature=2.0, weight=0.9)
  - "Hint(layers={{0.5: 0.5, 1.0: 1.0}})"
hard_weight: 0.5
teacher_cache: never
num_train_epochs: 1
use_cpu: true
disable_tqdm: true
save_strategy: no
output_dir: {tmp_path / "run"}
"""
    )
    assert main(["distill", "--config", str(config), "--hard_weight", "0.25"]) == 0
    facts = tiny.results(tmp_path / "run")
    soft, hint, hard = facts["objectives"]
    assert "SoftTargets" in soft and "temperature=2.0" in soft and "Hint" in hint
    assert "CrossEntropy" in hard and "weight=0.25" in hard
    assert facts["teacher"] == "teacher" and "agreement" in facts["metrics"]["test"]
    assert load_backbone(tmp_path / "run").model.config.num_hidden_layers == 1
    printed = capsys.readouterr().out
    assert printed == f"{tmp_path / 'run'}\n{cli.results_table(tmp_path / 'run')}\n"


def test_help_of_distill_names_the_flags_of_a_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "--help"]) == 0
    shown = capsys.readouterr().out
    flags = {"teacher", "model", "objectives", "baseline", "hard_weight", "teacher_cache", "chunk_tokens", "tuning"}
    assert not {flag for flag in flags if f" --{flag} " not in shown}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("temperature: 2.0", "run.yaml: unknown key temperature"),
        ("objectivs: [DKD]", "run.yaml: unknown key objectivs, did you mean objectives"),
        ("objectives: [DKD(tau=2.0)]", "The term 'DKD(tau=2.0)': DKD has no argument 'tau'"),
        ("objectives: [[DKD]]", "The term \"['DKD']\": it is not one term"),
        ("teacher_cache_views: 0", "teacher_cache_views=0 is not valid"),
        ("model: carve:all", "model='carve:all': write how many layers"),
    ],
)
@pytest.mark.usefixtures("logging_as_it_was")
def test_a_bad_line_of_a_distillation_is_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    teacher = tiny.image_backbone(tmp_path / "teacher", labels=[str(i) for i in range(10)])
    lines = {"teacher": teacher, "model": "born-again", "dataset": "digits", "output_dir": tmp_path / "run"}
    name, _, value = line.partition(": ")
    lines |= {"use_cpu": "true", name: value}
    (tmp_path / "run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    assert main(["distill", "--config", str(tmp_path / "run.yaml")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and not (tmp_path / "run").exists()
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert said in error


@pytest.mark.usefixtures("logging_as_it_was")
@pytest.mark.parametrize(
    ("flags", "given"),
    [
        ([], {}), (["--folds", "0"], {"folds": None}),
        (["--methods", "knn", "lda", "--folds", "3"], {"methods": ["knn", "lda"], "folds": 3}),
        (["--seed", "0"], {"seed": 0}),
        (["--image_size", "64", "--batch_size", "8"], {"image_size": 64, "batch_size": 8}),
    ],
)  # fmt: skip
def test_probe_hands_over_what_was_given_and_prints_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], given: dict[str, Any]
) -> None:
    """What is not given is left to probe()'s own defaults, whose names the flags are."""
    import inspect

    from hf_transfer.frozen.probe import probe

    known = inspect.signature(probe).parameters
    calls = stand_in(monkeypatch, "hf_transfer.frozen.probe", "probe", "the table")
    assert main(["probe", "--models", "a", "b", "--dataset", "digits", *flags]) == 0
    assert calls == [((["a", "b"], "digits"), given)]
    assert capsys.readouterr().out == "the table\n"
    options = vars(cli._parser().parse_args(["probe", "--models", "a", "--dataset", "d"]))
    assert set(options) - {"command"} == set(known)


@pytest.mark.usefixtures("logging_as_it_was")
def test_probe_ranks_backbones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = tiny.text_backbone(tmp_path / "net")
    data = tiny.parquet_folder(tiny.sentences(), tmp_path / "data")
    flags = ["--methods", "knn", "--folds", "2"]
    assert main(["probe", "--models", str(net), "--dataset", str(data), *flags]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[1].split()[:2] == ["backbone", "knn"] and table[2].startswith(str(net))
    assert main(["probe", "--models", str(net), "--dataset", str(data), "--methods", "svm"]) == 2
    assert "error: method 'svm' is not known" in capsys.readouterr().err


def test_only_the_first_process_prints(
    monkeypatch: pytest.MonkeyPatch, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, "hf_transfer.finetune", "finetune", SimpleNamespace(folder=run_folder))
    monkeypatch.setenv("RANK", "1")
    assert main(["finetune", "--model", "m", "--dataset", "d"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("flags", "private", "revision"),
    [([], None, None), (["--private"], True, None), (["--no-private", "--revision", "dev"], False, "dev")],
)
def test_push(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    private: bool | None,
    revision: str | None,
) -> None:
    calls = stand_in(monkeypatch, "hf_transfer.hub.push", "push", "https://hub/me/net/commit/1")
    assert main(["push", "runs/a", "me/net", *flags]) == 0
    assert calls == [((Path("runs/a"), "me/net"), {"private": private, "revision": revision})]
    assert capsys.readouterr().out == "https://hub/me/net/commit/1\n"


def test_report(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run_folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "            accuracy  macro_f1        mse",
        "validation       0.5      0.25           ",
        "      test      0.75            0.0001235",
        "",
        "trainable_parameters: 1,234,567",
        "seed: 42",
        "selection: last step",
        "versions.torch: 2.15.0",
    ]


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"metrics": 1}'])
def test_report_of_no_run_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None) -> None:
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    assert main(["report", str(tmp_path)]) != 0
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith(f"error: {tmp_path / 'results.json'} is not the results of a run")


def test_bad_flag_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--model", "m", "--dataset", "d", "--learning_rat", "1"]) != 0
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert err.startswith("error: unknown flag --learning_rat, did you mean --learning_rate")


def test_bad_input_found_by_finetune_is_reported_the_same_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, "hf_transfer.finetune", "finetune", TransferError("no column 'label'"))
    assert main(["finetune", "--model", "m", "--dataset", "d"]) != 0
    assert capsys.readouterr().err == "error: no column 'label'\n"


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().err
