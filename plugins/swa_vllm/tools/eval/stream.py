"""``swa eval stream``: one request many times longer than its window."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from swa_backend.layers import trained_len
from swa_backend.pages import ceil_div
from swa_backend.table import format_table
from swa_backend.window import Phase
from swa_vllm.tools.common import plots
from swa_vllm.tools.common.arguments import options_of_phase
from swa_vllm.tools.common.filler import filler_sentences
from swa_vllm.tools.common.progress import say, token_bar
from swa_vllm.tools.engines.perplexity import perplexity
from swa_vllm.tools.engines.scoring import Scored, ScoringEngine
from swa_vllm.tools.engines.setup import (
    FULL_ATTENTION,
    Setup,
    resolve_scoring_options,
    scoring_text_config,
    setup_of,
)
from swa_vllm.tools.engines.texts import tokenizer_of, tokens_of
from swa_vllm.tools.eval.flags import STREAM_TIMES

ARMS = ("shifted", "sinks", "window", "full")
_QUICKSTREAM_TIMES = 4
_MAX_ROWS = 40


@dataclass(frozen=True)
class Stream:
    """A text, the stretches that it is scored in, and how much of it is decoded.

    Attributes:
        trained: tokens that the model was trained on at most; the first so many come again at the
            end.
        bucket: tokens of a stretch.
        num_decoded: how many of the last tokens are decoded.
    """

    tokens: list[int]
    trained: int
    bucket: int
    num_decoded: int

    @property
    def passages(self) -> tuple[range, range]:
        """Where the same tokens stand: half a trained length behind the start, and at the end."""
        half, end = self.trained // 2, len(self.tokens)
        return range(half, self.trained), range(end - (self.trained - half), end)


@dataclass(frozen=True)
class StreamOutcome:
    """What one arm's engine made of a stream.

    Attributes:
        perplexities, least_pages, most_pages: of each bucket.
        passages: perplexities of the passage that comes twice.
        decode_pages: least and most pages held while decoding.
    """

    perplexities: list[float]
    least_pages: list[int]
    most_pages: list[int]
    passages: tuple[float, float]
    decode_pages: tuple[int, int]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print each stretch and the passage that comes twice; returns the figures."""
    plots.check_plot_path(args.plot)
    hf_config = scoring_text_config(args.model)
    arms = stream_arms_of(args, hf_config)
    stream = _stream_of(args, trained_len(hf_config))
    setup = setup_of(args, hf_config, len(stream.tokens) + 1, forces_tokens=True)
    outcomes = {name: _score_stream(name, setup, options, stream) for name, options in arms.items()}
    _print_stream(stream, outcomes)
    if args.plot:
        middle = [i + stream.bucket / 2 for i in range(0, len(stream.tokens), stream.bucket)]
        series = {n: list(zip(middle, o.perplexities, strict=True)) for n, o in outcomes.items()}
        plots.draw_lines(args.plot, series, "tokens", "perplexity", log_y=True)
    return {
        "model": args.model,
        "dtype": args.dtype,
        "tokens": len(stream.tokens),
        "decoded": stream.num_decoded,
        "trained_length": stream.trained,
        "bucket": stream.bucket,
        "arms": {n: {"options": arms[n], **vars(o)} for n, o in outcomes.items()},
    }


def stream_arms_of(args: argparse.Namespace, hf_config: Any) -> dict[str, dict[str, Any]]:
    """List the ``swa`` options of each arm that is asked for, and check them."""
    window: dict[str, Any] = {"window": args.window, **options_of_phase(args)}
    if args.full_attention_layers is not None:
        window["full_attention_layers"] = args.full_attention_layers
    sinks = {**window, "sink_tokens": args.sink_tokens}
    known = dict(
        zip(ARMS, ({**sinks, "position_shift": True}, sinks, window, FULL_ATTENTION), strict=True)
    )
    names = args.arms.split(",")
    if unknown := sorted(set(names) - set(ARMS)):
        raise ValueError(f"--arms are {', '.join(ARMS)}; got {', '.join(unknown)}")
    if set(names) == {"full"} and args.phase != Phase.BOTH:
        raise ValueError(
            f"--phase {args.phase} says whose tokens have the window, and --arms {args.arms} has "
            f"none: give an arm with a window, or leave --phase out"
        )
    if "shifted" in names and args.phase == Phase.DECODE:
        raise ValueError(
            f"--arms {args.arms}: shifted moves sinks, and with --phase {args.phase} generated "
            "tokens see the whole prompt, where it is; give --arms window, or leave --phase out"
        )
    for name in names:
        if name in ("shifted", "sinks") and args.sink_tokens < 1:
            raise ValueError(
                f"--arms {name} needs sinks, got --sink-tokens {args.sink_tokens}; give some, or "
                "--arms window"
            )
        resolve_scoring_options(hf_config, known[name])
    return {name: dict(known[name]) for name in names}


def _stream_of(args: argparse.Namespace, trained: int) -> Stream:
    times = _QUICKSTREAM_TIMES if args.quick else STREAM_TIMES
    num_tokens = times * trained if args.tokens is None else args.tokens
    if num_tokens < 2 * trained:
        raise ValueError(
            f"--tokens must be at least twice the trained length of {trained}, got {num_tokens}; "
            "give more"
        )
    text = tokens_of(args.model, args.text) if args.text else _made_up_text(args.model, num_tokens)
    return make_stream(text, num_tokens, trained)


def _made_up_text(model: str, num_tokens: int) -> list[int]:
    tokenizer, tokens = tokenizer_of(model), list[int]()
    for sentence in filler_sentences(0):
        tokens += tokenizer(sentence, add_special_tokens=False)["input_ids"]
        if len(tokens) >= num_tokens:
            return tokens
    raise AssertionError("sentences end")


def make_stream(text: Sequence[int], num_tokens: int, trained: int) -> Stream:
    """Repeat ``text`` up to ``num_tokens``, of which the last ``trained`` are its first again.

    Raises:
        ValueError: the text is shorter than a trained length.
    """
    if len(text) < trained:
        raise ValueError(
            f"the text has {len(text)} tokens, less than the model's trained length of {trained}; "
            "give a longer one"
        )
    tokens = [*islice(cycle(text), num_tokens - trained), *text[:trained]]
    bucket = trained * ceil_div(num_tokens, trained * _MAX_ROWS)
    return Stream(tokens, trained, bucket, num_decoded=num_tokens // 2)


def _score_stream(
    name: str, setup: Setup, options: dict[str, Any], stream: Stream
) -> StreamOutcome:
    say(f"{name}: {len(stream.tokens)} tokens")
    with ScoringEngine.start(setup, options) as engine, token_bar(len(stream.tokens)) as advance:
        return summarize_stream(stream, engine.score(stream.tokens, stream.num_decoded, advance))


def summarize_stream(stream: Stream, scored: Scored) -> StreamOutcome:
    """Reduce what was scored to perplexity and pages of each stretch and of both passages."""
    # logprobs[i] is that of token i + 1.
    stretches = [
        range(max(1, start), min(start + stream.bucket, len(stream.tokens)))
        for start in range(0, len(stream.tokens), stream.bucket)
    ]
    num_prompt = len(stream.tokens) - stream.num_decoded
    held = [_stream_pages_held_in(stretch, scored) for stretch in stretches]
    decoding = [p for p, n in zip(scored.pages, scored.computed, strict=True) if n > num_prompt]

    def of(stretch: range) -> float:
        return perplexity(scored.logprobs[stretch.start - 1 : stretch.stop - 1])

    first, last = stream.passages
    return StreamOutcome(
        [of(stretch) for stretch in stretches],
        [min(pages) for pages in held],
        [max(pages) for pages in held],
        (of(first), of(last)),
        (min(decoding), max(decoding)),
    )


def _stream_pages_held_in(stretch: range, scored: Scored) -> list[int]:
    """List the pages after each step that ended in a stretch, or after the next step."""
    steps = list(zip(scored.computed, scored.pages, strict=True))
    within = [pages for computed, pages in steps if computed - 1 in stretch]
    # The request's last step left nothing to count.
    after = (pages for computed, pages in steps if computed > stretch.start)
    return within or [next(after, scored.pages[-1])]


def _print_stream(stream: Stream, outcomes: dict[str, StreamOutcome]) -> None:
    num_tokens, num_prompt = len(stream.tokens), len(stream.tokens) - stream.num_decoded
    print(
        f"{num_tokens} tokens, {num_tokens / stream.trained:.1f} times the trained length of "
        f"{stream.trained}; decoded from {num_prompt} on"
    )
    header = ["tokens", *(text for name in outcomes for text in (name, "pages"))]
    rows = []
    for index, start in enumerate(range(0, num_tokens, stream.bucket)):
        cells: list[object] = [f"{start}-{min(start + stream.bucket, num_tokens) - 1}"]
        for outcome in outcomes.values():
            cells += [outcome.perplexities[index], outcome.most_pages[index]]
        rows.append(cells)
    print(format_table(header, rows))
    at = [f"{passage.start / stream.trained:.1f}x" for passage in stream.passages]
    print(f"\nthe same passage at {' and '.join(at)} the trained length; pages while decoding")
    rows = [
        [n, *o.passages, f"{100 * (o.passages[1] / o.passages[0] - 1):+.2f} %", *o.decode_pages]
        for n, o in outcomes.items()
    ]
    print(format_table(["", *at, "differs", "least", "most"], rows))
