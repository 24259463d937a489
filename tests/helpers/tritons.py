"""Versions of Triton beside the installed one, for processes of their own."""

import platform
import re
import sys
from pathlib import Path

import pytest

from tests.helpers.wheel_sources import unpack_wheel

# SHA-256 of the wheels for CPython 3.11 on x86-64, which is what vLLM's CPU build runs on.
OTHER_TRITONS = {
    # Required by torch 2.14, which vLLM 0.33 requires.
    "3.8.0": "68988ac85d5e7086baeda0ddc175af9667db7529b3c5e11a5c0601b8bef2200a",
    # Required by torch 2.13, which vLLM 0.32 requires.
    "3.7.1": "6744957e9fd610a29680ec2346057d0c86948ed3812468670719f391e94b44a5",
    # Required by torch 2.11, with which the kernels were run on an H100.
    "3.6.0": "e8e323d608e3a9bfcc2d9efcc90ceefb764a82b99dea12a86d643c72539ad5d3",
}
# Profilers and libraries of Triton's own tests: most of what is not the compiler.
_UNUSED = re.compile(r"triton/(instrumentation/|profiler/|_C/libproton|backends/nvidia/lib/cupti)")


def triton_directory(version: str) -> Path:
    """Directory to put first on a process's path; skips where the wheel cannot be had."""
    if sys.version_info[:2] != (3, 11) or platform.machine() != "x86_64":
        pytest.skip("the hashes are those of wheels for CPython 3.11 on x86-64")
    sha256 = OTHER_TRITONS[version]
    return unpack_wheel(
        Path(".cache/triton") / f"{version}-{sha256[:12]}",
        f"triton=={version} --hash=sha256:{sha256}",
        (),
        lambda name: not _UNUSED.match(name),
    )
