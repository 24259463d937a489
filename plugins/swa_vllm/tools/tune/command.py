"""The best window for your traffic: measured on a part of it, and reported by the rest.

Half of the conversations choose, the other half report. Windows, sinks and full layers within the
budget are compared with full attention on the same requests, on the real engine: many on few
requests, then few on all. "Perplexity" is its growth over answers, with a 95 % interval over
requests; "same tokens" are those that full attention likes best in the same place too; "MiB a
request" is its KV cache at its end, with the padding of KV groups; "at once" is what `swa plan`
says of requests of the average size (--budget: where 16 or more of full attention fit); "first
token" is the modelled work until then, full attention's being 1.

The best candidate is tried with two windows in the end. --phase also tries windows that answers or
prompts have alone.

With --budget the least loss decides, unless an --objective is given; with --kv-memory requests at
once do. The exit status is 3 where nothing within --tolerance was found: serve full attention.
"""

import argparse
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swa_backend.can_slide import check_can_slide
from swa_backend.checkpoint import Checkpoint, read_checkpoint
from swa_backend.window import Phase
from swa_vllm.compat.architectures import check_architectures, phase_refused
from swa_vllm.tools.common.arguments import parse_memory
from swa_vllm.tools.common.arms import Arm as Engine
from swa_vllm.tools.common.hub import find_model
from swa_vllm.tools.common.pools import Model, plan_pool
from swa_vllm.tools.common.queueing import Workload
from swa_vllm.tools.common.sizing import (
    Device,
    Limits,
    bytes_of_an_element,
    longest_text_in_limits,
)
from swa_vllm.tools.tune.candidates import FULL, Candidate, Layout, Objective
from swa_vllm.tools.tune.flags import add_arguments, check_arguments
from swa_vllm.tools.tune.journal import Journal
from swa_vllm.tools.tune.layouts import layouts_to_try
from swa_vllm.tools.tune.report import Arm, describe_arms, describe_choice, draw_front
from swa_vllm.tools.tune.requests import Split, read_requests, split_requests
from swa_vllm.tools.tune.search import Clock, Found, Goal, find_window
from swa_vllm.tools.tune.sizes import Sizer, layer_shape_of

if TYPE_CHECKING:
    from swa_vllm.tools.tune.measure import Measurements

__all__ = ["EXAMPLE", "add_arguments", "run"]
EXAMPLE = "Qwen3-8B --requests traffic.jsonl --budget 0.5"
NOTHING_TOLERABLE = 3  # the exit status
_MASS_REQUESTS = 4
_DEPTHS_AND_TRIALS = (4, 3)  # of numbers to recall, in texts as long as the longest request
FULL_ARM, CHOSEN, RUNNER_UP = "full attention", "the choice", "the runner-up"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print what to serve with, what it costs and what it gains; returns the figures.

    Raises:
        ValueError: an option, a request or the model is not what can be tuned.
    """
    deadline = time.monotonic() + check_arguments(args)
    # These import vLLM, which `swa --help` does without.
    from swa_vllm.tools.engines.scoring import NUM_EXTRA_TOKENS
    from swa_vllm.tools.engines.setup import scoring_text_config, setup_of
    from swa_vllm.tools.engines.texts import tokenizer_of
    from swa_vllm.tools.tune.measure import Measurements

    model = find_model(args.model, whole=True)
    checkpoint = read_checkpoint(model)
    check_architectures(checkpoint.architectures)
    check_can_slide(checkpoint.config)
    for phase in set(args.phase) - {Phase.BOTH}:
        refusal = phase_refused(f"--phase {phase}", checkpoint.architectures)
        if refusal is not None:
            raise ValueError(refusal)
    if checkpoint.linear is not None:
        raise ValueError(
            f"{args.model} has layers with linear attention, which swa tune does not know; see "
            "what a window gains with swa plan"
        )
    most, tokenizer = longest_text_in_limits(checkpoint), tokenizer_of(str(model))
    split = split_requests(read_requests(args.requests, tokenizer, most), args.seed)
    hf_config = scoring_text_config(str(model))
    sizer = sizer_of(args, checkpoint, hf_config, split)
    layouts = _layouts_in_budget(args, sizer)
    longest = sizer.limits.max_model_len + NUM_EXTRA_TOKENS
    setup = setup_of(args, hf_config, longest, forces_tokens=args.phase != [Phase.BOTH])
    setup = replace(setup, model=str(model))
    with Measurements(setup, Journal(args.resume, _conditions(args, model))) as measurements:
        found = _search(args, split, sizer, layouts, measurements, deadline)
        arms = _report_arms(found, split, sizer, measurements, tokenizer)
    return _print_choice(args, split, sizer, found, arms)


def sizer_of(
    args: argparse.Namespace, checkpoint: Checkpoint, hf_config: Any, split: Split
) -> Sizer:
    """Make the sizes of candidates for requests of the average size.

    Raises:
        ValueError: ``--kv-memory`` holds no page, or the checkpoint names no known dtype.
    """
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
    longest_part = max(len(r.prompt) for r in requests), max(len(r.answer) for r in requests)
    shape = layer_shape_of(hf_config)
    sizer = Sizer(model, shape, limits, workload, device, memory, longest_part)
    if memory is not None and not (pool := plan_pool(Engine.FULL, model, limits, memory)).num_pages:
        raise ValueError(
            f"--kv-memory {args.kv_memory} does not hold a single page of {pool.page_bytes} bytes; "
            "give more"
        )
    return sizer


def _limit_in_bytes(args: argparse.Namespace, sizer: Sizer, phase: Phase = Phase.BOTH) -> int:
    """Say how many bytes a request may take; with --kv-memory less than with full attention."""
    full = sizer.gain(FULL).num_bytes
    if args.budget is not None:
        return int(args.budget * full)
    return full if phase is Phase.PREFILL else full - 1


def _layouts_in_budget(args: argparse.Namespace, sizer: Sizer) -> list[Layout]:
    """List windows, sinks and numbers of full layers to try."""
    sinks = sorted({int(part) for part in args.sink_tokens.split(",")})
    by_loss = args.objective == Objective.LOSS
    layouts = list[Layout]()
    for phase in args.phase:
        longest, limit = sizer.longest(phase), _limit_in_bytes(args, sizer, phase)
        layouts += layouts_to_try(sizer, sinks, longest, limit, by_loss=by_loss, phase=phase)
    if not layouts:
        mean = sizer.workload.num_prompt + sizer.workload.num_output
        full, phases = sizer.gain(FULL).num_bytes, ", ".join(args.phase)
        raise ValueError(
            f"no window with --phase {phases} keeps a request of {mean} tokens, which is the "
            f"average of --requests, within {_limit_in_bytes(args, sizer)} bytes of full "
            f"attention's {full}: give a greater --budget, smaller pages (--block-size), fewer "
            "--sink-tokens or longer --requests"
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
    views = sorted({layout.view for layout in layouts})
    masses = measurements.mass(choosing[:_MASS_REQUESTS], views)
    if decodes := args.phase != [Phase.BOTH]:
        measurements.time_decoding(choosing[0])
    clock = Clock(0.0, measurements.start_s, measurements.request_s(decodes=decodes))
    one_arm_s = clock.cost_s([(1, num_held_out + math.prod(_DEPTHS_AND_TRIALS))])
    reserved_s = len((FULL_ARM, CHOSEN, RUNNER_UP)) * one_arm_s
    clock = replace(clock, deadline=deadline - reserved_s)
    goal = Goal(
        Objective(args.objective),
        math.log1p(args.tolerance),
        num_held_out,
        _limit_in_bytes(args, sizer),
    )
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
        num_generated=_num_generated(found, sizer, length),
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


def _num_generated(found: Found, sizer: Sizer, length: int) -> int:
    """Count the tokens behind which a number is asked for.

    0, or an answer's length where a window in answers only is among what was found: behind a prompt
    alone it hides nothing.
    """
    in_answers = any(candidate.phase is Phase.DECODE for candidate in found.rises)
    return min(sizer.workload.num_output, length // 2) if in_answers else 0


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
        "phase": args.phase,
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
