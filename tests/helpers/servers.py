"""A server's processes, what becomes of a stream when one of them is killed, and how all end."""

import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import psutil

from quickstart import Server
from tests.helpers.tiny_models import WINDOW, random_prompts

TIMEOUT_S = 300
END_TIMEOUT_S = 60  # ten seconds are enough on an idle machine


def wait_until(condition: Callable[[], object]) -> None:
    """Ask until it holds, for a minute at most."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def family(server: Server) -> list[psutil.Process]:
    """Processes that the server started, and those that they did."""
    return list(psutil.Process(server.process.pid).children(recursive=True))


def member(server: Server, title: str) -> psutil.Process:
    """The first of them that vLLM calls by this title, as ``VLLM::EngineCore``."""
    return next(process for process in family(server) if title in process.cmdline()[0])


def has_ended(process: psutil.Process) -> bool:
    """Whether it runs no more, even if its parent did not ask for its status yet."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def stream_and_kill(url: str, kill: Callable[[], None]) -> list[dict[str, Any]]:
    """Events of a request of the model ``tiny``; ``kill`` is called after its third token."""
    request = {
        "model": "tiny",
        "prompt": random_prompts([2 * WINDOW])[0],
        "max_tokens": 400,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
    }
    events: list[dict[str, Any]] = []
    with httpx.stream("POST", f"{url}/v1/completions", json=request, timeout=TIMEOUT_S) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line.removeprefix("data: ")))
                if len(events) == 3:
                    kill()
    return events


def wait_for_end(server: Server, processes: list[psutil.Process]) -> None:
    """The server ends by itself, and so do these ``processes``."""
    server.process.wait(END_TIMEOUT_S)
    assert not psutil.wait_procs(processes, END_TIMEOUT_S)[1]
