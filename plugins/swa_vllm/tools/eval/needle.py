"""``swa eval needle``: recall of a number that a long text mentions once, by where it stands."""

import argparse
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from vllm import LLM, SamplingParams

from swa_backend.table import format_table
from swa_backend.window import Phase
from swa_vllm.tools.common import plots
from swa_vllm.tools.common.arguments import (
    check_number_argument,
    is_flag_number,
    options_of_phase,
    refuse_phase_decode,
)
from swa_vllm.tools.common.progress import say
from swa_vllm.tools.engines.needles import (
    ANSWER_TOKENS,
    SHORTEST,
    Needle,
    make_needles,
    recall,
)
from swa_vllm.tools.engines.scoring import ScoringEngine
from swa_vllm.tools.engines.setup import (
    FULL_ATTENTION,
    resolve_scoring_options,
    scoring_text_config,
    setup_of,
)
from swa_vllm.tools.engines.texts import tokenizer_of

FULL, WINDOW = "full attention", "window"
_TIMED_PROMPTS = 3  # of each length


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print recall by depth and by distance; returns the figures."""
    plots.check_plot_path(args.plot)
    if args.generated == 0:
        refuse_phase_decode(
            args,
            "hides nothing from a question at the end of a prompt, which sees all of it",
            "ask behind generated text with --generated N, or leave --phase out",
        )
    hf_config = scoring_text_config(args.model)
    options: dict[str, Any] = {"window": args.window, "sink_tokens": args.sink_tokens}
    options |= options_of_phase(args)
    if args.full_attention_layers is not None:
        options["full_attention_layers"] = args.full_attention_layers
    every_layer_slides = None not in resolve_scoring_options(hf_config, options).windows
    lengths = _needle_lengths(args)
    tokenizer = tokenizer_of(args.model)
    needles = make_needles(
        lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]),
        lengths[:1] if args.quick else lengths,
        args.depths,
        1 if args.quick else args.trials,
        digit_first=args.digit_first,
        num_generated=args.generated,
    )
    setup = setup_of(
        args, hf_config, max(lengths) + ANSWER_TOKENS, forces_tokens=args.generated > 0
    )
    recalled, first_token_s = dict[str, list[bool]](), dict[str, dict[int, float]]()
    for name, own in {FULL: FULL_ATTENTION, WINDOW: options}.items():
        say(f"{name}: {len(needles)} prompts")
        with ScoringEngine.start(setup, own) as engine:
            assert engine.llm is not None
            recalled[name] = recall(engine.llm, tokenizer, needles)
            first_token_s[name] = _time_first_tokens(engine.llm, needles)
    maps = [_recall_by_depth(name, needles, hits) for name, hits in recalled.items()]
    maps.append(_recall_by_distance(needles, recalled))
    _print_heat_maps(maps)
    says = describe_recall(
        args.window,
        args.sink_tokens,
        every_layer_slides,
        needles,
        recalled[WINDOW],
        Phase(args.phase),
    )
    print(says)
    print(_describe_first_tokens(first_token_s))
    if args.plot:
        plots.draw_heat_maps(args.plot, maps)
    figures = [
        {"length": n.length, "depth": n.depth, "distance": n.distance, FULL: full, WINDOW: window}
        for n, full, window in zip(needles, *recalled.values(), strict=True)
    ]
    return {
        "model": args.model,
        "options": options,
        "digit_first": args.digit_first,
        "generated": args.generated,
        "first_token_s": first_token_s,
        "needles": figures,
    }


def _needle_lengths(args: argparse.Namespace) -> list[int]:
    check_number_argument("depths", args.depths, least=2)
    check_number_argument("trials", args.trials)
    check_number_argument("generated", args.generated, least=0)
    lengths = []
    for text in args.lengths.split(","):
        if not is_flag_number(text, SHORTEST):
            raise ValueError(f"--lengths takes integers from {SHORTEST} on, got {text.strip()!r}")
        lengths.append(int(text))
    if args.window + args.sink_tokens >= max(lengths):
        raise ValueError(
            f"a window of {args.window} with {args.sink_tokens} sinks is not below the longest of "
            f"--lengths, {max(lengths)}: nothing would slide. Give "
            "a longer one, or a smaller window"
        )
    if args.phase == Phase.DECODE and args.window >= args.generated:
        raise ValueError(
            f"--phase {args.phase} with a window of {args.window}, which is not below --generated "
            f"{args.generated}: nothing would slide. Give more, or a smaller window"
        )
    if min(lengths) - args.generated < SHORTEST:
        raise ValueError(
            f"--generated {args.generated} leaves {min(lengths) - args.generated} tokens of "
            f"--lengths {min(lengths)} for the prompt, and {SHORTEST} are needed; give fewer, or "
            "longer ones"
        )
    return lengths


def _time_first_tokens(llm: LLM, needles: Sequence[Needle]) -> dict[int, float]:
    """Seconds to the first token of one prompt at a time, by length: the median of a few."""
    params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
    by_length = defaultdict[int, list[float]](list)
    for needle in needles:
        if len(seconds := by_length[needle.length]) < _TIMED_PROMPTS:
            start = time.perf_counter()
            llm.generate([{"prompt_token_ids": needle.prompt}], params, use_tqdm=False)
            seconds.append(time.perf_counter() - start)
    return {length: median(seconds) for length, seconds in by_length.items()}


def _describe_first_tokens(first_token_s: Mapping[str, Mapping[int, float]]) -> str:
    says = [
        f"{seconds:.2f} s behind {length:,} tokens ({seconds / first_token_s[FULL][length]:.2f} of "
        "full attention's)"
        for length, seconds in first_token_s[WINDOW].items()
    ]
    return f"first token: {', '.join(says)}"


def _recall_by_depth(name: str, needles: Sequence[Needle], hits: Sequence[bool]) -> plots.HeatMap:
    depths = sorted({needle.depth for needle in needles})
    lengths = sorted({needle.length for needle in needles})
    found = _recall_by_key(((needle.length, needle.depth) for needle in needles), hits)
    return plots.HeatMap(
        name,
        [[found.get((length, depth)) for depth in depths] for length in lengths],
        [f"{depth:.2f}" for depth in depths],
        list(map(str, lengths)),
        "depth",
        "tokens",
    )


def _recall_by_distance(
    needles: Sequence[Needle], recalled: dict[str, list[bool]]
) -> plots.HeatMap:
    # Up to 32, 64, 128, ... tokens.
    bins = [max(32, 1 << (needle.distance - 1).bit_length()) for needle in needles]
    columns = sorted(set(bins))
    found = {name: _recall_by_key(bins, hits) for name, hits in recalled.items()}
    return plots.HeatMap(
        "by distance",
        [[found[name].get(column) for column in columns] for name in recalled],
        [f"<={column}" for column in columns],
        list(recalled),
        "tokens before the answer",
        "",
    )


def _recall_by_key(keys: Iterable[Any], hits: Sequence[bool]) -> dict[Any, float]:
    groups = defaultdict[Any, list[bool]](list)
    for key, hit in zip(keys, hits, strict=True):
        groups[key].append(hit)
    return {key: sum(group) / len(group) for key, group in groups.items()}


def describe_recall(
    window: int,
    sinks: int,
    every_layer_slides: bool,
    needles: Sequence[Needle],
    hits: Sequence[bool],
    phase: Phase = Phase.BOTH,
) -> str:
    """Say what the window means for recall, and what was measured of it."""
    # The question's last token is that far from the number, and sees less than `window` back.
    hidden = [h for n, h in zip(needles, hits, strict=True) if n.distance > window]
    seen = [h for n, h in zip(needles, hits, strict=True) if n.distance <= window]
    measured = (
        f"recalled here: {sum(seen)} of {len(seen)} within the window, {sum(hidden)} of "
        f"{len(hidden)} beyond it"
    )
    if not every_layer_slides:
        return f"some layers keep full attention and can look at the whole text; {measured}"
    if phase is Phase.PREFILL:
        kept = f" and the {sinks} sinks" if sinks else ""
        return (
            "generated tokens see the whole text; the prompt's last token, which predicts the "
            f"first of them, sees the window of {window} tokens{kept}; {measured}"
        )
    if phase is Phase.DECODE:
        return (
            f"generated tokens see the whole prompt, and the window of {window} tokens; {measured}"
        )
    kept = f", but for the {sinks} sinks" if sinks else ""
    return (
        f"every layer slides: nothing further back than the window of {window} tokens can be "
        f"recalled{kept}; {measured}"
    )


def _print_heat_maps(maps: Iterable[plots.HeatMap]) -> None:
    for heat_map in maps:
        print(f"\n{heat_map.title}: recall; across: {heat_map.x_label}")
        rows = [
            [name, *values] for name, values in zip(heat_map.rows, heat_map.values, strict=True)
        ]
        print(format_table([heat_map.y_label, *heat_map.columns], rows))
    print()
