"""The rooms of the source tree: each says what it is for, and the contracts on imports hold.

``lint-imports`` checks the contracts of setup.cfg in the test command; here each of them is seen to
fail.
"""

import ast
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PACKAGES = {"swa_backend": ROOT / "swa_backend", "swa_vllm": ROOT / "plugins" / "swa_vllm"}
# By contract, a module below the packages' folder and the import that breaks it there.
BREACHES = {
    "rooms": ("swa_vllm/compat/versions.py", "import swa_vllm.refusals"),
    "tools": ("swa_vllm/tools/plan/command.py", "import swa_vllm.tools.check.command"),
    "benchmarks": ("swa_vllm/tools/bench/pages.py", "import swa_vllm.tools.bench.sinks"),
    "evaluations": ("swa_vllm/tools/eval/needle.py", "import swa_vllm.tools.eval.ppl"),
    "common": ("swa_vllm/tools/common/sizing.py", "import vllm"),
    "compat": ("swa_vllm/compat/versions.py", "import swa_backend.window"),
    "library": ("swa_backend/reference.py", "import swa_backend.kernels.plans"),
    "acyclic": ("swa_vllm/kv_cache/spec.py", "import swa_vllm.kv_cache.manager"),
    "backend": ("swa_backend/pages.py", "import vllm"),
    "verify": ("swa_vllm/__init__.py", "import swa_backend.verify.aot"),
    "triton": ("swa_vllm/kv_cache/spec.py", "import triton"),
}


def _lint(tree: Path, contract: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    return subprocess.run(
        [*command, "--contract", contract],
        cwd=tree,
        env={"PYTHONPATH": str(tree), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources and of the contracts."""
    for name, source in PACKAGES.items():
        shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    return tmp_path


@pytest.mark.parametrize("contract", BREACHES)
def test_contract_breaks_where_an_import_goes_the_wrong_way(contract: str, tree: Path) -> None:
    kept = _lint(tree, contract)
    assert kept.returncode == 0, kept.stdout + kept.stderr
    module, line = BREACHES[contract]
    with (tree / module).open("a") as file:
        file.write(f"\n\ndef _breach() -> None:\n    {line}\n")
    broken = _lint(tree, contract)
    assert broken.returncode == 1, broken.stdout + broken.stderr
    assert "BROKEN" in broken.stdout


def test_every_contract_has_a_breach() -> None:
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    prefix = "importlinter:contract:"
    contracts = {name for name in settings.sections() if name.startswith(prefix)}
    assert {name.removeprefix(prefix) for name in contracts} == set(BREACHES)


@pytest.mark.parametrize(
    "room",
    [
        path
        for top in (*PACKAGES.values(), ROOT / "tests")
        for path in sorted(top.rglob("__init__.py"))
    ],
    ids=lambda path: str(path.parent.relative_to(ROOT)),
)
def test_room_says_what_belongs_there(room: Path) -> None:
    """In one sentence, which is all that its ``__init__`` holds; the packages and ops say more."""
    body = ast.parse(room.read_text()).body
    sentence = ast.get_docstring(ast.Module(body, []))
    assert sentence
    assert sentence.splitlines()[0].endswith(".")
    if room.parent not in (*PACKAGES.values(), PACKAGES["swa_backend"] / "ops"):
        assert len(body) == len(sentence.splitlines()) == 1


def test_no_room_imports_from_the_package_itself() -> None:
    """``swa_vllm/__init__.py`` stands above all rooms, and is no layer for the linter."""
    package = PACKAGES["swa_vllm"]
    rooms = {path.stem for path in package.iterdir()}
    for path in package.rglob("*.py"):
        if path.is_relative_to(package / "tools") or path == package / "__init__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert "swa_vllm" not in {alias.name for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom) and node.module == "swa_vllm":
                assert {alias.name for alias in node.names} <= rooms, path


def test_no_test_imports_a_test() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = list[str]()
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                parts = name.split(".")
                is_test = parts[-1] == "conftest" or any(p.startswith("test_") for p in parts)
                assert not (parts[0] == "tests" and is_test), path


def test_tests_that_sources_name_are_there() -> None:
    """In comments, docstrings, settings and scripts; the pages have a test of their own."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.cfg", "*.toml", "*.sh"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():
            for named in re.findall(r"\btests/[\w/]+\.py\b", (ROOT / name).read_text()):
                assert (ROOT / named).exists(), f"{name} names {named}"


def test_only_one_module_reads_the_environment() -> None:
    """And the tools; the probe that Ray runs on nodes brings nothing but its own code."""
    package = PACKAGES["swa_vllm"]
    readers = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if "os.environ" in path.read_text() and not path.is_relative_to(package / "tools")
    }
    assert readers <= {"compat/envs.py", "distributed/nodes.py"}
