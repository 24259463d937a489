"""Runs the tests of a mutated module, each time in a fork of one process that has imported vLLM.

    python -m tests.mutation.server PART SOCKET

The working directory is a copy of this repository, in which Cosmic Ray changes one module at a
time. This process imports everything that the tests import but for the copy's own files; that takes
as long as the tests of many mutants. For each connection it forks, and the child imports the copy's
files as they are now and runs the tests that ``targets.py`` names for the module that has changed,
or, if none has, all of them. The answer is the exit status and, behind it, what was printed.
"""

import gc
import importlib.util
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import Phase, settings

from tests.mutation.targets import PARTS, module_name

TREE = Path.cwd()

OURS = ("swa_backend", "swa_vllm", "tests", "make_demo_model")
IMPORTED = "imported:"
LIMIT_S, LONG_S = 60, 900  # of a mutant; of what runs once
MEMORY_BYTES = 8 << 30
TARGETS = PARTS[sys.argv[1]]
ORIGINALS = {path: (TREE / path).read_bytes() for path in TARGETS}


class QuickHypothesis:
    """Makes hypothesis try the same examples for each mutant, and not shrink one that fails."""

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self) -> None:
        """Replace the profile that ``conftest.py`` has loaded."""
        phases = [Phase.explicit, Phase.generate]
        quick = settings(phases=phases, derandomize=True, database=None, deadline=None)
        settings.register_profile("mutation", quick)
        settings.load_profile("mutation")


def run_pytest(*arguments: str) -> int:
    """Run tests in this process."""
    flags = ["-q", "-x", "--tb=line", "-W", "ignore", "-p", "no:cacheprovider"]
    return int(pytest.main([*flags, *arguments], plugins=[QuickHypothesis()]))


def compiled(path: str) -> Path:
    """Where Python keeps and looks for the bytecode of a module."""
    return Path(importlib.util.cache_from_source(str(TREE / path)))


def find_changed() -> list[str]:
    """The module that is mutated now, if any."""
    changed = [path for path, text in ORIGINALS.items() if (TREE / path).read_bytes() != text]
    assert len(changed) <= 1, changed
    return changed


def check_mutant() -> int:
    """Import the module that has changed, which may fail, and run its tests."""
    changed = find_changed()
    for path in changed:
        assert not compiled(path).exists(), path
        module = importlib.import_module(module_name(path))
        assert module.__file__ == str(TREE / path), module.__file__
    arguments = {test: None for path in changed or TARGETS for test in TARGETS[path]}
    return run_pytest(*arguments)


def list_imports() -> int:
    """Collect the tests of all targets, and print the modules that this has imported."""
    status = run_pytest("--collect-only", *{test: None for t in TARGETS.values() for test in t})
    if status == 0:
        print(IMPORTED, *sys.modules, sep="\n")
    return status


def run_forked(function: Callable[[], int], limit_s: float) -> tuple[int, str]:
    """Call a function in a child; gives its status and what it printed."""
    with tempfile.TemporaryFile() as printed:
        child = os.fork()
        if child == 0:
            status = 70
            try:
                os.setsid()
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
                resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
                status = function()
            except BaseException as error:
                print(f"{type(error).__name__}: {error}")
            finally:
                sys.stdout.flush()
                os._exit(status)
        end = time.monotonic() + limit_s
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > end:
                break
            time.sleep(0.01)
        os.killpg(child, signal.SIGKILL)  # with what it has started
        _, state = os.waitpid(child, 0)
        printed.seek(0)
        return os.waitstatus_to_exitcode(state) & 0xFF, printed.read().decode(errors="replace")


def preload() -> None:
    """Import what the tests import, but for the files of the copy."""
    status, printed = run_forked(list_imports, LONG_S)
    assert status == 0, (status, printed)
    # From here on only what is never mutated has bytecode: a mutant may have the size and the time
    # of the file that was compiled.
    sys.dont_write_bytecode = True
    for path in TARGETS:
        compiled(path).unlink(missing_ok=True)
    for name in printed.partition(IMPORTED)[2].split():
        if name.partition(".")[0] not in OURS:
            try:
                importlib.import_module(name)
            except Exception as error:
                print(f"not imported: {name} ({error})", flush=True)
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        if not name.startswith("tests.mutation"):
            del sys.modules[name]


def main(address: str) -> None:
    preload()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while True:
            client, _ = server.accept()
            with client:
                status, printed = run_forked(check_mutant, LIMIT_S if find_changed() else LONG_S)
                client.sendall(f"{status}\n{printed[-4000:]}".encode())


if __name__ == "__main__":
    main(sys.argv[2])
