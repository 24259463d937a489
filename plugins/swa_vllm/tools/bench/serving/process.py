"""An arm of a served workload in a process of its own that stays: JSON lines in and out.

The process loads a model once and works when told, so that arms can take turns; while it waits it
takes no processor time.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

Progress = Callable[[int], None]
Handler = Callable[..., Any]


class ArmProcess:
    """The parent's side of an arm's process: a context manager that ends it."""

    def __init__(
        self, name: str, module: str, arguments: Mapping[str, Any], env: Mapping[str, str]
    ) -> None:
        """Start ``python -m module``, which calls :func:`answer_commands`; ``env`` joins ours.

        Attributes:
            facts: what the arm says of itself.

        Raises:
            RuntimeError: it does not start.
        """
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(  # noqa: S603 (a module of ours)
            [sys.executable, "-m", module, json.dumps(dict(arguments))],
            env={**os.environ, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self.facts: dict[str, Any] = self._read(lambda _: None)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> "ArmProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # which ends it
        try:
            self._process.wait(timeout=20 if kind is None else 1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def ask(self, command: str, on_progress: Progress = lambda _: None, **arguments: Any) -> Any:
        """Send a command and wait for its answer.

        Args:
            on_progress: called with the number of tokens made so far.
            arguments: of the command.

        Raises:
            RuntimeError: the arm failed; what it said last is in the message.
        """
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # reading says why
            print(json.dumps([command, arguments]), file=self._process.stdin, flush=True)
        return self._read(on_progress)

    def _read(self, on_progress: Progress) -> Any:
        assert self._process.stdout
        for line in self._process.stdout:
            kind, value = json.loads(line)
            if kind == "progress":
                on_progress(value)
            elif kind == "error":
                raise RuntimeError(f"{self.name}: {value}")
            else:
                return value
        self._errors.seek(0)
        last = "".join(self._errors.readlines()[-15:])
        raise RuntimeError(f"{self.name} ended with status {self._process.wait()}:\n{last}")


def answer_commands(start: Callable[..., tuple[dict[str, Any], Mapping[str, Handler]]]) -> None:
    """Answer commands until the parent closes the pipe: the ``main`` of the child.

    Args:
        start: gets the arguments; returns the facts, and a handler for each command. A handler
            gets the command's arguments and ``on_progress``.
    """
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def reply(kind: str, value: Any) -> None:
        print(json.dumps([kind, value]), file=channel, flush=True)

    try:
        facts, handlers = start(**json.loads(sys.argv[1]))
        reply("answer", facts)
        for line in sys.stdin:
            command, arguments = json.loads(line)
            reply(
                "answer", handlers[command](**arguments, on_progress=lambda n: reply("progress", n))
            )
    except (ValueError, RuntimeError, OSError) as error:
        reply("error", str(error))
        raise
