"""A workload served by this plugin, stock vLLM, full attention and Hugging Face, in turns."""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swa_backend.pages import ceil_div, max_partial_tokens
from swa_backend.table import format_table
from swa_backend.window import Phase
from swa_vllm.tools.bench.serving.arms import (
    HERE_BY_PHASE,
    SERVING_ARMS,
    serving_arms_of,
)
from swa_vllm.tools.bench.serving.checkpoints import prepare_checkpoints
from swa_vllm.tools.bench.serving.launcher import Launcher
from swa_vllm.tools.bench.serving.rounds import Rounds, measure_rounds
from swa_vllm.tools.bench.serving.workload import MIXES, Ask, read_trace
from swa_vllm.tools.common import plots
from swa_vllm.tools.common.arguments import (
    check_number_argument,
    check_number_arguments,
)
from swa_vllm.tools.common.arms import Arm
from swa_vllm.tools.common.sizing import Limits, kv_groups_of
from swa_vllm.tools.common.spread import Spread

_ROWS = {
    "output": "tokens/s",
    "prefill": "tokens/s, steps with prefill",
    "decode": "tokens/s, other steps",
    "ttft_p50_ms": "TTFT p50, ms",
    "ttft_p99_ms": "TTFT p99, ms",
    "tpot_p50_ms": "TPOT p50, ms",
    "tpot_p99_ms": "TPOT p99, ms",
    "running": "requests running, mean",
    "peak_running": "most",
    "peak_pages": "pages held, most",
    "preemptions": "preemptions",
    "seconds": "seconds",
}
_IN_PHASE = {
    Phase.BOTH: "",
    Phase.PREFILL: " (here in the prompt only)",
    Phase.DECODE: " (here in generated tokens only)",
}
_MORE_IS_BETTER = ("output", "prefill", "decode")
_JUDGED = tuple(_ROWS)[:7]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print a column for each arm, and where this plugin loses; returns the figures."""
    arms, once = serving_arms_of("--peers", args.peers), serving_arms_of("--once", args.once)
    if "here" not in arms or "here" in once:
        raise ValueError(
            f"--peers {args.peers} --once {args.once}: here, this plugin, is compared with the "
            "others in every round; name it in --peers and not in --once"
        )
    arms["here"] = HERE_BY_PHASE[Phase(args.phase)]
    asks = _requests_to_serve(args)
    longest = max(ask.num_tokens for ask in asks)
    what, slid = "request", longest
    if args.phase == Phase.DECODE:
        what, slid = "answer", max(ask.output_tokens for ask in asks)
    if args.window >= slid:
        raise ValueError(
            f"--window {args.window} is not below the longest {what}, {slid} tokens: nothing "
            "would slide; give a smaller one"
        )
    num_pages = _benchmark_pool_pages(args, asks)
    limits = Limits(
        args.block_size,
        longest,
        args.max_num_batched_tokens,
        min(256, args.max_num_batched_tokens),
        1,
    )
    (stock,) = kv_groups_of(Arm.STOCK, (args.window,), 0, limits)
    charged = stock.policy.cap or 0
    if "stock" in arms and charged > num_pages:
        raise ValueError(
            f"--pool-requests {args.pool_requests} is a pool of {num_pages} pages, and stock vLLM "
            f"charges its longest request {charged}; give more, or leave stock out of --peers"
        )
    spare = max_partial_tokens(args.block_size) if args.phase == Phase.DECODE else 0
    if (least := ceil_div(longest + spare, args.block_size)) > num_pages:
        raise ValueError(
            f"--pool-requests {args.pool_requests} is a pool of {num_pages} pages, and with "
            f"--phase {args.phase} vLLM does not start with fewer than {least}; give more"
        )
    with tempfile.TemporaryDirectory() as directory:
        launcher = Launcher(
            prepare_checkpoints(args.model, Path(directory), args.window, longest, args.seed),
            args.dtype,
            args.threads,
            {
                "block_size": limits.block_size,
                "num_gpu_blocks_override": num_pages + 1,  # vLLM keeps one for itself
                "max_model_len": limits.max_model_len,
                "max_num_batched_tokens": limits.max_num_batched_tokens,
                "max_num_seqs": limits.max_num_seqs,
            },
            args.hf_batch,
        )
        rounds = Rounds(asks, args.window, args.rounds, frozenset(once), args.seed)
        figures = {
            **_serving_settings(args, asks, num_pages),
            **measure_rounds(launcher, arms, rounds),
        }
    figures["lost"] = serve_benchmark_losses(figures)
    _print_served_arms(figures)
    return figures


def plot(path: Path, figures: Mapping[str, Any]) -> None:
    """Draw the tokens answered over time, a line for each arm."""
    series = {name: arm["curve"] for name, arm in figures["peers"].items()}
    plots.draw_lines(path, series, "seconds of work", "tokens answered", marks=False)


def _requests_to_serve(args: argparse.Namespace) -> list[Ask]:
    names = (
        "window",
        "num_requests",
        "rounds",
        "hf_batch",
        "block_size",
        "threads",
        "max_num_batched_tokens",
    )
    check_number_arguments(args, names)
    check_number_argument("pool_requests", args.pool_requests, least=0)
    if args.trace is not None:
        return read_trace(args.trace)
    asks = MIXES[args.mix](args.num_requests, args.seed)
    if not args.quick:
        return asks
    # Shorter by a factor of eight, but longer than the window.
    least = args.window // 2 + 8
    return [
        Ask(a.arrival, max(least, a.prompt_tokens // 8), max(least, a.output_tokens // 8))
        for a in asks[:6]
    ]


def _benchmark_pool_pages(args: argparse.Namespace, asks: Sequence[Ask]) -> int:
    pages = sorted(ceil_div(ask.num_tokens, args.block_size) for ask in asks)
    return args.pool_requests * pages[-1] or sum(pages)


def _serving_settings(
    args: argparse.Namespace, asks: Sequence[Ask], num_pages: int
) -> dict[str, Any]:
    return {
        "model": str(args.model or "random weights"),
        "window": args.window,
        "phase": args.phase,
        "dtype": args.dtype,
        "workload": args.trace.name if args.trace else args.mix,
        "num_requests": len(asks),
        "prompt_tokens": sum(ask.prompt_tokens for ask in asks),
        "output_tokens": sum(ask.output_tokens for ask in asks),
        "pool_pages": num_pages,
        "block_size": args.block_size,
        "chunk": args.max_num_batched_tokens,
        "rounds": args.rounds,
    }


def _print_served_arms(figures: Mapping[str, Any]) -> None:
    by_name = figures["peers"]
    rows = [
        [label, *(arm[key]["median"] for arm in by_name.values())] for key, label in _ROWS.items()
    ]
    rows.append(["seconds, least to most", *map(_benchmark_seconds, by_name.values())])
    rows.append(["times as fast as it, here", *(figures["ratios"][name] for name in by_name)])
    window = f"W={figures['window']}"
    window += _IN_PHASE[figures["phase"]]
    print(
        f"\n{figures['workload']}: {figures['num_requests']} requests, "
        f"{figures['prompt_tokens']} + {figures['output_tokens']} tokens, {window}, "
        f"{figures['dtype']}, {figures['model']}\npool of {figures['pool_pages']} pages of "
        f"{figures['block_size']}, chunk {figures['chunk']}, {figures['rounds']} round(s)"
    )
    print(format_table(("", *by_name), rows))
    limit = figures["bound"]
    print(
        f"bound: {limit['seconds']:.1f} s with {limit['concurrency']} at once, "
        f"{100 * limit['reached']:.0f} % reached; steps of "
        + ", ".join(f"{n}: {1e3 * s:.1f} ms" for n, s in limit["step_s"].items())
    )
    for loss in figures["lost"]:
        print(f"lost: {loss}")


def _benchmark_seconds(arm: Mapping[str, Any]) -> str:
    return Spread(**arm["seconds"]).range_text(digits=1)


def serve_benchmark_losses(figures: Mapping[str, Any]) -> list[str]:
    """List the figures in which another arm is better than this plugin by more than 2 %."""
    here = figures["peers"][SERVING_ARMS["here"].name]
    found = []
    for name, arm in figures["peers"].items():
        for key in _JUDGED:
            ours, theirs = here[key]["median"], arm[key]["median"]
            if key in _MORE_IS_BETTER:
                ours, theirs = theirs, ours
            if ours > 1.02 * theirs:
                found.append(f"{_ROWS[key]}, {name} is {ours / theirs:.2f} times better")
    return found
