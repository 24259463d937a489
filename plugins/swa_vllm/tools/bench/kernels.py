"""Attention kernels on a GPU, beside vLLM's own, FlashInfer's and xformers'; or what they do."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from swa_backend.kernels.plans import Target
from swa_backend.table import format_table
from swa_vllm.tools.bench.attention.arms import KERNEL_ARMS, OURS
from swa_vllm.tools.bench.attention.decode_work import decode_work
from swa_vllm.tools.bench.attention.prefill_work import prefill_work
from swa_vllm.tools.bench.attention.stock_kernel import compile_stock
from swa_vllm.tools.bench.attention.times import (
    HEAD_DIM,
    AttentionCase,
    Clock,
    Result,
    copy_bandwidth,
    judge_targets,
    make_kernel_batch,
    time_kernel_arms,
)
from swa_vllm.tools.common import plots
from swa_vllm.tools.common.progress import say

# KV heads, and query heads to each.
_SHAPES = {"Qwen3-8B": (8, 4), "Qwen3-0.6B": (8, 2)}
_H100 = Target("cuda", 90, num_processors=132)
_WINDOWS, _LENGTHS, _BATCHES = (512, 1024, 4096), (8192, 32768, 131072), (1, 8, 64)
# Of a prefill chunk, which is this long.
_CONTEXTS, _CHUNK = (0, 8192, 122880), 8192
_WORK_HEADER = (
    "W, length, batch",
    "MB seen",
    "read here",
    "stock",
    "programs here",
    "stock, useful of",
)
_FACTS = ("registers", "spilled_bytes", "shared_bytes", "kv_buffers", "load_bytes")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print times, or without a GPU the work of kernels; returns the figures."""
    num_kv_heads, group = _SHAPES[args.shape]
    sizes = product(
        (1024,) if args.quick else _WINDOWS,
        (8192, 131072) if args.quick else _LENGTHS,
        (1, 64) if args.quick else _BATCHES,
    )
    cases = [
        AttentionCase(*size, torch.bfloat16, num_kv_heads=num_kv_heads, group=group)
        for size in sizes
    ]
    if torch.cuda.is_available():
        windows = sorted({case.window for case in cases})
        chunks = [
            replace(cases[0], window=window, seq_len=context + _CHUNK, batch=1, num_queries=_CHUNK)
            for window, context in product(windows, _CONTEXTS)
        ]
        from swa_backend.verify.timing import median_us

        return benchmark_kernels(args.shape, [*cases, *chunks], torch.device("cuda"), median_us)
    print(
        "No GPU here: nothing is timed. What a launch on an H100 does, and what compiles to what:"
    )
    return {
        "device": None,
        "shape": args.shape,
        "work": _print_decode_work(cases),
        "prefill": _print_prefill_work(
            sorted({case.window for case in cases}), num_kv_heads, group
        ),
        "compiled": _print_compiled_kernels(args.shape, cases[0]),
    }


def plot(path: Path, figures: Mapping[str, Any]) -> None:
    """Draw the times of every case, or without a GPU the keys that a chunk loads."""
    if figures["device"] is None:
        cases = figures["prefill"]
        groups = [f"W={c['window']}, {c['context']} tokens before" for c in cases]
        keys = {"this plugin": "here_num_keys", "vLLM's kernel": "stock_num_keys"}
        series = {name: [float(c[key]) for c in cases] for name, key in keys.items()}
        plots.draw_bars(path, groups, series, "keys loaded for a chunk and a KV head")
        return
    cases = figures["cases"]
    groups = [f"W={c['window']}, {c['seq_len']}, {c['batch']} x {c['num_queries']}" for c in cases]
    arms = dict.fromkeys(arm for c in cases for arm in c["us"])
    series = {arm: [c["us"].get(arm, 0.0) for c in cases] for arm in arms}
    plots.draw_bars(path, groups, series, "us")


def _print_decode_work(cases: list[AttentionCase]) -> list[dict[str, Any]]:
    figures, rows = [], []
    for case in cases:
        work = decode_work(_H100, case)
        figures.append(work)
        rows.append(
            (
                f"{case.window}, {case.seq_len}, {case.batch}",
                case.num_bytes / 1e6,
                f"{work['here_read']:.3f}",
                f"{work['stock_read']:.3f}",
                f"{work['here_programs']} of {work['here_programs']}",
                f"{work['stock_useful']} of {work['stock_programs']}",
            )
        )
    print("\n" + format_table(_WORK_HEADER, rows))
    print("read: keys read, as a multiple of those seen, at the worst of 32 lengths")
    return figures


def _print_prefill_work(windows: list[int], num_kv_heads: int, group: int) -> list[dict[str, Any]]:
    figures, rows = [], []
    for window, context in product(windows, (0, 8192)):
        work = prefill_work(_H100, window, context, num_queries=8192, group=group)
        figures.append(
            {"window": window, "context": context}
            | {f"{name}_{key}": x for name, w in work.items() for key, x in vars(w).items()}
        )
        per_key = num_kv_heads * 2 * HEAD_DIM * torch.bfloat16.itemsize
        here, stock = work["here"], work["stock"]
        rows.append(
            (
                f"{window}, {context}",
                *(f"{w.num_keys * per_key / 1e9:.2f}" for w in (here, stock)),
                f"1/{stock.num_keys / here.num_keys:.1f}",
                *(f"{w.tile_work:.3f}" for w in (here, stock)),
            )
        )
    header = ("W, tokens before a chunk of 8192", "GB loaded here", "stock", "", "work", "stock")
    print("\n" + format_table(header, rows))
    print("work: products in tiles, as a multiple of those that a query sees")
    return figures


def _print_compiled_kernels(shape: str, case: AttentionCase) -> dict[str, Any]:
    from swa_backend.verify import gate

    here = gate.Case("decode", shape, torch.bfloat16, _H100).compile()
    stock = compile_stock(replace(case, window=1024, seq_len=2048, batch=1), _H100)
    names = (*_FACTS, "programs_per_processor")
    rows = [(name.replace("_", " "), getattr(here, name), getattr(stock, name)) for name in names]
    print("\n" + format_table(("sm_90, bfloat16, W=1024", "here", "vLLM's split kernel"), rows))
    return {"here": vars(here), "stock": vars(stock)}


def benchmark_kernels(
    shape: str,
    cases: list[AttentionCase],
    device: torch.device,
    clock: Clock,
    num_bytes: int = 512 << 20,
) -> dict[str, Any]:
    """Time every case with a cache of its dtype and with an fp8 cache, and print the result.

    Args:
        num_bytes: bytes of the keys that are cycled through, and of what is copied.
    """
    copied = copy_bandwidth(device, clock, num_bytes)
    results = []
    for case, is_fp8 in product(cases, (False, True)):
        typed = replace(case, kv_dtype=torch.float8_e4m3fn if is_fp8 else case.dtype)
        say(str(typed))
        results.append(
            time_kernel_arms(typed, make_kernel_batch(typed, device, num_bytes), KERNEL_ARMS, clock)
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return report_kernels_benchmark(shape, name, results, copied)


def report_kernels_benchmark(
    shape: str, device: str, results: list[Result], copied: float
) -> dict[str, Any]:
    """Print times and targets; returns them as figures."""
    print(f"\n{shape} on {device}, copy {copied:.0f} GB/s")
    _print_kernel_times("decodes", results, "of copy", lambda r: r.bandwidth(OURS) / copied)
    _print_kernel_times("chunks", results, "TFLOP/s", lambda r: r.speed(OURS))
    for reason in sorted({f"{k}: {v}" for result in results for k, v in result.refused.items()}):
        print(f"not timed: {reason}")
    reached = judge_targets(results, copied)
    words = {True: "met", False: "MISSED", None: "not measured"}
    print(
        "\n"
        + format_table(
            ("target", "worst", ""), [(t["target"], t["worst"], words[t["met"]]) for t in reached]
        )
    )
    return {
        "device": device,
        "shape": shape,
        "copy_gb_per_s": copied,
        "cases": [
            {
                **{k: str(v) if "dtype" in k else v for k, v in vars(result.case).items()},
                "num_bytes": result.case.num_bytes,
                "us": result.times,
                "gb_per_s": {name: result.bandwidth(name) for name in result.times},
                "not_timed": result.refused,
            }
            for result in results
        ],
        "targets": reached,
    }


def _print_kernel_times(
    kind: str, results: list[Result], unit: str, share: Callable[[Result], float]
) -> None:
    rows = []
    for result in results:
        case = result.case
        if (case.num_queries > 1) != (kind == "chunks"):
            continue
        size = case.num_queries if kind == "chunks" else case.batch
        name = str(case.kv_dtype).removeprefix("torch.")
        times = (result.times.get(arm) for arm in KERNEL_ARMS)
        rows.append((f"{case.window}, {case.seq_len}, {size}, {name}", *times, share(result)))
    if rows:
        header = (f"W, length, {kind}, cache", *(f"{arm} us" for arm in KERNEL_ARMS), unit)
        print("\n" + format_table(header, rows))
