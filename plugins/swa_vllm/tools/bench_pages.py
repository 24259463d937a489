"""Pages a request holds, and requests that run, on vLLM's real scheduler without a model.

Full attention, stock vLLM's sliding window and this plugin serve the same requests, all there at
the start, from the same pool. "Estimate" is the "maximum concurrency" that vLLM prints at start; it
assumes requests of max_model_len. "Running" is what ran, on average over the steps. "Promised" is
what admission reserves for a request of max_model_len, "held" the most that one request had.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from swa_backend.pages import ceil_div
from swa_vllm.tools.simulate import Arm, Engine, Outcome, simulate
from swa_vllm.tools.table import format_table

EXAMPLE = "--window 1024 --block-size 16 --prompt 32000 --output 512 --num-requests 80"
_HEADER = ("", "estimate", "running", "steps", "pages promised", "pages held", "preemptions")
# A card of 24 GB that an 8B model leaves 32k tokens of KV cache on, asynchronous scheduling.
_CARD = Engine(
    window=1024,
    block_size=16,
    num_pages=2048,
    max_num_batched_tokens=8192,
    max_model_len=40960,
    num_steps_in_flight=2,
)


@dataclass(frozen=True)
class Workload:
    """Requests of one size, and the engine that serves them."""

    name: str
    engine: Engine
    num_requests: int
    num_prompt: int
    num_output: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a workload of one's own; without any, the built-in ones run."""
    parser.add_argument("--window", type=int, help="tokens a sliding layer sees")
    parser.add_argument("--block-size", type=int, default=16, help="tokens a page")
    parser.add_argument("--pool-tokens", type=int, default=32768, help="tokens of KV cache")
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--max-model-len", type=int, help="default: prompt + output")
    parser.add_argument("--steps-in-flight", type=int, choices=(1, 2), default=2)
    parser.add_argument("--prefix-caching", action="store_true")
    parser.add_argument("--prompt", type=int, default=8000, help="tokens a prompt")
    parser.add_argument("--output", type=int, default=512, help="tokens an answer")
    parser.add_argument("--num-requests", type=int, default=80)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print a table a workload; returns the figures."""
    results = []
    for workload in [_own(args)] if args.window is not None else _built_in(args.quick):
        outcomes = {}
        for arm in Arm:
            print(f"{workload.name}: {arm.value} ...", file=sys.stderr, flush=True)
            outcomes[arm] = _serve(arm, workload)
        _print(workload, outcomes)
        results.append(
            {
                "workload": workload.name,
                "engine": vars(workload.engine),
                "arms": {arm.value: outcome.to_json() for arm, outcome in outcomes.items()},
            }
        )
    return results


def _own(args: argparse.Namespace) -> Workload:
    longest = args.prompt + args.output
    for name in ("window", "block_size", "max_num_batched_tokens", "prompt", "output"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    if (args.max_model_len or longest) < longest:
        raise ValueError(
            f"--max-model-len {args.max_model_len} is below prompt + output = {longest}"
        )
    engine = Engine(
        window=args.window,
        block_size=args.block_size,
        num_pages=args.pool_tokens // args.block_size,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=args.max_model_len or longest,
        num_steps_in_flight=args.steps_in_flight,
        prefix_caching=args.prefix_caching,
    )
    return Workload("requests", engine, args.num_requests, args.prompt, args.output)


def _built_in(quick: bool) -> Iterator[Workload]:
    for window, chunk in ((64, 8192), (512, 8192), (1024, 2048), (1024, 8192)):
        engine = Engine(window, 32, 1024, chunk, 8192)
        yield Workload(f"chunks of {chunk}", engine, 4, 6000, 32)
    for num_pages in (140, 260):
        engine = Engine(64, 32, num_pages, 2048, 8192)
        yield Workload(f"pool of {num_pages} pages", engine, 64, 2000, 200)
    if quick:
        return
    for num_prompt in (32000, 16000, 8000, 2000):
        yield Workload("24 GB card", _CARD, 80, num_prompt, 512)
    larger = replace(_CARD, max_num_batched_tokens=16384)
    yield Workload("24 GB card, chunks of 16384", larger, 80, 32000, 512)


def _serve(arm: Arm, workload: Workload) -> Outcome:
    """The outcome; full attention gets the shortest max_model_len that the requests allow."""
    engine = workload.engine
    if arm is Arm.FULL:
        engine = replace(engine, max_model_len=workload.num_prompt + workload.num_output)
    requests = [(workload.num_prompt, workload.num_output)] * workload.num_requests
    return simulate(arm, engine, requests)


def _print(workload: Workload, outcomes: dict[Arm, Outcome]) -> None:
    engine = workload.engine
    print(
        f"\n{workload.name}: {workload.num_requests} x {workload.num_prompt} + "
        f"{workload.num_output} tokens, W={engine.window}, pool {engine.num_pages} pages of "
        f"{engine.block_size}, chunk {engine.max_num_batched_tokens}, "
        f"{engine.num_steps_in_flight} step(s) in flight, "
        f"prefix caching {'on' if engine.prefix_caching else 'off'}"
    )
    rows: list[tuple[object, ...]] = []
    for arm, o in outcomes.items():
        if o.starts:
            pages = (o.promised_pages, o.peak_pages)
            rows.append(
                (arm.value, o.estimate, o.mean_running, o.num_steps, *pages, o.num_preemptions)
            )
        else:
            rows.append((arm.value, o.estimate, "does not start", 0, o.promised_pages, 0, 0))
    print(format_table(_HEADER, rows))
    decode = ceil_div(engine.window - 1, engine.block_size) + 1
    print(f"a decoding request needs {decode} pages of its window")
