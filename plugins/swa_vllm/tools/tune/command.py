"""The best window for your traffic: measured on a part of it, and reported by the rest.

Half of the conversations choose, the other half report. Windows, sinks and full layers within the
budget are compared with full attention on the same requests, on the real engine: many on few
requests, then few on all. "Perplexity" is its growth over answers, with a 95 % interval over
requests; "same tokens" are those that full attention likes best in the same place too; "MiB a
request" is its KV cache at its end, with the padding of KV groups; "at once" is what `swa plan`
says of requests of the average size (--budget: where 16 or more of full attention fit); "first
token" is the modelled work until then, full attention's being 1.

With --budget the least loss decides, unless an --objective is given; with --kv-memory requests at
once do. The exit status is 3 where nothing within --tolerance was found: serve full attention.
"""

import argparse
import hashlib
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swa_backend.can_slide import check_can_slide
from swa_backend.checkpoint import Checkpoint, read_checkpoint
from swa_vllm.compat.architectures import check_architectures
from swa_vllm.tools.common import plots
from swa_vllm.tools.common.arguments import (
    check_number_argument,
    check_number_arguments,
    check_output_path,
    is_flag_number,
    parse_memory,
)
from swa_vllm.tools.common.arms import Arm as Engine
from swa_vllm.tools.common.hub import find_model
from swa_vllm.tools.common.pools import Model, plan_pool
from swa_vllm.tools.common.queueing import Workload
from swa_vllm.tools.common.sizing import (
    MODEL_DTYPES,
    Device,
    Limits,
    bytes_of_an_element,
    longest_text_in_limits,
)
from swa_vllm.tools.tune.candidates import (
    FULL,
    Candidate,
    Objective,
    Sizer,
    layer_shape_of,
    layouts_to_try,
)
from swa_vllm.tools.tune.journal import Journal
from swa_vllm.tools.tune.report import Arm, describe_arms, describe_choice, draw_front
from swa_vllm.tools.tune.requests import FEWEST, Split, read_requests, split_requests
from swa_vllm.tools.tune.search import Clock, Found, Goal, Layout, find_window

if TYPE_CHECKING:
    from swa_vllm.tools.tune.measure import Measurements

EXAMPLE = "Qwen3-8B --requests traffic.jsonl --budget 0.5"
NOTHING_TOLERABLE = 3  # the exit status
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_MASS_REQUESTS = 4
_DEPTHS_AND_TRIALS = (4, 3)  # of numbers to recall, in texts as long as the longest request
FULL_ARM, CHOSEN, RUNNER_UP = "full attention", "the choice", "the runner-up"


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
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="which half of the requests chooses: another split shows how far it decides",
    )
    parser.add_argument(
        "--dtype", choices=MODEL_DTYPES, default="auto", help="dtype of the weights"
    )
    parser.add_argument(
        "--max-num-batched-tokens",
        type=int,
        default=512,
        metavar="TOKENS",
        help="most tokens of a step: a longer prompt is computed in chunks of this size",
    )
    parser.add_argument(
        "--block-size",
        type=int,
        metavar="TOKENS",
        help="tokens of a KV cache page (default: 16, on CPUs 128)",
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="PATH",
        help="keep scores there, and go on where they end (default: none are kept)",
    )
    plots.add_plot_argument(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print what to serve with, what it costs and what it gains; returns the figures.

    Raises:
        ValueError: an option, a request or the model is not what can be tuned.
    """
    deadline = time.monotonic() + _check_tune_arguments(args)
    # These import vLLM, which `swa --help` does without.
    from swa_vllm.tools.engines.scoring import NUM_EXTRA_TOKENS
    from swa_vllm.tools.engines.setup import scoring_text_config, setup_of
    from swa_vllm.tools.engines.texts import tokenizer_of
    from swa_vllm.tools.tune.measure import Measurements

    model = find_model(args.model, whole=True)
    checkpoint = read_checkpoint(model)
    check_architectures(checkpoint.architectures)
    check_can_slide(checkpoint.config)
    if checkpoint.linear is not None:
        raise ValueError(
            f"{args.model} has layers with linear attention, which swa tune does not know; see "
            "what a window gains with swa plan"
        )
    longest, tokenizer = longest_text_in_limits(checkpoint), tokenizer_of(str(model))
    split = split_requests(read_requests(args.requests, tokenizer, longest), args.seed)
    hf_config = scoring_text_config(str(model))
    sizer = _sizer_of(args, checkpoint, hf_config, split)
    layouts = _layouts_in_budget(args, sizer)
    setup = setup_of(args, hf_config, sizer.limits.max_model_len + NUM_EXTRA_TOKENS)
    setup = replace(setup, model=str(model))
    with Measurements(setup, Journal(args.resume, _conditions(args, model))) as measurements:
        found = _search(args, split, sizer, layouts, measurements, deadline)
        arms = _report_arms(found, split, sizer, measurements, tokenizer)
    return _print_choice(args, split, sizer, found, arms)


def _check_tune_arguments(args: argparse.Namespace) -> float:
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
    return int(found[1]) * _SECONDS[found[2]]


def _sizer_of(
    args: argparse.Namespace, checkpoint: Checkpoint, hf_config: Any, split: Split
) -> Sizer:
    from torch import cuda

    device = Device.GPU if cuda.is_available() else Device.CPU
    args.block_size = args.block_size or device.block_size
    requests = (*split.choosing, *split.held_out)
    model = Model(
        windows=(None,) * checkpoint.num_layers,
        sink_tokens=0,
        kv_heads=checkpoint.num_kv_heads,
        head_dim=checkpoint.head_dim,
        number_bytes=bytes_of_an_element(checkpoint, args.dtype, "auto"),
    )
    workload = Workload(
        round(sum(len(request.prompt) for request in requests) / len(requests)),
        round(sum(len(request.answer) for request in requests) / len(requests)),
    )
    limits = Limits(
        block_size=args.block_size,
        max_model_len=max(len(request.tokens) for request in requests),
        max_num_batched_tokens=8192,
        max_num_seqs=256,
        num_steps_in_flight=device.num_steps_in_flight(),
    )
    memory = None if args.kv_memory is None else parse_memory(args.kv_memory)
    sizer = Sizer(model, layer_shape_of(hf_config), limits, workload, device, memory)
    if memory is not None and not (pool := plan_pool(Engine.FULL, model, limits, memory)).num_pages:
        raise ValueError(
            f"--kv-memory {args.kv_memory} does not hold a single page of {pool.page_bytes} bytes; "
            "give more"
        )
    return sizer


def _layouts_in_budget(args: argparse.Namespace, sizer: Sizer) -> list[Layout]:
    """List windows, sinks and numbers of full layers to try."""
    full = sizer.gain(FULL).num_bytes
    limit = full - 1 if args.budget is None else int(args.budget * full)
    sinks = sorted({int(part) for part in args.sink_tokens.split(",")})
    by_loss = args.objective == Objective.LOSS
    layouts = layouts_to_try(sizer, sinks, sizer.limits.max_model_len, limit, by_loss=by_loss)
    if not layouts:
        mean = sizer.workload.num_prompt + sizer.workload.num_output
        raise ValueError(
            f"no window keeps a request of {mean} tokens, which is the average of --requests, "
            f"within {limit} bytes of full attention's {full}: give a greater --budget, smaller "
            "pages (--block-size), fewer --sink-tokens or longer --requests"
        )
    return layouts


def _conditions(args: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Name what scores depend on."""
    config = (model / "config.json").read_bytes()
    return {
        "model": args.model,
        "config.json": hashlib.sha256(config).hexdigest(),
        "requests": hashlib.sha256(args.requests.read_bytes()).hexdigest(),
        "dtype": args.dtype,
        "block_size": args.block_size,
        "max_num_batched_tokens": args.max_num_batched_tokens,
    }


def _search(
    args: argparse.Namespace,
    split: Split,
    sizer: Sizer,
    layouts: Sequence[Layout],
    measurements: "Measurements",
    deadline: float,
) -> Found:
    """Look for the best candidate by the choosing requests alone."""
    choosing, num_held_out = split.choosing, len(split.held_out)
    measurements.scores(FULL, choosing)
    windows = sorted({(window, sinks) for window, sinks, _ in layouts})
    masses = measurements.mass(choosing[:_MASS_REQUESTS], windows)
    clock = Clock(0.0, measurements.start_s, measurements.request_s)
    one_arm_s = clock.cost_s([(1, num_held_out + math.prod(_DEPTHS_AND_TRIALS))])
    reserved_s = len((FULL_ARM, CHOSEN, RUNNER_UP)) * one_arm_s
    clock = replace(clock, deadline=deadline - reserved_s)
    goal = Goal(Objective(args.objective), math.log1p(args.tolerance), num_held_out)
    return find_window(
        layouts,
        masses,
        sizer,
        len(choosing),
        lambda candidate, count: measurements.rise(candidate, choosing[:count]),
        goal,
        clock,
    )


def _report_arms(
    found: Found, split: Split, sizer: Sizer, measurements: "Measurements", tokenizer: Any
) -> dict[str, Arm]:
    """Measure what was found on the held-out requests, and its recall, beside full attention."""
    from swa_vllm.tools.engines.needles import ANSWER_TOKENS, SHORTEST, make_needles

    length = sizer.limits.max_model_len - ANSWER_TOKENS
    needles = make_needles(
        lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]),
        [length] if length >= SHORTEST else [],
        *_DEPTHS_AND_TRIALS,
    )

    def recalled(candidate: Candidate) -> tuple[int, int]:
        return measurements.recalled(candidate, needles, tokenizer), len(needles)

    # Where nothing is tolerable, the least loss shows how far off it is.
    by_loss = sorted(found.rises, key=lambda candidate: found.rises[candidate].mean)
    names = (CHOSEN, RUNNER_UP) if found.order else ("the least loss",)
    gain, running = sizer.gain(FULL), sizer.running(FULL)
    measurements.scores(FULL, split.held_out)
    arms = {FULL_ARM: Arm(FULL, gain, running, None, 1.0, recalled(FULL))}
    for name, candidate in zip(names, found.order or by_loss, strict=False):
        arms[name] = Arm(
            candidate,
            sizer.gain(candidate),
            sizer.running(candidate),
            measurements.rise(candidate, split.held_out),
            measurements.agreement(candidate, split.held_out),
            recalled(candidate),
        )
    return arms


def _print_choice(
    args: argparse.Namespace, split: Split, sizer: Sizer, found: Found, arms: Mapping[str, Arm]
) -> dict[str, Any]:
    workload, choice = sizer.workload, arms.get(CHOSEN)
    print(
        f"{len(split.held_out)} held-out requests, of {workload.num_prompt} tokens and answers of "
        f"{workload.num_output} on average; {len(split.choosing)} others chose\n"
    )
    print(describe_arms(arms))
    if arms[FULL_ARM].recalled == (0, math.prod(_DEPTHS_AND_TRIALS)):
        print(
            "\nfull attention recalls none of the numbers: what a window does to recall is unknown"
        )
    limit = math.log1p(args.tolerance)
    is_tolerable = choice is not None and choice.rise is not None and choice.rise.high <= limit
    serve = choice.candidate if choice is not None and is_tolerable else FULL
    if not is_tolerable:
        args.status = NOTHING_TOLERABLE
        print(
            f"\nno window was found whose growth of perplexity is below {100 * args.tolerance:g} % "
            "for sure: serve full attention, or give a greater --tolerance or --budget, or more "
            "--requests, which make intervals narrower"
        )
    print(f"\n{describe_choice(serve)}")
    gains = {candidate: sizer.gain(candidate) for candidate in (FULL, *found.rises)}
    if args.plot:
        draw_front(args.plot, found.rises, gains, choice)
    return {
        "model": args.model,
        "objective": args.objective,
        "budget": args.budget,
        "kv_memory": args.kv_memory,
        "tolerance": args.tolerance,
        "seed": args.seed,
        "workload": {"prompt": workload.num_prompt, "answer": workload.num_output},
        "choosing": [request.line for request in split.choosing],
        "held_out": [request.line for request in split.held_out],
        "arms": {name: arm.to_json() for name, arm in arms.items()},
        "measured": [
            {"additional_config": {"swa": c.options()}, "rise": rise.to_json(), **vars(gains[c])}
            for c, rise in found.rises.items()
        ],
        "is_tolerable": is_tolerable,
        "additional_config": {"swa": serve.options()},
    }
