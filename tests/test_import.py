"""`import hf_transfer`: light, lazy, silent, and guarded against the Rust downloader of the same import name."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_transfer

INIT = Path(hf_transfer.__file__)


def python(code: str, *, path: Path = INIT.parents[1]) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh interpreter with `path` first on sys.path."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(path)!r})\n{code}"],
        capture_output=True,
        text=True,
        cwd=path,
    )


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder `hf_transfer` in tmp_path that holds a copy of our light modules and nothing else."""
    folder = tmp_path / "hf_transfer"
    folder.mkdir()
    for name in ("__init__.py", "_clash.py", "cli.py", "console.py", "errors.py"):
        shutil.copy(INIT.with_name(name), folder)
    return folder


def test_import_loads_no_library_and_prints_nothing() -> None:
    done = python("before = set(sys.modules); import hf_transfer; print(*sorted(set(sys.modules) - before))")
    assert done.returncode == 0 and done.stderr == ""
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "hf_transfer" in loaded
    assert loaded <= {"hf_transfer", *sys.stdlib_module_names}


def test_dir_lists_public_names_before_they_are_loaded() -> None:
    done = python("import hf_transfer; print(*dir(hf_transfer)); print('torch' in sys.modules)")
    names, torch_loaded = done.stdout.splitlines()
    assert set(hf_transfer.__all__) <= set(names.split())
    assert torch_loaded == "False"


@pytest.mark.parametrize("name", hf_transfer.__all__)
def test_every_public_name_exists(name: str) -> None:
    value = getattr(hf_transfer, name)
    if name in hf_transfer._HOME:
        assert value.__name__ == name
        assert value.__module__ == f"hf_transfer.{hf_transfer._HOME[name]}"


def test_type_checkers_see_what_is_there_at_run_time() -> None:
    seen = {}
    (block,) = [node for node in ast.parse(INIT.read_text()).body if isinstance(node, ast.If)]
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.module is not None
        for name in node.names:
            assert name.asname == name.name, "re-exports are spelled `import X as X`"
            seen[name.name] = node.module.removeprefix("hf_transfer.")
    assert seen == hf_transfer._HOME


def test_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'LoRa'; it has .*LoRA"):
        hf_transfer.LoRa  # noqa: B018


def test_finetune_stays_the_function_once_its_submodule_is_imported(package: Path) -> None:
    (package / "finetune.py").write_text("def finetune(): ...\ndef other(): ...\n")
    for first in ("", "from hf_transfer.finetune import other", "import hf_transfer.finetune"):
        code = f"{first}\nimport hf_transfer\nfrom hf_transfer import finetune\n"
        code += "assert finetune is hf_transfer.finetune is sys.modules['hf_transfer.finetune'].finetune\n"
        code += "from hf_transfer.finetune import other\nassert hf_transfer.finetune is finetune"
        done = python(code, path=package.parent)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name", ["hf_transfer.abi3.so", "hf_transfer.cpython-312-darwin.so", "hf_transfer.pyd", "hf_transfer.cp310.pyd"]
)
def test_rust_downloader_in_our_folder_is_an_import_error_with_the_fix(package: Path, name: str) -> None:
    (package / name).touch()
    done = python("import hf_transfer", path=package.parent)
    assert done.returncode == 1
    assert f"ImportError: {name} lies in" in done.stderr
    assert "pip uninstall -y hf_transfer hf-transfer-learning\n    pip install hf-transfer-learning" in done.stderr


def test_rust_downloader_installed_last_stops_the_command_line(package: Path) -> None:
    (package / "hf_transfer.abi3.so").touch()
    (package / "__init__.py").write_text("__version__ = '0.1.9'")
    done = python("from hf_transfer.cli import main; main(['--version'])", path=package.parent)
    assert done.returncode == 1 and done.stdout == ""
    assert "pip uninstall -y hf_transfer hf-transfer-learning" in done.stderr


def test_copy_without_the_downloader_imports(package: Path) -> None:
    assert python("import hf_transfer, hf_transfer.cli", path=package.parent).returncode == 0


@pytest.mark.parametrize("name", ["download", "multipart_upload"])
def test_names_of_the_rust_downloader_explain_the_clash(name: str) -> None:
    with pytest.raises(ImportError, match="pip uninstall -y hf_transfer hf-transfer-learning"):
        exec(f"from hf_transfer import {name}")
