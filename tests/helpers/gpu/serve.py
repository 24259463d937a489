"""A step: ``vllm serve`` with Qwen3-8B's shapes and random weights, under its default flags.

It records Triton compilations while requests are served, as vLLM's own monitor logs them, and the
time between a stream's tokens.

``python -m tests.helpers.gpu.serve [--dry-run]``
"""

import http.client
import itertools
import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.gpu.lines import end_not_run, record

_QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "eos_token_id": 151645,
}
_TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512}
_TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
_SWA = {"swa": {"window": 1024, "sink_tokens": 4, "full_attention_layers": "every:2"}}
# What no checkpoint without text and weights can do without, and what counts every compilation.
_FLAGS = ("--load-format", "dummy", "--skip-tokenizer-init", "--jit-monitor-verbose")
_DRY_FLAGS = ("--enforce-eager", "--max-model-len", "4096", "--max-num-batched-tokens", "512")
_MONITOR = "Kernel JIT monitor activated"
_COMPILED = re.compile(r"(\w+) (?:kernel )?JIT compilation during inference: (\S+?)(?:\. | \()")
_WINDOWS = re.compile(r"\bSWA (\d.*?\bsliding\b.*)")


@dataclass(frozen=True)
class Load:
    """Streams at once: lengths of their prompts, and tokens of each answer."""

    lengths: tuple[int, ...]
    num_tokens: int


_LOAD = Load((100, 900, 1100, 3000, 6000, 12000, 20000, 30) * 2, 128)
_DRY_LOAD = Load((30, 1500), 4)


def _stream(port: int, seed: int, length: int, num_tokens: int) -> list[float]:
    """Ask for an answer to tokens that no other ``seed`` has; returns when each piece came."""
    request = {
        "prompt": [(7919 * i + 101 * seed) % 500 for i in range(length)],
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=100)
    body, headers = json.dumps(request), {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", body, headers)
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {response.read(500)!r}")
    came, num_got = list[float](), 0
    for line in response:
        if line.startswith(b"data: {"):
            tokens = json.loads(line[len(b"data: ") :])["choices"][0].get("token_ids") or ()
            num_got += len(tokens)
            came.append(time.monotonic())
    if num_got != num_tokens:
        raise RuntimeError(f"{num_got} tokens of {num_tokens} came for a prompt of {length}")
    return came


def serve_once(port: int, load: Load, turn: int) -> dict[str, Any]:
    """Serve the whole load at once; returns quantiles of the time between a stream's tokens."""
    start, seeds = time.monotonic(), range(100 * turn, 100 * turn + len(load.lengths))
    with ThreadPoolExecutor(len(load.lengths)) as pool:
        streams = [
            pool.submit(_stream, port, seed, length, load.num_tokens)
            for seed, length in zip(seeds, load.lengths, strict=True)
        ]
    came = [stream.result() for stream in streams]
    gaps = sorted(
        1e3 * (late - early) for times in came for early, late in itertools.pairwise(times)
    )
    quantiles = {f"p{q}_ms": round(gaps[len(gaps) * q // 100], 2) for q in (50, 99)}
    return {
        "streams": len(came),
        "tokens": load.num_tokens * len(came),
        "seconds": round(time.monotonic() - start, 2),
        "step": {**quantiles, "max_ms": round(gaps[-1], 2)},
    }


def read_log(log: str) -> dict[str, Any]:
    """Read the plugin's table of windows, and what vLLM's monitor logged while it served."""
    names = [f"{backend} {name}" for backend, name in _COMPILED.findall(log)]
    return {
        "windows": _WINDOWS.findall(log),
        "monitored": _MONITOR in log,
        "compiled_while_serving": {name: names.count(name) for name in sorted(set(names))},
    }


class _Server:
    """``vllm serve`` on a free loopback port; what it prints goes to this step's log."""

    def __init__(self, model: str, flags: tuple[str, ...]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        address = ("--host", "127.0.0.1", "--port", str(self.port))
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
        self._process = subprocess.Popen(
            [*command, *address, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            print(line, end="", flush=True)
            self._lines.append(line)

    def wait(self) -> None:
        """Block until it answers; the step's limit ends a wait that is too long."""
        while self._process.poll() is None:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.5)
        raise RuntimeError(f"vllm serve ended with status {self._process.returncode}")

    def stop(self) -> str:
        """End it; returns its log."""
        self._process.terminate()
        self._process.wait()
        self._reader.join(10)
        return "".join(self._lines)


def main(arguments: list[str]) -> None:
    """Start a server, serve the load twice, and record what that took."""
    dry = "--dry-run" in arguments
    load, flags = (_DRY_LOAD, (*_FLAGS, *_DRY_FLAGS)) if dry else (_LOAD, _FLAGS)
    with tempfile.TemporaryDirectory() as directory:
        config = {**_QWEN3_8B, **(_TINY if dry else {})}
        Path(directory, "config.json").write_text(json.dumps(config))
        start = time.monotonic()
        server = _Server(directory, (*flags, "--additional-config", json.dumps(_SWA)))
        try:
            server.wait()
            record(ready_after_s=round(time.monotonic() - start, 1))
            for turn in (1, 2):
                record(turn=turn, **serve_once(server.port, load, turn))
        finally:
            read = read_log(server.stop())
            record(**read)
    if not read["windows"]:
        raise RuntimeError("the plugin logged no sliding layer")
    if not (dry or read["monitored"]):
        end_not_run("vLLM's monitor did not start: nobody knows what was compiled")


if __name__ == "__main__":
    main(sys.argv[1:])
