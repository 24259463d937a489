"""What a machine has, and which sources are tried on it."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

import swa_backend
from tests.helpers.paths import ROOT

# Torch is asked in a process of its own, which leaves no memory taken on the GPU.
_PROBE = """
import importlib.util, json, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
gpu = None
if "torch" not in missing:
    import torch
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
print(json.dumps([gpu, missing]))
"""


# What makes a process run on the CPU, and vLLM there on one that others use too.
_ON_A_CPU = {
    "CUDA_VISIBLE_DEVICES": "",
    "TRITON_INTERPRET": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@dataclass(frozen=True)
class Machine:
    """The name of its GPU, or None, and the modules that it lacks."""

    gpu: str | None
    missing: frozenset[str]


def look(modules: Iterable[str], environment: dict[str, str]) -> Machine:
    """Ask Python which of ``modules`` it finds, and torch for a GPU.

    Raises:
        RuntimeError: importing torch failed.
    """
    command = [sys.executable, "-c", _PROBE, *sorted(set(modules))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"torch cannot be imported:\n{done.stderr}")
    gpu, missing = json.loads(done.stdout.splitlines()[-1])
    return Machine(gpu, frozenset(missing))


def step_environment(directory: Path, *, dry: bool) -> dict[str, str]:
    """Make the environment of steps, in which nothing needs to be installed.

    Args:
        directory: for the metadata by which vLLM finds the plugin.
    """
    _write_metadata(directory)
    path = (directory, ROOT, ROOT / "plugins", ROOT / "examples", os.environ.get("PYTHONPATH", ""))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, map(str, path))),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **(_ON_A_CPU if dry else {}),
    }


def _write_metadata(directory: Path) -> None:
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    name = settings["metadata"]["name"]
    info = directory / f"{name.replace('-', '_')}-{swa_backend.__version__}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {swa_backend.__version__}\n"
    )
    points = settings["options.entry_points"]
    (info / "entry_points.txt").write_text(
        "".join(f"[{group}]{lines}\n" for group, lines in points.items())
    )


def commit() -> str | None:
    """Name the commit of the working tree, where git knows it."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "-C", str(ROOT), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def sources_hash() -> str:
    """Hash every Python file, which also tells apart what is not committed."""
    digest = hashlib.sha256()
    for room in ("swa_backend", "plugins", "examples", "tests"):
        for file in sorted((ROOT / room).rglob("*.py")):
            digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
