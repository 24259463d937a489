"""``swa eval ppl``: perplexity of a text under windows and sinks, and what a request takes."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swa_backend.table import format_table
from swa_backend.window import Phase, num_pinned
from swa_vllm.tools.common import plots
from swa_vllm.tools.common.arguments import (
    check_number_argument,
    is_flag_number,
    options_of_phase,
)
from swa_vllm.tools.common.progress import say
from swa_vllm.tools.engines.perplexity import Measured, measure_perplexity
from swa_vllm.tools.engines.scoring import NUM_EXTRA_TOKENS, ScoringEngine
from swa_vllm.tools.engines.setup import (
    FULL_ATTENTION,
    Setup,
    resolve_scoring_options,
    scoring_text_config,
    setup_of,
)
from swa_vllm.tools.engines.texts import cut_evaluated_text, tokens_of

FULL = "full"
QUICK_PIECES = 2
_HEADER = ("window", "sinks", "perplexity", "to full", "pages", "most pages", "MiB a request")


@dataclass(frozen=True)
class WindowArm:
    """An arm of the comparison: a window and a number of sinks.

    Attributes:
        window: None for full attention.
        options: of ``swa``.
    """

    window: int | None
    sinks: int
    options: dict[str, Any]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print a row for each window and number of sinks; returns the figures."""
    plots.check_plot_path(args.plot)
    hf_config = scoring_text_config(args.model)
    _check_prompt_tokens(args)
    arms = ppl_window_arms(args, hf_config)
    num_forced = 0 if args.prompt_tokens is None else args.length - args.prompt_tokens
    setup = setup_of(args, hf_config, args.length + NUM_EXTRA_TOKENS, forces_tokens=num_forced > 0)
    pieces = cut_evaluated_text(
        tokens_of(args.model, args.text), args.length, QUICK_PIECES if args.quick else None
    )
    rows = [(arm, _evaluate_window_arm(setup, arm, pieces, num_forced)) for arm in arms]
    full = next((m.perplexity for arm, m in rows if arm.window is None), None)
    forced = f", the last {num_forced} of each forced as generated" if num_forced else ""
    print(f"{len(pieces)} pieces of {args.length} tokens of {args.text.name}{forced}")
    print(format_table(_HEADER, [_perplexity_row(arm, measured, full) for arm, measured in rows]))
    if args.plot:
        _plot_perplexity(args.plot, rows)
    return {
        "model": args.model,
        "dtype": args.dtype,
        "length": args.length,
        "prompt_tokens": args.prompt_tokens,
        "num_pieces": len(pieces),
        "arms": [{"options": arm.options, **vars(measured)} for arm, measured in rows],
    }


def _check_prompt_tokens(args: argparse.Namespace) -> None:
    if args.prompt_tokens is None:
        if args.phase != Phase.BOTH:
            raise ValueError(
                f"--phase {args.phase} treats prompts and generated tokens differently, and "
                "without --prompt-tokens a whole piece is a prompt: give --prompt-tokens N, below "
                f"--length {args.length}, or leave --phase out"
            )
        return
    check_number_argument("prompt_tokens", args.prompt_tokens)
    if args.prompt_tokens >= args.length:
        raise ValueError(
            f"--prompt-tokens {args.prompt_tokens} is not below --length {args.length}: no token "
            "would be left to be generated and scored. Give longer pieces, or a shorter prompt"
        )


def ppl_window_arms(args: argparse.Namespace, hf_config: Any) -> list[WindowArm]:
    """List the rows that the command line asks for, and check each.

    Raises:
        ValueError: a number is missing, or an option would have no effect.
    """
    windows = [
        None if w == FULL else _parse_ppl_number("--window", w, 1) for w in args.window.split(",")
    ]
    sinks = [_parse_ppl_number("--sink-tokens", s, 0) for s in args.sink_tokens.split(",")]
    if not any(windows) and args.phase != Phase.BOTH:
        raise ValueError(
            f"--phase {args.phase} says whose tokens have the window, and --window {args.window} "
            "has none: give a number of tokens, or leave --phase out"
        )
    if not any(windows) and (max(sinks) > 0 or args.full_attention_layers is not None):
        raise ValueError(
            f"--window {args.window} has no window: sinks and full layers would have no effect. "
            "Give a number of tokens, or --sink-tokens 0 and no --full-attention-layers"
        )
    if args.position_shift and not max(sinks):
        raise ValueError(
            f"--position-shift moves sinks, and --sink-tokens {args.sink_tokens} has none: give "
            "some, or leave it out"
        )
    # The flag whose tokens have the window.
    flag, slid = "--length", args.length
    if args.phase == Phase.PREFILL:
        flag, slid = "--prompt-tokens", args.prompt_tokens
    arms = []
    for window in windows:
        for count in sinks if window else [0]:
            options = _ppl_options(args, window, count)
            kept = num_pinned(count, Phase(args.phase), args.prompt_tokens or 0)
            if window and window + kept >= slid:
                longer = "longer pieces" if flag == "--length" else "a longer prompt"
                beside = "sinks" if kept == count else "tokens of the prompt"
                raise ValueError(
                    f"a window of {window} with {kept} {beside} is not below {flag} {slid}: "
                    f"nothing would slide. Give {longer}, or a smaller window"
                )
            resolve_scoring_options(hf_config, options)
            arms.append(WindowArm(window, count, options))
    return arms


def _parse_ppl_number(flag: str, text: str, least: int) -> int:
    if not is_flag_number(text, least):
        allowed = f"integers from {least} on, separated by commas"
        raise ValueError(
            f"{flag} takes {allowed}{' (or full)' if least else ''}; got {text.strip()!r}"
        )
    return int(text)


def _ppl_options(args: argparse.Namespace, window: int | None, sinks: int) -> dict[str, Any]:
    if window is None:
        return dict(FULL_ATTENTION)
    options: dict[str, Any] = {"window": window, **options_of_phase(args)}
    if sinks:
        options["sink_tokens"] = sinks
        if args.position_shift:
            options["position_shift"] = True
    if args.full_attention_layers is not None:
        options["full_attention_layers"] = args.full_attention_layers
    return options


def _evaluate_window_arm(
    setup: Setup, arm: WindowArm, pieces: Sequence[Sequence[int]], num_forced: int
) -> Measured:
    name = FULL if arm.window is None else f"window {arm.window}, {arm.sinks} sinks"
    say(name)
    with ScoringEngine.start(setup, arm.options) as engine:
        return measure_perplexity(engine, pieces, num_forced)


def _perplexity_row(arm: WindowArm, measured: Measured, full: float | None) -> list[object]:
    window = FULL if arm.window is None else arm.window
    ratio = f"{measured.perplexity / full:.3f}" if full else None
    return [
        window,
        None if arm.window is None else arm.sinks,
        measured.perplexity,
        ratio,
        measured.pages,
        measured.peak_pages,
        measured.pool_bytes / 2**20,
    ]


def _plot_perplexity(path: Path, rows: Sequence[tuple[WindowArm, Measured]]) -> None:
    series: dict[str, list[tuple[float, float]]] = {}
    for arm, measured in rows:
        name = "full attention" if arm.window is None else f"{arm.sinks} sinks"
        point = (measured.pool_bytes / 2**20, measured.perplexity)
        series.setdefault(name, []).append(point)
    plots.draw_lines(path, series, "KV cache of a request, MiB", "perplexity")
