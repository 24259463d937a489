"""Pages over time: a map of what each request holds, from vLLM's real scheduler without a model.

Each prompt is a request; all are there at the start. Of the pages of a sliding layer some hold sink
tokens, some the window, and some, beyond both, a prefill chunk or steps in flight. All others were
freed, or never stored. With --phase decode the whole prompt stays, in the place of sinks. Full
attention holds every page: its line is what it would need for the same requests at the same time.
"""

import argparse
from typing import Any

from swa_backend.window import Phase
from swa_vllm.tools.common import plots
from swa_vllm.tools.common.arguments import (
    add_phase_argument,
    add_sink_tokens_argument,
    add_window_size_argument,
    check_number_argument,
    check_number_arguments,
    numbers_of_tokens,
)
from swa_vllm.tools.common.engine_arguments import add_engine_arguments
from swa_vllm.tools.trace.picture import plot_trace
from swa_vllm.tools.trace.recording import record_trace
from swa_vllm.tools.trace.text import print_trace

EXAMPLE = "--window 1024 --sink-tokens 4 --prompt 12000,3000,6000 --output 300 --plot pages.png"
_NUMBERS = {
    "window": 1024,
    "block_size": 16,
    "max_num_batched_tokens": 2048,
    "steps_in_flight": 2,
    "output": 256,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``swa trace``."""
    add_window_size_argument(parser, _NUMBERS["window"])
    add_sink_tokens_argument(parser, 0)
    add_engine_arguments(
        parser, **{name: _NUMBERS[name] for name in ("block_size", "max_num_batched_tokens")}
    )
    for name, text in (
        ("steps_in_flight", "steps scheduled ahead, 1 or 2"),
        ("output", "tokens of each answer"),
    ):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=_NUMBERS[name], metavar="N", help=text)
    parser.add_argument(
        "--pool-tokens",
        type=int,
        metavar="N",
        help="tokens of full attention that the pool holds (default: half of the requests)",
    )
    add_phase_argument(parser)
    parser.add_argument(
        "--prompt",
        default="12000,3000,6000,1000",
        metavar="TOKENS,...",
        help="length of each prompt",
    )
    plots.add_plot_argument(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the map of pages; returns the figures."""
    plots.check_plot_path(args.plot)
    check_number_arguments(args, _NUMBERS)
    check_number_argument("sink_tokens", args.sink_tokens, least=0)
    if args.pool_tokens is not None and args.pool_tokens < 2 * args.block_size:
        raise ValueError(
            f"--pool-tokens {args.pool_tokens} is less than two pages of --block-size "
            f"{args.block_size}; give more, or smaller pages"
        )
    if args.phase == Phase.PREFILL:
        raise ValueError(
            "--phase prefill frees no page, so there is nothing to map: a request holds all that "
            "full attention would; give decode, or leave --phase out"
        )
    prompts = numbers_of_tokens("--prompt", args.prompt)
    trace = record_trace(args, prompts)
    whose = " in the answer only" if args.phase == Phase.DECODE else ""
    title = (
        f"W={args.window}{whose}, {args.sink_tokens} sink tokens, pages of {args.block_size}, "
        f"chunks of {args.max_num_batched_tokens}, answers of {args.output}, "
        f"{args.steps_in_flight} step(s) in flight"
    )
    if args.pool_tokens is None:
        title += f", {trace.num_pages + 1} pages in the pool (--pool-tokens gives it others)"
    print_trace(title, trace)
    if args.plot is not None:
        plot_trace(args.plot, title, trace)
    return trace.to_json()
