"""Time of decoding and prefill in one sliding layer with sink tokens, beside the plain window."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from swa_backend.table import format_table
from swa_vllm.tools.common import plots
from swa_vllm.tools.common.arguments import check_number_arguments
from swa_vllm.tools.common.progress import say
from swa_vllm.tools.common.spread import Spread
from swa_vllm.tools.common.timing import at_least_two_rounds, time_in_turns
from swa_vllm.tools.engines.batches import BLOCK_SIZE, make_batch
from swa_vllm.tools.engines.layer import Layer, make_layer

_HEADER = ("", "plain ms", "sinks ms", "attention ratio", "layer ratio")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print a row for each batch; returns the figures."""
    check_number_arguments(args, ("window", "sink_tokens"))
    rounds = at_least_two_rounds(args.rounds)
    shape = args.shape or ("Qwen3-0.6B" if args.quick else "Qwen3-8B")
    batches = _sink_batches(args)
    longest = max(
        sum(c) + sum(q) + len(c) * (BLOCK_SIZE + args.sink_tokens) for c, q in batches.values()
    )
    say(f"starting a {shape} layer")
    options = {"sink_tokens": args.sink_tokens, "position_shift": args.shift}
    layer = make_layer(shape, args.window, 8 * args.window, longest // BLOCK_SIZE + 2, options)
    # The rest of the layer does not know of context.
    rest = {n: layer.time_rest(n, rounds) for n in {sum(q) for _, q in batches.values()}}
    cases = []
    for name, (contexts, queries) in batches.items():
        say(name)
        plain, sinks = _time_sinks(layer, args, contexts, queries, rounds)
        others = rest[sum(queries)]
        cases.append(
            {
                "name": name,
                "plain_ms": 1e3 * plain.median,
                "sinks_ms": 1e3 * sinks.median,
                "seconds": {"plain": plain.to_json(), "sinks": sinks.to_json()},
                "attention_ratio": sinks.median / plain.median,
                "layer_ratio": (others + sinks.median) / (others + plain.median),
            }
        )
    dtype = str(layer.attention.kv_cache.dtype).removeprefix("torch.")
    how = "shifted sinks" if args.shift else "sinks"
    print(
        f"\n{shape}, W={args.window}, {args.sink_tokens} {how}, {dtype}, "
        f"{torch.get_num_threads()} threads, page {BLOCK_SIZE}"
    )
    print(format_table(_HEADER, map(_sink_row, cases)))
    return {"shape": shape, "window": args.window, "dtype": dtype, **options, "cases": cases}


def _sink_batches(args: argparse.Namespace) -> dict[str, tuple[list[int], list[int]]]:
    """Name the batches to time: tokens before each request's queries, and its queries."""
    context = 2 * args.window + args.sink_tokens
    batches = {
        "decode, 1 request": ([context], [1]),
        "decode, 8 requests": ([context] * 8, [1] * 8),
        "prefill, first chunk": ([0], [2 * args.window]),
        "prefill, a later chunk": ([context], [2 * args.window]),
    }
    if not args.quick:
        batches["decode, 32 requests"] = ([context] * 32, [1] * 32)
    return batches


def _sink_row(case: Mapping[str, Any]) -> list[object]:
    times = [Spread(**case["seconds"][name]).text(1e3) for name in ("plain", "sinks")]
    return [case["name"], *times, case["attention_ratio"], case["layer_ratio"]]


def plot(path: Path, figures: Mapping[str, Any]) -> None:
    """Draw the time with sinks over that without, in attention and in the layer."""
    cases = figures["cases"]
    names = {"in attention": "attention_ratio", "in the layer": "layer_ratio"}
    series = {name: [case[key] for case in cases] for name, key in names.items()}
    plots.draw_bars(path, [case["name"] for case in cases], series, "time with sinks / without")


def _time_sinks(
    layer: Layer, args: argparse.Namespace, contexts: list[int], queries: list[int], rounds: int
) -> tuple[Spread, Spread]:
    qkv = layer.random_inputs(sum(queries))
    torch.nn.init.normal_(layer.attention.kv_cache)
    batch = make_batch(contexts, queries, spare_tokens=args.sink_tokens)
    plain, here = layer.stock_builder.build(0, batch), layer.builder.build(0, batch)
    output = layer.run(here, *qkv)
    if not args.shift:  # the tests of the engine hold shifted sinks against a dense model
        layer.check_against_torch(batch, qkv, output, args.window, args.sink_tokens)
    times = time_in_turns(
        {"plain": lambda: layer.run_stock(plain, *qkv), "sinks": lambda: layer.run(here, *qkv)},
        rounds,
    )
    return times["plain"], times["sinks"]
