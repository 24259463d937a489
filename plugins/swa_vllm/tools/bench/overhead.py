"""Processor time of scheduler, page manager and metadata builder per step, beside stock vLLM's."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from swa_backend.table import format_table
from swa_vllm.tools.bench.attention.host_time import (
    ATTENTION,
    BUILDER,
    HostTime,
    measure_host_time,
)
from swa_vllm.tools.common import plots
from swa_vllm.tools.common.arguments import check_number_arguments
from swa_vllm.tools.common.arms import Arm
from swa_vllm.tools.common.progress import say
from swa_vllm.tools.common.spread import Spread
from swa_vllm.tools.common.timing import at_least_two_rounds, time_in_turns
from swa_vllm.tools.engines.batches import BLOCK_SIZE, make_batch, make_window_batch
from swa_vllm.tools.engines.layer import Layer, make_layer
from swa_vllm.tools.engines.scheduler import Simulation
from swa_vllm.tools.engines.simulated import Engine

_SCHEDULER = {c: f"scheduler and manager, prefix caching {'on' if c else 'off'}" for c in (0, 1)}
_MILLION = 1_000_000
_CHUNK = 8192  # tokens of a prefill step
_SHAPE = "Qwen3-0.6B"
_GPU_SHAPE, _NUM_LAYERS = "Qwen3-8B", 36
_GPU_HEADER = ("", "batch", "stock us", "here us", "ratio", "launches, stock", "here")
_HEADER = ("", "context", "stock us", "here us", "ratio", "stock, middle half", "here")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print a row for each part of a step and each length; returns the figures."""
    check_number_arguments(args, ("window", "batch"))
    rounds = at_least_two_rounds(args.rounds)
    contexts = (2000, 8000) if args.quick else (2000, 8000, 32000, _MILLION)
    cases = []
    for context in contexts:
        for caching in _caching_modes(context):
            say(f"scheduler, context {context}")
            name = _SCHEDULER[caching]
            steps = {
                arm.value: _decoding_simulation(arm, args, context, caching, rounds).step
                for arm in (Arm.STOCK, Arm.SWA)
            }
            cases.append(_time_overhead(name, context, steps, rounds))
    pages_each = args.window // BLOCK_SIZE + 2
    layer = make_layer(_SHAPE, args.window, 1024, args.batch * pages_each + 64)
    cases += [
        _time_overhead(BUILDER, context, _overhead_builder_steps(layer, args, context), rounds)
        for context in contexts
    ]
    cases += [
        _sum_overhead(cases, context, caching)
        for context in contexts
        for caching in _caching_modes(context)
    ]
    cases += [
        _time_overhead(ATTENTION, context, _overhead_attention_steps(layer, args, context), rounds)
        for context in contexts
    ]
    print(
        f"\n{args.batch} decoding requests, W={args.window}, page {BLOCK_SIZE}; layer of {_SHAPE}, "
        f"{str(layer.attention.kv_cache.dtype).removeprefix('torch.')}"
    )
    print(format_table(_HEADER, map(_overhead_row, cases)))
    say("host time of Triton kernels, which are compiled first")
    on_gpus = _overhead_figures(measure_host_time(_GPU_SHAPE, args.window, rounds))
    print(
        "\nHost time of Triton kernels (stock: TRITON_ATTN), on this processor and without the "
        f"launches; W={args.window}, layer of {_GPU_SHAPE}.\nA step builds metadata once, and "
        f"attends in each of {_NUM_LAYERS} layers. Ratios are here / stock"
    )
    print(format_table(_GPU_HEADER, map(_host_time_row, on_gpus)))
    return {
        "window": args.window,
        "batch": args.batch,
        "rounds": rounds,
        "cases": cases,
        "on_gpus": on_gpus,
    }


def plot(path: Path, figures: Mapping[str, Any]) -> None:
    """Draw the parts of a step by context length."""
    series: dict[str, list[tuple[float, float]]] = {}
    for case in figures["cases"]:
        if case["name"] in (_SCHEDULER[0], BUILDER, ATTENTION):
            for arm, key in ((Arm.STOCK, "stock_us"), (Arm.SWA, "here_us")):
                points = series.setdefault(f"{case['name'].partition(',')[0]}, {arm.value}", [])
                points.append((case["context"], case[key]))
    plots.draw_lines(path, series, "tokens of context", "us of a step", log_x=True, log_y=True)


def _caching_modes(context: int) -> tuple[bool, ...]:
    return (False,) if context == _MILLION else (False, True)  # hashing would take minutes


def _overhead_row(case: Mapping[str, Any]) -> list[object]:
    spread = case.get("spread", {})
    halves = [
        Spread(**spread[arm]).range_text(1e6, digits=0) if spread else None
        for arm in (Arm.STOCK, Arm.SWA)
    ]
    return [case[key] for key in ("name", "context", "stock_us", "here_us", "ratio")] + halves


def _overhead_figures(times: Sequence[HostTime]) -> list[dict[str, Any]]:
    """List each part for each batch, and behind them what all layers of a step take together."""
    cases: list[dict[str, Any]] = [
        {
            "name": time.part,
            "batch": time.batch,
            "stock_us": 1e6 * time.times[Arm.STOCK.value].median,
            "here_us": 1e6 * time.times[Arm.SWA.value].median,
            "stock_launches": time.launches[Arm.STOCK.value],
            "here_launches": time.launches[Arm.SWA.value],
            "spread": {arm: spread.to_json() for arm, spread in time.times.items()},
        }
        for time in times
    ]
    for batch in dict.fromkeys(time.batch for time in times):
        parts = {case["name"]: case for case in cases if case["batch"] == batch}
        together = {
            key: parts[BUILDER][key] + _NUM_LAYERS * parts[ATTENTION][key]
            for key in ("stock_us", "here_us", "stock_launches", "here_launches")
        }
        cases.append({"name": f"step of {_NUM_LAYERS} layers", "batch": batch, **together})
    return [{**case, "ratio": case["here_us"] / case["stock_us"]} for case in cases]


def _host_time_row(case: Mapping[str, Any]) -> list[object]:
    return [
        case["name"],
        case["batch"],
        f"{case['stock_us']:.1f}",
        f"{case['here_us']:.1f}",
        case["ratio"],
        case["stock_launches"],
        case["here_launches"],
    ]


def _decoding_simulation(
    arm: Arm, args: argparse.Namespace, context: int, caching: bool, rounds: int
) -> Simulation:
    """Step a scheduler until all its requests decode at ``context``."""
    # The first request has to run on until the last one's prompt is computed.
    num_output = rounds + 100 + args.batch * (context // _CHUNK + 1)
    longest = context + num_output
    num_pages = args.batch * (longest // BLOCK_SIZE + 2)
    simulation = Simulation(
        arm,
        Engine(args.window, BLOCK_SIZE, num_pages, _CHUNK, longest, prefix_caching=caching),
        count_pages=False,
    )
    for index in range(args.batch):
        simulation.add(str(index), range(index, index + context), num_output)
    while not simulation.all_decode:
        simulation.step()
    if len(simulation.scheduler.running) != args.batch:
        raise RuntimeError(f"{len(simulation.scheduler.running)} of {args.batch} requests decode")
    return simulation


def _overhead_builder_steps(layer: Layer, args: argparse.Namespace, context: int) -> dict[str, Any]:
    batch = make_batch([context] * args.batch, [1] * args.batch)
    return {
        Arm.STOCK.value: lambda: layer.stock_builder.build(0, batch),
        Arm.SWA.value: lambda: layer.builder.build(0, batch),
    }


def _overhead_attention_steps(
    layer: Layer, args: argparse.Namespace, context: int
) -> dict[str, Any]:
    """Prepare storing and attending to a token of each request, after comparing the outputs.

    Raises:
        RuntimeError: the outputs differ.
    """
    batch = make_window_batch(context, args.batch, args.window)
    qkv = layer.random_inputs(args.batch)
    torch.nn.init.normal_(layer.attention.kv_cache)
    stock, here = layer.stock_builder.build(0, batch), layer.builder.build(0, batch)
    expected, got = layer.run_stock(stock, *qkv), layer.run(here, *qkv)
    if not torch.equal(expected, got):
        raise RuntimeError(f"outputs differ by {float((expected - got).abs().max())}")
    return {
        Arm.STOCK.value: lambda: layer.run_stock(stock, *qkv),
        Arm.SWA.value: lambda: layer.run(here, *qkv),
    }


def _time_overhead(name: str, context: int, steps: dict[str, Any], rounds: int) -> dict[str, Any]:
    times = time_in_turns(steps, rounds)
    stock, here = times[Arm.STOCK.value], times[Arm.SWA.value]
    return {
        "name": name,
        "context": context,
        "stock_us": round(1e6 * stock.median),
        "here_us": round(1e6 * here.median),
        "ratio": here.median / stock.median,
        "spread": {arm: t.to_json() for arm, t in times.items()},
    }


def _sum_overhead(cases: list[dict[str, Any]], context: int, caching: bool) -> dict[str, Any]:
    """Add up scheduler, manager and builder of a step."""
    parts = [
        c for c in cases if c["context"] == context and c["name"] in (BUILDER, _SCHEDULER[caching])
    ]
    stock, here = (sum(part[key] for part in parts) for key in ("stock_us", "here_us"))
    name = f"together, prefix caching {'on' if caching else 'off'}"
    ratio = here / stock
    return {"name": name, "context": context, "stock_us": stock, "here_us": here, "ratio": ratio}
