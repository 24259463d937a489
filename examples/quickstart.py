"""Serve the demo model with a window and with full attention, and compare answers and memory.

python examples/quickstart.py [--keep] [--model DIR]
"""

import argparse
import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import torch

from make_demo_model import WINDOW, ensure_demo_model

PAGE_SIZE = 32  # tokens of one layer
START_TIMEOUT_S = 600
ANSWER_TOKENS = 32
CAUSE_LINE = re.compile(r"\bERROR\b.*\] +[\w.]*(Error|Exception)\b")
TABLE_LINE = re.compile(r"\bSWA .*")
SINKS = {"swa": {"sink_tokens": 4}}  # the model was trained with full attention
NO_WINDOW = {"swa": {"enabled": False}}
# Colours, names of processes, time and place of a message, and Ray's count of repetitions.
LOG_TRIM = re.compile(
    r"\x1b\[[\d;]*m|\([\w ]*pid=[^)]*\) ?|^ *[A-Z]+ [\d-]+ [\d:]+ \[\S+\] | *\[repeated .*"
)
SERVE_ARGS = ("--served-model-name", "demo", "--max-model-len", "4096", "--enforce-eager")


class QuickstartError(RuntimeError):
    """The demonstration did not do what it promises."""


class Server:
    """``vllm serve`` on a free loopback port; its output goes to a log file."""

    def __init__(
        self,
        model: Path,
        log_path: Path,
        args: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start the server; ``environment`` is what it needs beside :func:`server_environment`."""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        vllm = Path(sys.executable).with_name("vllm")
        address = ("--host", "127.0.0.1", "--port", str(port))
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(  # noqa: S603 (no shell; the caller's own arguments)
                [str(vllm), "serve", str(model), *address, *args],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**server_environment(), **(environment or {})},
                start_new_session=True,
            )

    def wait(self, *, progress: bool = False) -> None:
        """Block until the server answers.

        Raises:
            QuickstartError: it ended or took too long; the message has what its log says of it.
        """
        start, shown = time.monotonic(), ""
        for second in range(START_TIMEOUT_S):
            if self.process.poll() is not None:
                raise QuickstartError(
                    f"vllm serve ended with status {self.process.returncode}:\n{self._cause()}"
                )
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=5).is_success:
                    return
            if progress and second % 5 == 0:
                message = plain_message(self._log_tail(1))
                if message != shown:
                    waited = time.monotonic() - start
                    print(f"  {waited:3.0f} s  {message[:90]}", flush=True)
                    shown = message
            time.sleep(1)
        raise QuickstartError(f"vllm serve did not answer in time:\n{self._log_tail(15)}")

    def stop(self) -> None:
        """End the server and its processes."""
        for sign, patience_s in ((signal.SIGINT, 30), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience_s)
                return

    def window_table(self) -> list[str]:
        """The lines of the plugin's start-up table."""
        matches = map(TABLE_LINE.search, self.log_path.read_text(errors="replace").splitlines())
        return [match.group() for match in matches if match]

    def _cause(self) -> str:
        """The end of the log's first traceback, for the later ones only follow from it."""
        lines = self.log_path.read_text(errors="replace").splitlines()
        for number, line in enumerate(lines):
            if CAUSE_LINE.search(line):
                return "\n".join(lines[max(0, number - 14) : number + 5])
        return self._log_tail(15)

    def _log_tail(self, num_lines: int) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-num_lines:])


def plain_message(line: str) -> str:
    """A line of the log without colours, process, time and place."""
    while (rest := LOG_TRIM.sub("", line)) != line:
        line = rest
    return line.strip()


def free_port() -> int:
    """A loopback port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def server_environment() -> dict[str, str]:
    """This process's environment, with what vLLM needs on a machine without GPU."""
    env = dict(os.environ)
    if not torch.cuda.is_available():
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        # Threads are bound to cores by default, which asserts on machines with few.
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        env.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    return env


def ask(url: str, question: str) -> str:
    """The answer of one chat completion."""
    request = {
        "model": "demo",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
    }
    response = httpx.post(f"{url}/v1/chat/completions", json=request, timeout=300)
    response.raise_for_status()
    return str(response.json()["choices"][0]["message"]["content"])


def long_prompt() -> str:
    """A text of more than eight windows, with a question at its end."""
    days = (
        f"Day {day}: the ship sailed {day * 7 % 90 + 10} miles, the wind blew from the "
        f"{('north', 'east', 'south', 'west')[day % 4]}, and the cook served fish."
        for day in range(1, 41)
    )
    return "\n".join([*days, "Describe the voyage in a few sentences."])


def stream_measuring_pages(url: str, prompt: str) -> tuple[str, int, int, int]:
    """Stream an answer and read the server's pool while it is being written.

    Returns:
        The answer, tokens of prompt and answer together, prompt tokens, and blocks of the pool
        that were held near the end.
    """
    request = {
        "model": "demo",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text, held = "", 0
    usage: dict[str, int] = {}
    endpoint = f"{url}/v1/chat/completions"
    with httpx.stream("POST", endpoint, json=request, timeout=600) as response:
        response.raise_for_status()
        for event in _events(response):
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                text += choice["delta"].get("content") or ""
                held = blocks_held(url) or held  # 0 once the request has ended
    return text, usage["total_tokens"], usage["prompt_tokens"], held


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def blocks_held(url: str) -> int:
    """Blocks of the KV pool that requests hold now, from the server's metrics."""
    metrics = httpx.get(f"{url}/metrics", timeout=30).text
    usage = re.search(r"^vllm:kv_cache_usage_perc\{.*?\} (\S+)", metrics, re.MULTILINE)
    num_blocks = re.search(r'num_gpu_blocks="(\d+)"', metrics)
    if usage is None or num_blocks is None:
        raise QuickstartError("the server's /metrics lack vllm:kv_cache_usage_perc or its blocks")
    return round(float(usage.group(1)) * (int(num_blocks.group(1)) - 1))  # one is never given out


def most_pages_of_a_request(url: str) -> int:
    """Most pages that one request has held in a sliding layer, from the server's metrics."""
    for line in window_metrics(url):
        if line.startswith("swa_pages_peak_per_request{"):
            return round(float(line.split()[-1]))
    raise QuickstartError("the server's /metrics lack swa_pages_peak_per_request")


def window_metrics(url: str) -> list[str]:
    """What the server's ``/metrics`` say of its windows."""
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return [line for line in lines if line.startswith("swa_")]


def pages_held(server: Server, num_blocks: int, num_layers: int) -> int:
    """Pages of ``num_blocks`` blocks of the pool, which hold one for each layer of a KV group."""
    num_groups = 1 + max(int(re.findall(r"\d+", line)[-1]) for line in server.window_table()[1:])
    return num_blocks * math.ceil(num_layers / num_groups)


def demonstrate(server: Server, full: Server, num_layers: int) -> None:
    """Ask both servers, show and check.

    Raises:
        QuickstartError: no window table, a wrong answer, or no page saved.
    """
    answer = ask(server.url, "What is the capital of France?")
    print(f"\nWhat is the capital of France?\n  -> {answer}")
    text, num_tokens, num_prompt_tokens, held = stream_measuring_pages(server.url, long_prompt())
    full_text = ask(full.url, long_prompt())
    windows = num_prompt_tokens / WINDOW
    print(
        f"\nA prompt of {num_prompt_tokens} tokens ({windows:.1f} windows)"
        f"\n  window and sinks -> {text.strip()}\n  full attention   -> {full_text.strip()}"
    )

    table = server.window_table()
    print("\nWindow of every layer:\n  " + "\n  ".join(table))
    if not any(" sliding " in line for line in table):
        raise QuickstartError(f"no sliding layer in the server's log {server.log_path}")
    pages = pages_held(server, held, num_layers)
    full_pages = math.ceil(num_tokens / PAGE_SIZE) * num_layers
    print(
        f"\nKV pages held after {num_tokens} tokens ({PAGE_SIZE} tokens of one layer a page): "
        f"{pages}; full attention in all {num_layers} layers: {full_pages} "
        f"({pages / full_pages:.0%})"
    )
    print("\nThe window in the server's /metrics:\n  " + "\n  ".join(window_metrics(server.url)))
    if "Paris" not in answer:
        raise QuickstartError("the answer does not name Paris")
    if windows < 8 or not 0 < pages < full_pages:
        raise QuickstartError("the window saved no page")


def start_server(model: Path, log_path: Path, options: Mapping[str, Any]) -> Server:
    """Start one of two servers that share this machine."""
    print(
        f"Starting vllm serve {model} with {json.dumps(options)}; its log is {log_path}", flush=True
    )
    memory = ("--gpu-memory-utilization", "0.4") if torch.cuda.is_available() else ()
    place = ("--block-size", str(PAGE_SIZE), *memory)
    return Server(
        model, log_path, [*SERVE_ARGS, *place, "--additional-config", json.dumps(options)]
    )


def exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Signal handler: end this process as an exception would."""
    sys.exit(128 + number)  # runs the finally blocks


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Serve the demo model with a window.")
    parser.add_argument("--keep", action="store_true", help="leave the server running")
    parser.add_argument(
        "--model", type=Path, help="checkpoint with a window (default: the mixed demo model)"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, exit_on_signal)

    model = args.model or ensure_demo_model(Path(".cache/demo"))["mixed"]
    keep = False
    with contextlib.ExitStack() as servers:
        try:
            full = start_server(model, Path(".cache/quickstart_full.log"), NO_WINDOW)
            servers.callback(full.stop)
            if torch.cuda.is_available():
                full.wait(progress=True)  # vLLM measures what is free on a GPU while it starts
            server = start_server(model, Path(".cache/quickstart.log"), SINKS)
            stop_server = servers.enter_context(contextlib.ExitStack())
            stop_server.callback(server.stop)
            server.wait(progress=True)
            full.wait()
            num_layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
            demonstrate(server, full, num_layers)
            if keep := args.keep:
                stop_server.pop_all()
        except (QuickstartError, httpx.HTTPError) as error:
            sys.exit(f"error: {error}")
    if keep:
        messages = [{"role": "user", "content": "Who are you?"}]
        request = json.dumps({"model": "demo", "messages": messages, "max_tokens": 64})
        print(
            f"\nThe server keeps running. Ask it with\n"
            f"  curl {server.url}/v1/chat/completions -H 'Content-Type: application/json' "
            f"-d '{request}'\n"
            f"see what its window does with\n  curl -s {server.url}/metrics | grep ^swa_\n"
            f"and stop it with\n  kill -INT {server.process.pid}"
        )


if __name__ == "__main__":
    main()
