"""The arms of a served workload: this plugin, vLLM without it, and Hugging Face."""

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path

from swa_backend.window import Phase
from swa_vllm.tools.common.arms import Arm
from swa_vllm.tools.common.engine_arguments import add_engine_arguments


@dataclass(frozen=True)
class ServingArm:
    """An arm that serves requests in a process of its own.

    Attributes:
        name: the arm's name in tables and figures.
        windowed: whether its layers slide.
        spec: vLLM's KV cache spec that says so; None where it is not vLLM.
        phase: whose tokens have the window.
    """

    name: str
    windowed: bool
    spec: str | None
    with_plugin: bool = False
    phase: Phase = Phase.BOTH


# By the names on the command line.
SERVING_ARMS = {
    "here": ServingArm(Arm.SWA.value, True, "SWASpec", with_plugin=True),
    "stock": ServingArm(Arm.STOCK.value, True, "SlidingWindowSpec"),
    "full": ServingArm(Arm.FULL.value, False, "FullAttentionSpec"),
    "hf": ServingArm("Hugging Face", True, None),
}
_HERE = SERVING_ARMS["here"]
HERE_BY_PHASE = {
    Phase.BOTH: _HERE,
    Phase.PREFILL: replace(_HERE, spec="PromptCacheSpec", phase=Phase.PREFILL),
    Phase.DECODE: replace(_HERE, spec="PromptWindowSpec", phase=Phase.DECODE),
}
HF_FULL = ServingArm("Hugging Face, full attention", False, None)  # to check only


def add_arms_and_rounds_arguments(parser: argparse.ArgumentParser, names: str, rounds: int) -> None:
    """Add the options of benchmarks that serve; ``names`` and ``rounds`` are defaults."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        type=Path,
        help="a dense Qwen3: a directory, or a hub's name that is cached (default: a small one "
        "of random weights)",
    )
    parser.add_argument("--dtype", default="float32", help="dtype of the weights")
    add_engine_arguments(parser, block_size=32, max_num_batched_tokens=2048)
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="cores that an arm computes on (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random texts")
    parser.add_argument(
        "--peers", default=names, metavar="NAMES", help="arms that serve in every round"
    )
    parser.add_argument("--once", default="", metavar="NAMES", help="arms of one round only")
    parser.add_argument(
        "--rounds", type=int, default=rounds, metavar="N", help="rounds that are timed"
    )


def serving_arms_of(flag: str, text: str) -> dict[str, ServingArm]:
    """Look up arms by their names on the command line.

    Raises:
        ValueError: there is no such arm.
    """
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in SERVING_ARMS]:
        raise ValueError(
            f"{flag} {text}: no peer {unknown[0]!r}; there are {', '.join(SERVING_ARMS)}"
        )
    return {name: arm for name, arm in SERVING_ARMS.items() if name in names}
