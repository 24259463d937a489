"""``swa eval needle``: recall of a number that a long text mentions once, by where it stands."""

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
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
from swa_vllm.tools.engines.forced import FORCED_TOKENS
from swa_vllm.tools.engines.scoring import ScoringEngine
from swa_vllm.tools.engines.setup import (
    FULL_ATTENTION,
    resolve_scoring_options,
    scoring_text_config,
    setup_of,
)
from swa_vllm.tools.engines.texts import tokenizer_of
from swa_vllm.tools.eval.filler import filler_sentences

FULL, WINDOW = "full attention", "window"
_CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Rome", "Paris", "Boston", "Tokyo", "Berlin", "Delhi")
_ANSWER_TOKENS = 8
_TIMED_PROMPTS = 3  # of each length
_SHORTEST = 64

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Needle:
    """A text, the number that it asks for, and where that stands.

    Attributes:
        length: tokens asked for; the text has no more.
        depth: where the sentence stands: 0 at the start of the prompt, 1 at its end.
        distance: tokens from the number to the end of the text.
        num_generated: how many of its last tokens are forced as generated ones, behind the prompt.
    """

    tokens: list[int]
    number: str
    length: int
    depth: float
    distance: int
    num_generated: int = 0

    @property
    def prompt(self) -> list[int]:
        """Its tokens that are not forced as generated ones."""
        return self.tokens[: len(self.tokens) - self.num_generated]


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
        args, hf_config, max(lengths) + _ANSWER_TOKENS, forces_tokens=args.generated > 0
    )
    recalled, first_token_s = dict[str, list[bool]](), dict[str, dict[int, float]]()
    for name, own in {FULL: FULL_ATTENTION, WINDOW: options}.items():
        say(f"{name}: {len(needles)} prompts")
        with ScoringEngine.start(setup, own) as engine:
            assert engine.llm is not None
            answers = _answer_needles(engine.llm, needles)
            first_token_s[name] = _time_first_tokens(engine.llm, needles)
        recalled[name] = [
            tokenizer.decode(answer).strip().startswith(needle.number)
            for needle, answer in zip(needles, answers, strict=True)
        ]
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
        if not is_flag_number(text, _SHORTEST):
            raise ValueError(f"--lengths takes integers from {_SHORTEST} on, got {text.strip()!r}")
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
    if min(lengths) - args.generated < _SHORTEST:
        raise ValueError(
            f"--generated {args.generated} leaves {min(lengths) - args.generated} tokens of "
            f"--lengths {min(lengths)} for the prompt, and {_SHORTEST} are needed; give fewer, or "
            "longer ones"
        )
    return lengths


def make_needles(
    tokenize: Tokenize,
    lengths: Sequence[int],
    num_depths: int,
    num_trials: int,
    *,
    digit_first: bool = False,
    num_generated: int = 0,
) -> list[Needle]:
    """Make texts of every length and depth, the same ones each time.

    Args:
        digit_first: the blank before the number ends the question, and does not begin the answer.
        num_generated: last tokens of each text that are not its prompt's.
    """
    blanks = (" ", "") if digit_first else ("", " ")
    generator, needles = random.Random(0), []  # noqa: S311 (the same numbers every time)
    for length in lengths:
        for step in range(num_depths):
            for _ in range(num_trials):
                city, number = generator.choice(_CITIES), str(generator.randint(1000, 9999))
                seed = generator.randrange(1 << 30)
                depth = step / (num_depths - 1)
                needles.append(
                    _make_needle(tokenize, length, depth, city, number, seed, blanks, num_generated)
                )
    return needles


def _make_needle(
    tokenize: Tokenize,
    length: int,
    depth: float,
    city: str,
    number: str,
    seed: int,
    blanks: tuple[str, str],
    num_generated: int,
) -> Needle:
    asked_with, answered_with = blanks
    question = tokenize(f" The secret number of {city} is{asked_with}")
    answer = tokenize(f"{answered_with}{number}.")
    left, hay = length - 2 * len(question) - len(answer), list[list[int]]()
    for sentence in map(tokenize, filler_sentences(seed)):
        if len(sentence) > left:
            break
        left -= len(sentence)
        hay.append(sentence)
    # As many sentences as may stand before the number for it to stand in the prompt.
    in_prompt = sum(map(len, hay)) + 2 * len(question) + len(answer) - num_generated
    ends = accumulate(map(len, hay), initial=len(question) + len(answer))
    most = sum(end <= in_prompt for end in ends) - 1
    place = round(depth * most)
    before, behind = (list(chain(*part)) for part in (hay[:place], hay[place:]))
    tokens = [*before, *question, *answer, *behind, *question]
    distance = len(tokens) - len(before) - len(question)
    return Needle(tokens, number, length, depth, distance, num_generated)


def _answer_needles(llm: LLM, needles: Sequence[Needle]) -> list[list[int]]:
    prompts, params = [], []
    for needle in needles:
        prompts.append({"prompt_token_ids": needle.prompt})
        num_prompt = len(needle.prompt)
        forced = {FORCED_TOKENS: needle.tokens[num_prompt:]} if needle.num_generated else None
        params.append(
            SamplingParams(
                temperature=0.0,
                max_tokens=needle.num_generated + _ANSWER_TOKENS,
                detokenize=False,
                extra_args=forced,
            )
        )
    outputs = llm.generate(prompts, params)  # its bar is on stderr
    return [
        list(output.outputs[0].token_ids)[needle.num_generated :]
        for needle, output in zip(needles, outputs, strict=True)
    ]


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
