"""The flags of ``swa tune``: what may be given, and what contradicts another."""

import argparse
import re
from pathlib import Path

from swa_backend.window import Phase
from swa_vllm.tools.common import plots
from swa_vllm.tools.common.arguments import (
    check_number_argument,
    check_number_arguments,
    check_output_path,
    is_flag_number,
)
from swa_vllm.tools.common.engine_arguments import add_engine_arguments
from swa_vllm.tools.tune.candidates import Objective
from swa_vllm.tools.tune.requests import FEWEST

_SECONDS = {"s": 1, "m": 60, "h": 3600}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``swa tune``."""
    parser.add_argument(
        "model", metavar="MODEL", help="a checkpoint: a directory, or a hub's name that is cached"
    )
    parser.add_argument(
        "--requests",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSONL, a request a line: {"prompt": "...", "answer": "..."}, or {"messages": [...]} '
        "in OpenAI's format whose last message is the assistant's, rendered by the checkpoint's "
        f"chat template; {FEWEST} conversations at least, and 100 or more for a narrow interval "
        "(default: none)",
    )
    limit = parser.add_mutually_exclusive_group(required=True)
    limit.add_argument(
        "--budget",
        type=float,
        metavar="PART",
        help="part of full attention's bytes a request (default: none, --kv-memory is given)",
    )
    limit.add_argument(
        "--kv-memory",
        metavar="SIZE",
        help='memory of one device for the KV cache, such as "16GiB" (default: none, --budget is '
        "given)",
    )
    parser.add_argument(
        "--objective",
        choices=[objective.value for objective in Objective],
        help="what to gain within the tolerance (default: loss, with --kv-memory throughput)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.02,
        help="greatest growth of held-out perplexity, upper end of the interval",
    )
    parser.add_argument("--time", default="30m", help="time to measure in, such as 90s, 30m, 2h")
    parser.add_argument(
        "--sink-tokens",
        default="0,4",
        metavar="TOKENS,...",
        help="first tokens of a text that sliding layers always see, numbers to try",
    )
    parser.add_argument(
        "--phase",
        default=Phase.BOTH.value,
        metavar="PHASE,...",
        help="whose tokens have the window, phases to try: both, decode (gains memory), prefill "
        "(gains time to the first token); with decode and prefill answers are decoded, which takes "
        "longer",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="which half of the requests chooses: another split shows how far it decides",
    )
    add_engine_arguments(
        parser, dtype="auto", max_num_batched_tokens=512, block_size="16, on CPUs 128"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="PATH",
        help="keep scores there, and go on where they end (default: none are kept)",
    )
    plots.add_plot_argument(parser)


def check_arguments(args: argparse.Namespace) -> float:
    """Refuse what cannot be meant; returns the seconds to measure in."""
    plots.check_plot_path(args.plot)
    check_number_arguments(args, ("max_num_batched_tokens", "block_size"))
    check_number_argument("seed", args.seed, least=0)
    if args.resume is not None:
        check_output_path("--resume", args.resume)
    if args.budget is not None and not 0 < args.budget < 1:
        raise ValueError(
            f"--budget is a part of full attention's bytes, between 0 and 1; got {args.budget}"
        )
    if not 0 <= args.tolerance < 1:
        raise ValueError(
            f"--tolerance is a growth of perplexity, from 0 on and below 1; got {args.tolerance}"
        )
    if not all(is_flag_number(part, 0) for part in args.sink_tokens.split(",")):
        raise ValueError(
            f"--sink-tokens {args.sink_tokens!r}: write numbers from 0 on and below 10**9, with "
            "commas between them"
        )
    found = re.fullmatch(r"(\d{1,6})([smh])", args.time)
    if found is None or not int(found[1]):
        raise ValueError(f"--time {args.time!r}: write a number and s, m or h, such as 30m")
    if args.objective is None:
        by_budget = args.budget is not None
        args.objective = (Objective.LOSS if by_budget else Objective.THROUGHPUT).value
    if args.objective == Objective.LOSS and args.budget is None:
        raise ValueError(
            "--objective loss without a budget is full attention: give --budget, or another "
            "--objective"
        )
    args.phase = _phases_to_try(args)
    return int(found[1]) * _SECONDS[found[2]]


def _phases_to_try(args: argparse.Namespace) -> list[Phase]:
    """Read the phases; one that cannot gain what is asked for is an error."""
    try:
        phases = sorted({Phase(part.strip()) for part in args.phase.split(",")})
    except ValueError:
        raise ValueError(
            f"--phase {args.phase!r}: write {', '.join(Phase)}, or several with commas between them"
        ) from None
    by_ttft = args.objective == Objective.TTFT
    if Phase.PREFILL in phases and (args.budget is not None or not by_ttft):
        limit = "--kv-memory" if args.budget is None else f"--budget {args.budget:g}"
        raise ValueError(
            f"--phase prefill with {limit} and --objective {args.objective}: it keeps every page "
            "and gains time to the first token alone; give --kv-memory and --objective ttft, or "
            "leave prefill out"
        )
    if Phase.DECODE in phases and by_ttft:
        raise ValueError(
            "--phase decode with --objective ttft: it computes prompts with full attention and "
            "gains memory alone; give --objective throughput or memory, or leave decode out"
        )
    return phases
