"""Serve the demo model by two servers of this machine, one for prompts and one for answers.

python -m prefill_decode.run_local, in the directory examples
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import torch

from make_demo_model import ensure_demo_model
from quickstart import (
    SERVE_ARGS,
    QuickstartError,
    Server,
    ask,
    exit_on_signal,
    free_port,
    long_prompt,
)

ROLES = ("kv_producer", "kv_consumer")
QUESTIONS = ("What is the capital of France?", long_prompt())
PROXY_TIMEOUT_S = 60


def role_args(role: str) -> list[str]:
    """Arguments of ``vllm serve`` for a server of this role, on a machine without GPUs."""
    config = {"kv_connector": "NixlConnector", "kv_role": role}
    return [*SERVE_ARGS, "--dtype", "float32", "--kv-transfer-config", json.dumps(config)]


def transfer_environment() -> dict[str, str]:
    """Variables that keep a server's transfers on this machine, at a port of its own."""
    return {
        "UCX_TLS": "tcp,self,sm",
        "UCX_NET_DEVICES": "lo",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
    }


@contextmanager
def proxy(prefill: str, decode: str) -> Iterator[str]:
    """The URL of a proxy before the servers at two URLs."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    script = Path(__file__).with_name("proxy.py")
    arguments = ["--prefill", prefill, "--decode", decode, "--port", str(port)]
    process = subprocess.Popen([sys.executable, str(script), *arguments])  # noqa: S603 (no shell)
    try:
        deadline = time.monotonic() + PROXY_TIMEOUT_S
        while True:
            try:
                httpx.get(f"{url}/health", timeout=5).raise_for_status()
                break
            except httpx.HTTPError as error:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise QuickstartError(f"the proxy does not answer: {error!r}") from error
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def bytes_moved(url: str) -> int:
    """Bytes of pages that the server at ``url`` read from others, from its metrics."""
    name = "vllm:nixl_bytes_transferred_sum"
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith(name)))


def demonstrate(model: Path) -> None:
    """Start both servers and the proxy, and print answers and what they moved.

    Raises:
        QuickstartError: something did not start, or the answers differ from one server's.
    """
    shared = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(ROLES))),
        # A worker in a process of its own waits on a core, and each server has NIXL's thread that
        # does: on two cores they take a handshake's time from one another.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    with ExitStack() as stack:
        servers = []
        for role in ROLES:
            log = Path(f".cache/prefill_decode_{role}.log")
            print(f"Starting vllm serve as {role}; its log is {log}", flush=True)
            server = Server(model, log, role_args(role), {**transfer_environment(), **shared})
            stack.callback(server.stop)
            servers.append(server)
        for server in servers:
            server.wait(progress=True)
        prefill, decode = servers
        url = stack.enter_context(proxy(prefill.url, decode.url))
        for question in QUESTIONS:
            before = bytes_moved(decode.url)
            answer = ask(url, question)
            print(f"\n{question[-70:]}\n  -> {answer}")
            print(f"  bytes moved: {bytes_moved(decode.url) - before}")
            if answer != ask(prefill.url, question):
                raise QuickstartError("the answer of two servers is not the one of a single server")
    print("\nAll servers are gone")


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, exit_on_signal)
    if torch.cuda.is_available():
        sys.exit("error: this shows two servers on a machine without GPUs; see README.md")
    try:
        demonstrate(ensure_demo_model(Path(".cache/demo"))["mixed"])
    except (QuickstartError, httpx.HTTPError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
