"""Fixture: the ``swa`` command."""

import subprocess
from collections.abc import Iterator

import pytest

from tests.helpers.processes import Probe, Run, probe_environment


@pytest.fixture(scope="session")
def swa(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs ``swa`` with arguments in a process of its own, which compiles Triton's kernels."""
    environment = {k: v for k, v in probe_environment().items() if k != "TRITON_INTERPRET"}
    probe = Probe("commands", environment, tmp_path_factory.mktemp("swa") / "log")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(arguments, **probe.ask(*arguments))

    yield run
    probe.stop()
