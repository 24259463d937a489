"""Pages a request holds, and requests that run, on vLLM's real scheduler without a model."""

import argparse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swa_backend.pages import WindowPages
from swa_backend.table import format_table
from swa_vllm.tools.bench.flags import OWN
from swa_vllm.tools.common import plots
from swa_vllm.tools.common.arguments import check_number_arguments
from swa_vllm.tools.common.arms import Arm
from swa_vllm.tools.common.progress import say
from swa_vllm.tools.engines.scheduler import Outcome, simulate
from swa_vllm.tools.engines.simulated import Engine

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
class EngineWorkload:
    """Requests of one size, and the engine that serves them."""

    name: str
    engine: Engine
    num_requests: int
    num_prompt: int
    num_output: int


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print a table for each workload; returns the figures."""
    results = []
    for workload in _chosen_workloads(args):
        outcomes = {}
        for arm in Arm:
            say(f"{workload.name}: {arm.value}")
            outcomes[arm] = _simulate_workload(arm, workload)
        _print_pages_held(workload, outcomes)
        results.append(
            {
                "workload": workload.name,
                "num_prompt": workload.num_prompt,
                "engine": vars(workload.engine),
                "arms": {arm.value: outcome.to_json() for arm, outcome in outcomes.items()},
            }
        )
    return {"workloads": results}


def plot(path: Path, figures: Mapping[str, Any]) -> None:
    """Draw how many requests ran at once, on average."""
    workloads = figures["workloads"]
    groups = [f"{w['workload']}, {w['num_prompt']}, W={w['engine']['window']}" for w in workloads]
    series = {arm.value: [w["arms"][arm.value]["mean_running"] for w in workloads] for arm in Arm}
    plots.draw_bars(path, groups, series, "requests that ran at once, mean")


def _chosen_workloads(args: argparse.Namespace) -> Iterable[EngineWorkload]:
    given = [name for name in OWN if getattr(args, name) is not None]
    if args.window is None:
        if given or args.prefix_caching:
            raise ValueError("a workload of your own needs --window, in tokens")
        return _benchmark_workloads(args.quick)
    if args.quick:
        raise ValueError("--quick is for the built-in workloads; remove it or --window")
    check_number_arguments(args, given)
    return [_own_workload(**{name: getattr(args, name) or OWN[name] for name in OWN}, args=args)]


def _own_workload(args: argparse.Namespace, **sizes: Any) -> EngineWorkload:
    longest = sizes["prompt"] + sizes["output"]
    max_model_len = sizes["max_model_len"] or longest
    if max_model_len < longest:
        raise ValueError(
            f"--max-model-len {max_model_len} is below prompt + output = {longest}; raise it to "
            "that, or leave it out"
        )
    if sizes["steps_in_flight"] > 2:
        raise ValueError(f"--steps-in-flight must be 1 or 2, got {sizes['steps_in_flight']}")
    if sizes["pool_tokens"] < 2 * sizes["block_size"]:
        raise ValueError(
            f"--pool-tokens {sizes['pool_tokens']} is less than two pages of --block-size "
            f"{sizes['block_size']}; give more, or smaller pages"
        )
    engine = Engine(
        window=sizes["window"],
        block_size=sizes["block_size"],
        num_pages=sizes["pool_tokens"] // sizes["block_size"],
        max_num_batched_tokens=sizes["max_num_batched_tokens"],
        max_model_len=max_model_len,
        num_steps_in_flight=sizes["steps_in_flight"],
        prefix_caching=args.prefix_caching,
    )
    return EngineWorkload(
        "requests", engine, sizes["num_requests"], sizes["prompt"], sizes["output"]
    )


def _benchmark_workloads(quick: bool) -> Iterator[EngineWorkload]:
    for window, chunk in ((64, 8192), (512, 8192), (1024, 2048), (1024, 8192)):
        engine = Engine(window, 32, 1024, chunk, 8192)
        yield EngineWorkload(f"chunks of {chunk}", engine, 4, 6000, 32)
    for num_pages in (140, 260):
        engine = Engine(64, 32, num_pages, 2048, 8192)
        yield EngineWorkload(f"pool of {num_pages} pages", engine, 64, 2000, 200)
    if quick:
        return
    for num_prompt in (32000, 16000, 8000, 2000):
        yield EngineWorkload("24 GB card", _CARD, 80, num_prompt, 512)
    larger = replace(_CARD, max_num_batched_tokens=16384)
    yield EngineWorkload("24 GB card, chunks of 16384", larger, 80, 32000, 512)


def _simulate_workload(arm: Arm, workload: EngineWorkload) -> Outcome:
    """Serve a workload; full attention gets the shortest max_model_len that it allows."""
    engine = workload.engine
    if arm is Arm.FULL:
        engine = replace(engine, max_model_len=workload.num_prompt + workload.num_output)
    requests = [(workload.num_prompt, workload.num_output)] * workload.num_requests
    return simulate(arm, engine, requests)


def _print_pages_held(workload: EngineWorkload, outcomes: dict[Arm, Outcome]) -> None:
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
            rows.append((arm.value, o.estimate, "-", "-", o.promised_pages, "-", "-"))
    print(format_table(_HEADER, rows))
    for arm, o in outcomes.items():
        if not o.starts:
            needed = o.promised_pages + 1  # one is never given out
            print(
                f"{arm.value} does not start: its longest request needs a pool of {needed} pages, "
                f"--pool-tokens {needed * engine.block_size}"
            )
    decode = WindowPages(engine.window, engine.block_size).max_survivors
    print(f"a decoding request needs {decode} pages of its window")
