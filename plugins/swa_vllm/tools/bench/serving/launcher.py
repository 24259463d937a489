"""Who is compared on the same work: this plugin, vLLM without it, Hugging Face."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swa_vllm.tools.bench.serving.process import Peer
from swa_vllm.tools.common.arms import Arm


@dataclass(frozen=True)
class Kind:
    """A peer.

    Attributes:
        windowed: whether its layers slide.
        spec: vLLM's KV cache spec that says so; None where it is not vLLM.
    """

    name: str
    windowed: bool
    spec: str | None
    with_plugin: bool = False


KINDS = {
    "here": Kind(Arm.SWA.value, True, "SWASpec", with_plugin=True),
    "stock": Kind(Arm.STOCK.value, True, "SlidingWindowSpec"),
    "full": Kind(Arm.FULL.value, False, "FullAttentionSpec"),
    "hf": Kind("Hugging Face", True, None),
}
HF_FULL = Kind("Hugging Face, full attention", False, None)  # to check only


@dataclass(frozen=True)
class Launcher:
    """How peers are started.

    Attributes:
        models: checkpoint with all layers sliding, by True, and with all full, by False.
        engine: arguments of vLLM's ``LLM``.
        batch: of Hugging Face's ``generate``.
    """

    models: Mapping[bool, Path]
    dtype: str
    threads: int
    engine: Mapping[str, Any]
    batch: int = 8

    def start(self, kind: Kind, **engine: Any) -> Peer:
        """A peer, whose layers are those that were asked for; ``engine`` overrides.

        Raises:
            RuntimeError: it does not start, or serves other layers.
        """
        arguments = {
            "model": str(self.models[kind.windowed]),
            "dtype": self.dtype,
            "threads": self.threads,
        }
        if kind.spec is None:
            env = {"OMP_NUM_THREADS": str(self.threads)}
            arguments["batch"] = self.batch
            return Peer(kind.name, "swa_vllm.tools.bench.serving.hugging_face", arguments, env)
        arguments |= {**self.engine, **engine}
        peer = Peer(
            kind.name,
            "swa_vllm.tools.bench.serving.vllm_engine",
            arguments,
            self._environment(kind),
        )
        if peer.facts["specs"] != [kind.spec]:
            peer.__exit__(RuntimeError, None, None)
            raise RuntimeError(
                f"{kind.name} serves {', '.join(peer.facts['specs'])} instead of {kind.spec}; "
                "is the plugin installed?"
            )
        return peer

    def _environment(self, kind: Kind) -> dict[str, str]:
        """Variables that vLLM reads early."""
        return {
            "OMP_NUM_THREADS": str(self.threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            **({} if kind.with_plugin else {"VLLM_PLUGINS": ""}),
        }


def add_arguments(parser: argparse.ArgumentParser, names: str, rounds: int) -> None:
    """Options of benchmarks that have peers; ``names`` and ``rounds`` are defaults."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        type=Path,
        help="directory of a dense Qwen3 (default: a small one of random weights)",
    )
    parser.add_argument("--dtype", default="float32", help="default: %(default)s")
    parser.add_argument("--block-size", type=int, default=32, help="tokens of a page (32)")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a prefill chunk (2048)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers", default=names, metavar="NAMES", help=f"default: {names}")
    parser.add_argument("--once", default="", metavar="NAMES", help="peers of one round only")
    parser.add_argument("--rounds", type=int, default=rounds, help="default: %(default)s")


def kinds_of(flag: str, text: str) -> dict[str, Kind]:
    """Peers by the names on the command line.

    Raises:
        ValueError: there is no such peer.
    """
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in KINDS]:
        raise ValueError(f"{flag} {text}: no peer {unknown[0]!r}; there are {', '.join(KINDS)}")
    return {name: kind for name, kind in KINDS.items() if name in names}
