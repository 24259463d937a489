"""Two servers that exchange pages over NIXL at loopback: one fills prompts' pages, one answers."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefill_decode.run_local import transfer_environment
from swa_backend.pages import ceil_div
from tests.helpers.engines import Answer
from tests.helpers.processes import Probe, probe_environment
from tests.helpers.tiny_models import NUM_LAYERS, PAGE_SIZE, WINDOW

# What a server that fills pages is asked for; vLLM documents it for the proxy.
FOR_ANOTHER = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
PRODUCER, CONSUMER = "kv_producer", "kv_consumer"
_PAGE_BYTES = 2 * 2 * PAGE_SIZE * 32 * 4  # keys and values of two heads, in fp32


def num_prompt_bytes(length: int, full: set[int]) -> int:
    """Bytes of a tiny model's pages that the last token of a prompt sees.

    Args:
        full: the layers without a window.
    """
    num_pages = ceil_div(length, PAGE_SIZE)
    in_window = num_pages - max(0, length - WINDOW) // PAGE_SIZE
    return _PAGE_BYTES * sum(num_pages if i in full else in_window for i in range(NUM_LAYERS))


def transfer_config(role: str, *, recomputes: bool = False, **extra: Any) -> dict[str, Any]:
    """An engine's ``kv_transfer_config`` for NIXL; ``extra`` goes to the connector."""
    return {
        "kv_connector": "NixlConnector",
        "kv_role": role,
        "kv_load_failure_policy": "recompute" if recomputes else "fail",
        "kv_connector_extra_config": extra,
    }


@dataclass
class Served:
    """One answer of a server, and what another needs to take over."""

    answer: Answer
    transfer: dict[str, Any] | None
    reason: str


def _served(answer: dict[str, Any]) -> Served:
    return Served(
        Answer(answer["tokens"], answer["logprobs"], answer["num_cached_tokens"]),
        answer["transfer"],
        answer["reason"],
    )


class Server:
    """An engine in a process of its own."""

    def __init__(self, role: str, log: Path) -> None:
        """Take what it does, and the file for its log."""
        says = {"VLLM_LOGGING_STREAM": "ext://sys.stderr"}  # which goes to the log
        env = {**probe_environment(), **transfer_environment(), **says}
        self._probe = Probe("transfer", env, log)
        self._role = role
        self.log = log

    def start(self, model: Path, extra: dict[str, Any], arguments: dict[str, Any]) -> None:
        """Start it; ``extra`` goes to ``transfer_config``, ``arguments`` to ``LLM``."""
        swa = arguments["additional_config"]["swa"]
        if self._role == CONSUMER:
            swa = {**swa, "debug_poison": False}
        given = {
            **arguments,
            "additional_config": {"swa": swa},
            "kv_transfer_config": transfer_config(self._role, **extra),
        }
        self._probe.ask("start", str(model), given)

    def serve(
        self, prompts: list[list[int]], num_tokens: int, transfers: list[dict[str, Any] | None]
    ) -> list[Served]:
        """Answer prompts; ``transfers`` says of each what another server has or shall get."""
        return list(map(_served, self._probe.ask("serve", prompts, num_tokens, transfers)))

    def serve_preempted(
        self, prompts: list[list[int]], num_tokens: int, transfers: list[dict[str, Any] | None]
    ) -> tuple[list[Served], int]:
        """As :meth:`serve`, but all start over inside their answers; how many did."""
        served, num = self._probe.ask("serve preempted", prompts, num_tokens, transfers)
        return list(map(_served, served)), num

    def fill(self, prompts: list[list[int]]) -> list[dict[str, Any] | None]:
        """Compute prompts for another server; say what it needs to get their pages."""
        filled = self.serve(prompts, 1, [FOR_ANOTHER] * len(prompts))
        assert all(served.transfer for served in filled)
        return [served.transfer for served in filled]

    def abandon(self, prompt: list[int], transfer: dict[str, Any] | None) -> None:
        """Take a request and abort it before anything is read."""
        self._probe.ask("abandon", prompt, transfer)

    def begin(self, prompts: list[list[int]], transfers: list[dict[str, Any] | None]) -> None:
        """Take requests, and begin to read their pages."""
        self._probe.ask("begin", prompts, transfers)

    def settle(self) -> dict[str, int]:
        """Go on until all is done: pages held then, and counts of windowed layers' managers."""
        settled: dict[str, int] = self._probe.ask("settle")
        return settled

    def bytes_read(self) -> int:
        """Bytes that it read from others since it started."""
        return int(self._probe.ask("bytes read"))

    def stop(self) -> None:
        """End the process at once."""
        self._probe.stop()


@contextmanager
def servers(
    logs: Path, *asked: tuple[Path, str, dict[str, Any], dict[str, Any]]
) -> Iterator[list[Server]]:
    """Servers that start at once, and their end.

    Args:
        asked: of each the checkpoint, its role, and arguments of ``transfer_config`` and ``LLM``.
    """
    running = [
        Server(role, logs / f"{number}-{role}") for number, (_, role, _, _) in enumerate(asked)
    ]
    try:
        with ThreadPoolExecutor() as threads:
            starts = [
                threads.submit(started.start, model, extra, arguments)
                for started, (model, _, extra, arguments) in zip(running, asked, strict=True)
            ]
        for start in starts:
            start.result()
        yield running
    finally:
        for started in running:
            started.stop()
