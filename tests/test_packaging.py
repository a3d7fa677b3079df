"""What a user installs: the wheel, its metadata, and the targets that the README promises."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import hf_transfer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy of what a clone holds of it (a build leaves files in the folder)."""
    pytest.importorskip("setuptools", minversion="77.0.3", reason="the wheel is built without isolation, offline")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "hf_transfer", source / "hf_transfer", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "tests").mkdir()
    (source / "tests" / "__init__.py").touch()  # must not be packed
    build = "from setuptools import build_meta; build_meta.build_wheel('out')"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (source / "out").glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel.read(name).decode())


def test_wheel_holds_the_package_whole_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "hf_transfer").rglob("*.py")}
    assert packed == ours | {"hf_transfer/py.typed"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())


def test_distribution_is_not_named_as_the_rust_downloader(metadata: Message) -> None:
    assert metadata["Name"] == "hf-transfer-learning"
    assert re.sub(r"[-_.]+", "-", metadata["Name"]) != "hf-transfer"
    assert metadata["Version"] == hf_transfer.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"


def test_console_script_leads_to_the_command_line(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert wheel.read(name).decode().split() == ["[console_scripts]", "hf-transfer", "=", "hf_transfer.cli:main"]
    assert callable(import_module("hf_transfer.cli").main)


def test_hub_is_one_that_does_not_import_the_downloader(metadata: Message) -> None:
    requirements = {r.name: r for r in map(Requirement, metadata.get_all("Requires-Dist"))}
    assert not requirements["huggingface_hub"].specifier.contains("0.36.0")
    assert requirements["huggingface_hub"].specifier.contains("2.4.0")
    assert "hf_transfer" not in requirements and "hf-transfer" not in requirements


def test_this_environment_satisfies_the_declared_dependencies(metadata: Message) -> None:
    from importlib.metadata import version

    for requirement in map(Requirement, metadata.get_all("Requires-Dist")):
        if requirement.marker is None:
            assert requirement.specifier.contains(version(requirement.name)), requirement


def test_every_import_of_the_package_is_declared(metadata: Message) -> None:
    """A module that is imported but not required works only while something else happens to bring it."""
    distribution_of = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
    requirements = map(Requirement, metadata.get_all("Requires-Dist"))
    declared = {r.name for r in requirements if r.marker is None or not r.marker.evaluate({"extra": "dev"})}
    imported: set[str] = set()
    for path in (ROOT / "hf_transfer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            imported |= {name.partition(".")[0] for name in names}
    third_party = {distribution_of.get(name, name) for name in imported - {"hf_transfer", *sys.stdlib_module_names}}
    assert "torch" in third_party
    assert third_party <= declared


def test_readme_names_targets_that_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    promised = set(
        re.findall(r"\bmake (\w+)", (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text())
    )
    assert {"test", "quickstart"} <= promised <= targets


def test_slow_tests_run_every_week_and_when_asked() -> None:
    """`make slow` in a workflow that is scheduled weekly and can be started by hand, with the time that it needs."""
    workflows = [yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")]
    (slow,) = [
        workflow
        for workflow in workflows
        if any(step.get("run") == "make slow" for job in workflow["jobs"].values() for step in job["steps"])
    ]
    events = slow[True]  # YAML 1.1 reads `on` as true
    assert "workflow_dispatch" in events
    minute, hour, day, month, weekday = events["schedule"][0]["cron"].split()
    assert minute.isdigit() and hour.isdigit() and weekday.isdigit() and (day, month) == ("*", "*")
    assert all(120 <= job["timeout-minutes"] <= 360 for job in slow["jobs"].values())
    assert re.search(r"^slow:.*\n\t.* -m slow$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
