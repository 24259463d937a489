"""Time of a prefill chunk in one sliding layer that stores survivors only, beside stock vLLM's."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from swa_backend.pages import WindowPages, ceil_div
from swa_backend.table import format_table
from swa_backend.window import Phase
from swa_vllm.tools.common import plots
from swa_vllm.tools.common.arguments import (
    check_number_arguments,
    refuse_phase_decode,
)
from swa_vllm.tools.common.progress import say
from swa_vllm.tools.common.spread import Spread
from swa_vllm.tools.common.timing import at_least_two_rounds, time_in_turns
from swa_vllm.tools.engines.batches import BLOCK_SIZE, make_batch
from swa_vllm.tools.engines.layer import Layer, make_layer

_HEADER = ("context + chunk", "stock ms", "here ms", "attention ratio", "layer ratio")
_STEP_ROUNDS = 10  # of a decoding step, which is short, for one of a chunk
_PHASE_HEADER = ("context + tokens", "full attention ms", "here ms", "ratio")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print a row for each context length; returns the figures."""
    refuse_phase_decode(
        args,
        "leaves a prompt full attention, which is all that is timed here",
        "leave --phase out",
    )
    check_number_arguments(args, ("window", "max_num_batched_tokens", "prompt"))
    chunk = args.max_num_batched_tokens or (1024 if args.quick else 2048)
    rounds = at_least_two_rounds(args.rounds)
    shape = args.shape or ("Qwen3-0.6B" if args.quick else "Qwen3-8B")
    if args.phase == Phase.PREFILL:
        return _run_prompt(args, shape, chunk, rounds)
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


def _run_prompt(args: argparse.Namespace, shape: str, chunk: int, rounds: int) -> dict[str, Any]:
    """Time a prompt whose tokens alone have the window, and a decoding step, by full attention's.

    Raises:
        RuntimeError: the prompt's output is not that of stock vLLM's window, or the step's not that
            of full attention.
    """
    prompt = args.prompt
    say(f"starting a {shape} layer")
    num_pages = ceil_div(prompt + 1, BLOCK_SIZE)
    longest = num_pages * BLOCK_SIZE
    layer = make_layer(shape, args.window, longest, num_pages + 2, {"phase": args.phase})
    torch.nn.init.normal_(layer.attention.kv_cache)
    cases = []
    for context in [*range(0, prompt, chunk), prompt]:
        num_tokens = min(chunk, prompt - context) or 1
        say(f"context {context}")
        same = layer if context < prompt else layer.beside_full_attention()
        cases.append(_time_beside_full_attention(layer, same, context, num_tokens, args, rounds))
    *chunks, decode = cases
    full, here = (sum(case[key] for case in chunks) for key in ("full_ms", "here_ms"))
    figures = {
        "shape": shape,
        "window": args.window,
        "phase": args.phase,
        "prompt": prompt,
        "chunk": chunk,
        "dtype": str(layer.attention.kv_cache.dtype).removeprefix("torch."),
        "cases": cases,
        "prefill_ratio": here / full,
        "prefill_ratio_3_of_4_layers": (full + 3 * here) / (4 * full),
        "decode_ratio": decode["attention_ratio"],
    }
    _print_prompt(figures)
    return figures


def _time_beside_full_attention(
    layer: Layer, same: Layer, context: int, num_tokens: int, args: argparse.Namespace, rounds: int
) -> dict[str, Any]:
    """Time ``num_tokens`` behind ``context`` tokens; ``same`` is beside an arm of equal output."""
    qkv, beside = layer.random_inputs(num_tokens), layer.beside_full_attention()
    batch = make_batch([context], [num_tokens], prompts=[args.prompt])
    here = layer.builder.build(0, batch)
    expected = same.run_stock(same.stock_builder.build(0, batch), *qkv)
    if not torch.equal(expected, layer.run(here, *qkv)):
        raise RuntimeError(f"outputs differ behind {context} tokens")
    full = beside.stock_builder.build(0, batch)
    times = time_in_turns(
        {"full": lambda: beside.run_stock(full, *qkv), "here": lambda: layer.run(here, *qkv)},
        rounds if num_tokens > 1 else _STEP_ROUNDS * rounds,
        num_warm_up=0,  # comparing the outputs was one
    )
    return {
        "context": context,
        "tokens": num_tokens,
        **{f"{name}_ms": 1e3 * spread.median for name, spread in times.items()},
        "seconds": {name: spread.to_json() for name, spread in times.items()},
        "attention_ratio": times["here"].median / times["full"].median,
    }


def _print_prompt(figures: Mapping[str, Any]) -> None:
    rows = [
        (
            f"{case['context']} + {case['tokens']}",
            f"{case['full_ms']:.2f}",
            f"{case['here_ms']:.2f}",
            case["attention_ratio"],
        )
        for case in figures["cases"]
    ]
    print(
        f"\n{figures['shape']}, W={figures['window']} in a prompt of {figures['prompt']} tokens, "
        f"{figures['dtype']}, {torch.get_num_threads()} threads, page {BLOCK_SIZE}"
    )
    print(format_table(_PHASE_HEADER, rows))
    print(
        f"prefill: {figures['prefill_ratio']:.3f} of full attention's time in a layer, "
        f"{figures['prefill_ratio_3_of_4_layers']:.3f} in 3 of 4 layers; "
        f"a decoding step: {figures['decode_ratio']:.3f}"
    )


def plot(path: Path, figures: Mapping[str, Any]) -> None:
    """Draw the time of attention to a chunk, with as many tokens before it."""
    cases, chunk = figures["cases"], figures["chunk"]
    names = {"stock vLLM": "stock_ms", "full attention": "full_ms", "this plugin": "here_ms"}
    series = {name: [case[key] for case in cases] for name, key in names.items() if key in cases[0]}
    groups = [f"{case['context']} + {case.get('tokens', chunk)}" for case in cases]
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
