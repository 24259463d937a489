"""Processes of their own for what a test cannot do in its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.paths import ROOT

Run = Callable[..., subprocess.CompletedProcess[str]]  # a command's arguments to what it printed
_ANSWER = "answer: "  # begins the lines of a probe's output that are no log


def probe_command(name: str) -> list[str]:
    """Command that runs the probe ``name`` of :mod:`tests.helpers.probes`; arguments follow it."""
    return [sys.executable, "-m", f"tests.helpers.probes.{name}"]


def probe_environment(*first: str) -> dict[str, str]:
    """This process's environment, in which a probe is found, and ``first`` before all else."""
    path = (*first, str(ROOT), os.environ.get("PYTHONPATH", ""))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


class Probe:
    """A probe that answers one question after the other.

    It starts with the first one, so that what no test of this process asks takes no time.
    """

    def __init__(self, name: str, env: dict[str, str], log: Path) -> None:
        """Take the probe's name, its environment, and the file for its standard error."""
        self._command, self._env, self._log = probe_command(name), env, log
        self._process: subprocess.Popen[str] | None = None

    def ask(self, *question: Any) -> Any:
        """Give the probe's answer; question and answer are JSON values."""
        if self._process is None:
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    self._command,
                    env=self._env,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps(question), file=process.stdin, flush=True)
        for line in process.stdout:
            if line.startswith(_ANSWER):
                return json.loads(line.removeprefix(_ANSWER))
        raise AssertionError(f"{self._command} ended: {self._log.read_text()[-3000:]}")

    def stop(self) -> None:
        """End the probe's process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


def answer_questions(answer: Callable[..., Any]) -> None:
    """Answer, in a probe, what :meth:`Probe.ask` asks."""
    for question in sys.stdin:
        print(f"\n{_ANSWER}{json.dumps(answer(*json.loads(question)))}", flush=True)


def ask_without_plugin(probe: str, given: str) -> Any:
    """What a probe says, as JSON in its last line, of a vLLM that loads no plugin.

    Args:
        given: the probe's standard input.
    """
    done = subprocess.run(
        probe_command(probe),
        input=given,
        env={**probe_environment(), "VLLM_PLUGINS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
