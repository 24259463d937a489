"""Run `swa` commands, each in a process forked from this one, which has imported vLLM.

A command sees a fresh process, and a test does not wait for vLLM's imports again.
"""

import os
import sys
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import vllm.entrypoints.llm
import vllm.v1.worker.cpu_worker  # noqa: F401 (what engines need)

from swa_vllm.tools.cli import main
from tests.helpers.processes import answer_questions


def _command(arguments: list[str], out: str, err: str) -> None:
    """As ``swa ARGUMENTS >OUT 2>ERR </dev/null``."""
    for number, (path, flags) in enumerate(
        [(os.devnull, os.O_RDONLY), (out, os.O_WRONLY), (err, os.O_WRONLY)]
    ):
        os.dup2(os.open(path, flags), number)
    sys.argv = ["swa", *arguments]
    sys.exit(main(arguments))


def _run(*arguments: str) -> dict[str, Any]:
    with TemporaryDirectory() as directory:
        out, err = Path(directory, "out"), Path(directory, "err")
        out.touch()
        err.touch()
        process = get_context("fork").Process(
            target=_command, args=([*arguments], str(out), str(err))
        )
        process.start()
        process.join()
        status = process.exitcode
        return {"returncode": status, "stdout": out.read_text(), "stderr": err.read_text()}


if __name__ == "__main__":
    answer_questions(_run)
