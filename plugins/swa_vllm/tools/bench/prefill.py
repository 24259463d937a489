"""Time of a prefill chunk in one sliding layer that stores survivors only, beside stock vLLM's.

Stock vLLM stores every page of the chunk. The layer has a real model's shapes and random weights.
Both must give the same output before anything is timed. "Attention" is storing keys and values and
attending to them; "layer" adds the layer's projections and MLP, which are the same for both.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from swa_backend.pages import WindowPages
from swa_backend.table import format_table
from swa_vllm.tools.common import plots
from swa_vllm.tools.common.arguments import check_number_arguments
from swa_vllm.tools.common.progress import say
from swa_vllm.tools.common.spread import Spread
from swa_vllm.tools.common.timing import at_least_two_rounds, time_in_turns
from swa_vllm.tools.engines.batches import BLOCK_SIZE, make_batch
from swa_vllm.tools.engines.layer import SHAPES, Layer, make_layer

EXAMPLE = "--shape Qwen3-8B --window 1024 --chunk 2048"
_HEADER = ("context + chunk", "stock ms", "here ms", "attention ratio", "layer ratio")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``swa bench prefill``."""
    parser.add_argument("--shape", choices=tuple(SHAPES), help="default: Qwen3-8B")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--chunk", type=int, help="tokens of the prefill chunk (default: 2048)")
    parser.add_argument("--rounds", type=int, default=5)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print a row for each context length; returns the figures."""
    check_number_arguments(args, ("window", "chunk"))
    chunk = args.chunk or (1024 if args.quick else 2048)
    rounds = at_least_two_rounds(args.rounds)
    shape = args.shape or ("Qwen3-0.6B" if args.quick else "Qwen3-8B")
    longest = 4 * chunk
    say(f"starting a {shape} layer")
    layer = make_layer(shape, args.window, longest, longest // BLOCK_SIZE + 2)
    pages = WindowPages(args.window, BLOCK_SIZE)
    rest = layer.time_rest(chunk, rounds)
    rows, cases = [], []
    for context in (0, chunk + 7, 3 * chunk - 16):
        say(f"context {context}")
        stock, here = _time_prefill_chunk(layer, pages, context, chunk, rounds)
        ratio = here.median / stock.median
        layer_ratio = (rest + here.median) / (rest + stock.median)
        times = (stock.text(1e3), here.text(1e3))
        rows.append((f"{context} + {chunk}", *times, ratio, layer_ratio))
        cases.append(
            {
                "context": context,
                "stock_ms": 1e3 * stock.median,
                "here_ms": 1e3 * here.median,
                "seconds": {"stock": stock.to_json(), "here": here.to_json()},
                "attention_ratio": ratio,
                "layer_ratio": layer_ratio,
            }
        )
    dtype = str(layer.attention.kv_cache.dtype).removeprefix("torch.")
    print(f"\n{shape}, W={args.window}, {dtype}, {torch.get_num_threads()} threads, page 32")
    print(format_table(_HEADER, rows))
    return {"shape": shape, "window": args.window, "chunk": chunk, "dtype": dtype, "cases": cases}


def plot(path: Path, figures: Mapping[str, Any]) -> None:
    """Draw the time of attention to a chunk, with as many tokens before it."""
    cases, chunk = figures["cases"], figures["chunk"]
    names = {"stock vLLM": "stock_ms", "this plugin": "here_ms"}
    series = {name: [case[key] for case in cases] for name, key in names.items()}
    groups = [f"{case['context']} + {chunk}" for case in cases]
    plots.draw_bars(path, groups, series, "ms of attention to a chunk")


def _time_prefill_chunk(
    layer: Layer, pages: WindowPages, context: int, chunk: int, rounds: int
) -> tuple[Spread, Spread]:
    qkv = layer.random_inputs(chunk)
    torch.nn.init.normal_(layer.attention.kv_cache)
    stock = layer.stock_builder.build(0, make_batch([context], [chunk]))
    here = layer.builder.build(0, make_batch([context], [chunk], pages))
    expected, got = layer.run_stock(stock, *qkv), layer.run(here, *qkv)
    if not torch.equal(expected, got):
        raise RuntimeError(f"outputs differ by {float((expected - got).abs().max())}")
    times = time_in_turns(
        {"stock": lambda: layer.run_stock(stock, *qkv), "here": lambda: layer.run(here, *qkv)},
        rounds,
    )
    return times["stock"], times["here"]
