"""Processes of their own for what a test cannot do in its own."""

import os
import sys

from tests.helpers.paths import ROOT


def probe_command(name: str) -> list[str]:
    """Command that runs the probe ``name`` of :mod:`tests.helpers.probes`; arguments follow it."""
    return [sys.executable, "-m", f"tests.helpers.probes.{name}"]


def probe_environment(*first: str) -> dict[str, str]:
    """This process's environment, in which a probe is found, and ``first`` before all else."""
    path = (*first, str(ROOT), os.environ.get("PYTHONPATH", ""))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
