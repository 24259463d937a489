"""Engines on a Ray cluster, its workers, and Python environments for its nodes."""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from vllm import EngineArgs
from vllm.config import VllmConfig

import swa_vllm
from ray_cluster.local_cluster import LocalRayCluster
from tests.helpers.processes import probe_command, probe_environment

TIMEOUT_S = 300


def config_on_ray(model: Path, **kwargs: Any) -> VllmConfig:
    """The config of an engine on Ray; of two workers, unless ``kwargs`` say otherwise."""
    swa_vllm.register()
    args: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
    return EngineArgs(model=str(model), **{**args, **kwargs}).create_engine_config()


def probe(
    cluster: LocalRayCluster,
    cases: dict[str, tuple[Path, dict[str, Any]]],
    prompt_lengths: Sequence[int] = (),
) -> dict[str, Any]:
    """What :mod:`tests.helpers.probes.ray` says about engines on the cluster."""
    arguments = json.dumps(
        [prompt_lengths, {k: (str(m), kwargs) for k, (m, kwargs) in cases.items()}]
    )
    # Ray prints what workers print, at any time: the answer has a file of its own. And it adds the
    # directory that the driver runs in to the workers' path: not this source tree.
    with tempfile.TemporaryDirectory() as directory:
        answer = Path(directory, "answer.json")
        result = subprocess.run(
            [*probe_command("ray"), arguments, str(answer)],
            cwd=directory,
            env={**probe_environment(), **cluster.environment},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
        return dict(json.loads(answer.read_text()))


def workers(cluster: LocalRayCluster) -> list[psutil.Process]:
    """Processes of Ray that hold a part of the model."""
    found = []
    for process in cluster.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # it may have just ended
            if "RayWorkerProc" in " ".join(process.cmdline()):
                found.append(process)
    return found


def python_with(version: str | None, directory: Path) -> Path:
    """A Python environment like this one, but with this ``version`` of the package, or none."""
    site = directory / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    site.mkdir(parents=True)
    for path in Path(psutil.__file__).parents[1].iterdir():
        if "swa_backend" not in path.name:
            (site / path.name).symlink_to(path)
    (directory / "pyvenv.cfg").write_text(f"home = {Path(sys.base_prefix) / 'bin'}\n")
    python = directory / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(Path(sys.executable).resolve())
    if version is not None:
        info = site / f"swa_backend-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: swa-backend\nVersion: {version}\n"
        )
        points = "[vllm.general_plugins]\nswa = swa_vllm:register\n"
        (info / "entry_points.txt").write_text(points)
        (site / "swa_vllm").mkdir()
        (site / "swa_vllm" / "__init__.py").touch()
    return python
