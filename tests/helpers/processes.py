"""Processes of their own for what a test cannot do in its own."""

import json
import os
import subprocess
import sys
from typing import Any

from tests.helpers.paths import ROOT


def probe_command(name: str) -> list[str]:
    """Command that runs the probe ``name`` of :mod:`tests.helpers.probes`; arguments follow it."""
    return [sys.executable, "-m", f"tests.helpers.probes.{name}"]


def probe_environment(*first: str) -> dict[str, str]:
    """This process's environment, in which a probe is found, and ``first`` before all else."""
    path = (*first, str(ROOT), os.environ.get("PYTHONPATH", ""))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def ask_without_plugin(probe: str, *arguments: str, given: str = "") -> Any:
    """What a probe says, as JSON in its last line, of a vLLM that loads no plugin.

    Args:
        given: the probe's standard input.
    """
    done = subprocess.run(
        [*probe_command(probe), *arguments],
        input=given,
        env={**probe_environment(), "VLLM_PLUGINS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
