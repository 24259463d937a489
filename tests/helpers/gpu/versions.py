"""The first step: everything can be imported, and in which versions.

``python -m tests.helpers.gpu.versions [--dry-run]``
"""

import importlib
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from tests.helpers.gpu.lines import record

# Modules of ours that import what a GPU is served with; the others need vLLM.
_OURS = ("swa_backend.ops", "swa_backend.verify.smoke")
_WITH_VLLM = (
    "vllm",
    "vllm.v1.attention.backends.triton_attn",
    "swa_vllm.attention.triton.backend",
    "swa_vllm.attention.triton.builder",
)
# Imports compiled parts of vLLM, which need its very torch.
_ON_NVIDIA = "vllm.platforms.cuda"
_PACKAGES = ("torch", "triton", "vllm", "transformers", "flashinfer-python", "xformers", "pytest")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = ["--query-gpu=name,driver_version,memory.total,clocks.sm,power.limit", "--format=csv"]
    done = subprocess.run([program, *query], capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr.strip()


def _device() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"device": None}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _flash_attention() -> str:
    """Say which FlashAttention vLLM brings, or why it brings none."""
    try:
        from vllm.vllm_flash_attn import FA2_AVAILABLE, FA3_AVAILABLE
    except ImportError as error:
        return str(error)
    return f"FA2 {FA2_AVAILABLE}, FA3 {FA3_AVAILABLE}"


def main(arguments: list[str]) -> None:
    """Record versions, then import one module after the other."""
    import torch

    record(
        python=sys.version.split()[0],
        versions={name: _version(name) for name in _PACKAGES},
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        driver=_driver(),
        **_device(),
    )
    modules = [*_OURS] if find_spec("triton") else []
    if find_spec("vllm"):
        modules += _WITH_VLLM
        if torch.version.cuda and "--dry-run" not in arguments:
            modules.append(_ON_NVIDIA)
    for name in modules:
        importlib.import_module(name)
        record(imported=name)
    if find_spec("vllm"):
        record(flash_attention=_flash_attention())


if __name__ == "__main__":
    main(sys.argv[1:])
