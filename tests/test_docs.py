"""The documentation is true: its examples run, its names and links exist, its map of the package is the package."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNS = "<!-- runs offline -->"  # stands on the line before each block that is run here
FENCE = re.compile(r"(<!-- runs offline -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# peft 0.21 asks transformers by a name that it renames; delete when peft asks for is_activation_checkpointing
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def blocks(page: Path, language: str) -> Iterator[tuple[bool, int, str]]:
    """Each block of a language ("" is shell and output): whether it is run, the number of its first line, the text."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        if found[2] == language:
            yield found[1] is not None, text.count("\n", 0, found.start(3)) + 1, found[3]


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def markers(page: Path) -> int:
    return page.read_text(encoding="utf-8").splitlines().count(RUNS)


RUNNABLE = [page for page in PAGES if markers(page)]


@pytest.mark.parametrize("page", RUNNABLE, ids=page_id)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the page's order, in one namespace, in an empty folder; trainings of any length take two steps."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "docs"}
    for runs, line, code in blocks(page, "python"):
        if runs:
            short = re.sub(r"max_steps=\d+", "max_steps=2", code)
            exec(compile("\n" * (line - 1) + short, str(page), "exec"), namespace)


def test_every_marked_block_is_one_that_runs() -> None:
    """A marker that no block follows would mark nothing, in silence."""
    for page in RUNNABLE:
        assert markers(page) == sum(runs for runs, _, _ in blocks(page, "python")), page
    assert {page.name for page in RUNNABLE} >= {"README.md", "terms.md", "trainer.md", "tuning.md", "data.md"}


def resolve(dotted: str) -> Any:
    """The module or attribute of a dotted name; raises ImportError or AttributeError where there is none."""
    parts = dotted.split(".")
    found: Any = import_module(parts[0])
    for depth, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            try:
                import_module(".".join(parts[:depth]))
            except ModuleNotFoundError as error:
                raise AttributeError(f"{dotted}: there is no {part!r}") from error
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_names_of_the_package_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = set(re.findall(r"\bhf_transfer(?:\.[A-Za-z_]\w*)+", text))
    for _, _, code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "hf_transfer":
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    files = {name for name in names if name.rpartition(".")[2] in ("py", "md")}  # hf_transfer.py would be a file
    for name in sorted(names - files):
        resolve(name)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    paths = re.findall(r"(?<![\w./-])(?:hf_transfer|tests|recipes|docs|benchmarks)/[\w./-]+\.(?:py|md|yaml)\b", text)
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_flags_of_recipes_exist(page: Path) -> None:
    from hf_transfer import DistillationConfig, TransferConfig
    from hf_transfer.config import RunConfig
    from hf_transfer.distill import DistillationRun

    commands = {"finetune": (RunConfig, TransferConfig), "distill": (DistillationRun, DistillationConfig)}
    for _, _, block in blocks(page, ""):
        for command in block.replace("\\\n", " ").splitlines():
            for name, configs in commands.items():
                known = {field.name for config in configs for field in fields(config)} | {"config", "help"}
                found = re.search(
                    rf"(?:recipes/{name}_\w+\.py|(?:hf-transfer|hf_transfer\.cli) {name}\b)(.*)", command
                )
                flags = re.findall(r"--(\w+)", found[1].partition("#")[0]) if found else []
                assert set(flags) <= known, command


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page, "yaml"))], ids=page_id)
def test_files_of_settings_are_read(page: Path, tmp_path: Path) -> None:
    from hf_transfer import DistillationConfig
    from hf_transfer.config import parse_given
    from hf_transfer.distill import DistillationRun
    from hf_transfer.written_terms import terms_from_text

    for _, _, text in blocks(page, "yaml"):
        (tmp_path / "run.yaml").write_text(text)
        flags = ["--config", str(tmp_path / "run.yaml")]
        if "teacher:" not in text:
            parse_given([*flags, "--model", "m", "--dataset", "d"], defaults={}, description="")
            continue
        run, _ = parse_given(
            flags, defaults={}, description="", run_config=DistillationRun, training_config=DistillationConfig
        )
        assert isinstance(run, DistillationRun) and terms_from_text(run.objectives or [])


def test_the_map_of_the_package_is_the_package() -> None:
    """docs/architecture.md lists modules that exist, once, and every one that git knows."""
    page = ROOT / "docs" / "architecture.md"
    house = next(block for _, _, block in blocks(page, "") if block.startswith("hf_transfer/\n"))
    listed, folder = [], ""
    for line in house.splitlines()[1:]:
        name = line.split()[0]
        folder = name if name.endswith("/") else folder if line.startswith("    ") else ""
        if name.endswith(".py"):
            listed.append(folder + name)
    assert len(set(listed)) == len(listed)
    assert not [name for name in listed if not (ROOT / "hf_transfer" / name).is_file()]
    known = {name for name in modules_known_to_git() if name == "__init__.py" or not name.endswith("/__init__.py")}
    assert not sorted(known - set(listed)), "add a line for each to the map in docs/architecture.md"


def modules_known_to_git() -> set[str]:
    """The package's modules, by path in it, without those that are only being written."""
    files = subprocess.run(["git", "ls-files", "hf_transfer"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a clone: which files belong to the package is not known")
    return {name.removeprefix("hf_transfer/") for name in files.stdout.split() if name.endswith(".py")}


def test_every_public_name_is_documented() -> None:
    import hf_transfer

    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [name for name in hf_transfer.__all__ if name != "__version__" and not re.search(rf"\b{name}\b", text)]


def test_every_term_is_documented() -> None:
    from hf_transfer import objectives

    text = "".join(page.read_text(encoding="utf-8") for page in PAGES if page.parent.name == "docs")
    homes = {name: getattr(objectives, name).__module__.rpartition(".")[2] for name in objectives.__all__}
    known = modules_known_to_git()
    terms = [name for name, home in homes.items() if f"objectives/{home}.py" in known]
    assert "CrossEntropy" in terms
    assert not [name for name in terms if not re.search(rf"`{name}`", text)]


def test_every_augmentation_and_tuning_is_documented() -> None:
    from hf_transfer.data.augmentations import AUGMENTATIONS
    from hf_transfer.tuning import TUNINGS

    for page, names in (("data", AUGMENTATIONS), ("tuning", TUNINGS)):
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        assert not [name for name in names if f"`{name}`" not in text], page
