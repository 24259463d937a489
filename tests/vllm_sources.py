"""Python files of the official vLLM wheels: the versions that are not installed."""

import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

SOURCES = Path(".cache/vllm-sources")


@cache
def official_sources(version: str) -> Path:
    """The ``vllm`` package of the official wheel, downloaded once; skips where it cannot be."""
    target = SOURCES / version
    if not (target / "complete").exists():
        target.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        # Binary, and for the platform of the official wheel whatever this machine is.
        platform = ["--only-binary=:all:", "--platform", "manylinux_2_28_x86_64"]
        done = subprocess.run(
            [*command, *platform, "--dest", str(target), f"vllm=={version}"],
            capture_output=True,
            text=True,
            check=False,
        )
        wheel = next(target.glob("*.whl"), None)
        if done.returncode or wheel is None:
            pytest.skip(f"no package registry: vllm=={version} not downloaded\n{done.stderr}")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target, [n for n in archive.namelist() if n.endswith(".py")])
        wheel.unlink()
        (target / "complete").touch()
    return target / "vllm"
