"""The form of every benchmark: its conditions are printed, its figures written and drawn."""

import argparse
import os
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from swa_vllm.tools.common import plots

_PACKAGES = (
    "swa-backend",
    "vllm",
    "torch",
    "transformers",
    "triton",
    "flashinfer-python",
    "xformers",
)


def run_benchmark(
    module: ModuleType, arguments: Sequence[str], args: argparse.Namespace
) -> dict[str, Any]:
    """Run a benchmark, and print under which conditions; returns what ``--json`` writes.

    Args:
        module: its ``run`` prints a table and returns the figures, its ``plot`` draws these.
        arguments: those of ``swa``, which make the figures again.
    """
    plots.check_plot_path(args.plot)
    figures: dict[str, Any] = module.run(args)
    known = benchmark_conditions(args)
    packages = ", ".join(f"{name} {number}" for name, number in known["versions"].items())
    print(
        f"\n{known['device']}, {known['cores']} cores, {known['threads']} threads, "
        f"seed {known['seed']}; {packages}"
    )
    if args.plot is not None:
        module.plot(args.plot, figures)
    return {"command": shlex.join(["swa", *arguments]), "conditions": known, **figures}


def benchmark_conditions(args: argparse.Namespace) -> dict[str, Any]:
    """Name the machine, the versions, and what every benchmark was told."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor_name(),
        "cores": os.cpu_count(),
        "threads": getattr(args, "threads", None) or torch.get_num_threads(),
        "seed": getattr(args, "seed", 0),
        "quick": args.quick,
        "versions": {"python": platform.python_version(), **_package_versions()},
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _package_versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
