"""The script that makes the second environment of the tests: what it refuses, and what it keeps."""

import hashlib
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.helpers import wheel_sources
from tests.helpers.paths import ROOT

# pip finds nothing, or a wheel that somebody else built.
STUB_PYTHON = """#!/usr/bin/env bash
case "$*" in
*"pip "*download*--dest*)
    [[ -e ${0%/*}/has_wheel ]] || exit 1
    while [[ $1 != --dest ]]; do shift; done
    echo "another wheel" >"$2/vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl"
    ;;
*) exit 3 ;;
esac
"""


class Setup:
    """The script in a tree of its own, beside an environment whose Python is a stub."""

    def __init__(self, tree: Path) -> None:
        self.tree, self.base, self.venv = tree, tree / ".venv", tree / ".venv-0.33"
        shutil.copytree(ROOT / "tests" / "vllm_0_33", tree / "tests" / "vllm_0_33")
        (self.base / "bin").mkdir(parents=True)
        python = self.base / "bin" / "python"
        python.write_text(STUB_PYTHON)
        python.chmod(0o755)
        (self.base / "swa-backend.stamp").write_text("cpu 0123\n")

    def run(self) -> str:
        """All that it says before it fails, with nothing made."""
        script = self.tree / "tests" / "vllm_0_33" / "setup_env.sh"
        done = subprocess.run(
            ["bash", str(script), str(self.base), str(self.venv)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert not self.venv.exists()
        return done.stdout


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


@pytest.mark.parametrize("stamp", [None, "gpu 0123", "cpuish"])
def test_another_environment_is_refused(stamp: str | None, setup: Setup) -> None:
    path = setup.base / "swa-backend.stamp"
    path.unlink() if stamp is None else path.write_text(f"{stamp}\n")
    assert f"{setup.base} is not the environment for CPUs: make it with" in setup.run()


def test_without_a_registry_it_says_so_and_fails(setup: Setup) -> None:
    error = setup.run()
    assert "vLLM 0.33.0 could not be downloaded" in error
    assert "Give pip a package index that has it, or put the wheel at" in error


def test_another_wheel_is_refused(setup: Setup) -> None:
    (setup.base / "bin" / "has_wheel").touch()
    assert "is not the one whose SHA-256 is pinned" in setup.run()
    assert list((setup.tree / ".cache").rglob("*.whl")) == []


def test_a_cached_wheel_with_another_content_is_not_used(setup: Setup) -> None:
    text = (setup.tree / "tests" / "vllm_0_33" / "setup_env.sh").read_text()
    (sha256,) = (
        line.partition("=")[2] for line in text.splitlines() if line.startswith("WHEEL_SHA256=")
    )
    wheel = setup.tree / ".cache" / "wheels" / f"{sha256}.whl"
    wheel.parent.mkdir(parents=True)
    wheel.write_text("cut off")
    assert "downloading the official wheel" in setup.run()


@pytest.mark.parametrize(("version", "is_whole"), [("0.33.1", True), ("0.33.2", False)])
def test_the_wheel_that_it_keeps_is_not_downloaded_once_more(
    version: str, is_whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contract tests read it too, if its content is what its name says."""
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("wheel", "w") as wheel:
        wheel.writestr("vllm/envs.py", "")
        wheel.writestr(f"vllm-{version}.dist-info/METADATA", "")
    sha256 = hashlib.sha256(Path("wheel").read_bytes()).hexdigest()
    wheel_sources.KEPT.mkdir(parents=True)
    kept = wheel_sources.KEPT / f"{sha256 if is_whole else 'other'}.whl"
    shutil.copy("wheel", kept)
    downloaded = []

    def download(target: Path, requirement: str, options: tuple[str, ...]) -> None:
        downloaded.append(requirement)
        shutil.copy("wheel", target / "downloaded.whl")

    monkeypatch.setattr(wheel_sources, "_download", download)
    sources = wheel_sources.official_sources(version)
    assert (sources / "envs.py").exists()
    assert downloaded == ([] if is_whole else [f"vllm=={version}"])
    assert kept.exists()
    assert list(sources.parent.glob("*.whl")) == []
