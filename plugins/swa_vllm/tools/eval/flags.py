"""The flags of each evaluation, apart from what runs it: help imports neither torch nor vLLM."""

import argparse
from collections.abc import Callable
from pathlib import Path

from swa_vllm.tools.common import plots
from swa_vllm.tools.common.arguments import (
    add_full_attention_layers_argument,
    add_phase_argument,
    add_sink_tokens_argument,
    add_window_size_argument,
)
from swa_vllm.tools.common.engine_arguments import add_engine_arguments

STREAM_TIMES = 33  # trained lengths of a stream, unless --tokens says otherwise


def _add_ppl_arguments(parser: argparse.ArgumentParser) -> None:
    """Perplexity of a text under windows and sinks, and the pages of the pool that a request takes.

    The text is cut into pieces of --length tokens; every token but a piece's first is predicted.
    "Pages" and "MiB a request" are what a request holds that decodes behind a piece, in all layers,
    with vLLM's KV groups and their padding; "most pages" what it held at once while its prompt was
    computed. "full" is full attention in every layer; --full-attention-layers keeps layers full in
    the other rows.

    With --prompt-tokens N, the first N tokens of a piece are a prompt, and the others are forced as
    generated tokens; they alone are scored. --phase prefill and decode need it: scored as a prompt,
    every token would have the window, or none.
    """
    _add_setup_arguments(parser)
    parser.add_argument(
        "--text",
        type=Path,
        required=True,
        metavar="FILE",
        help="the text, in UTF-8 (default: none)",
    )
    parser.add_argument(
        "--window",
        default="full,1024",
        metavar="TOKENS,...",
        help="tokens that a sliding layer sees, the newest included, or full",
    )
    parser.add_argument(
        "--sink-tokens",
        default="0,4",
        metavar="TOKENS,...",
        help="first tokens of a text that sliding layers always see, each with each window",
    )
    add_full_attention_layers_argument(parser)
    parser.add_argument(
        "--position-shift",
        action="store_true",
        help="sinks are seen before the window (default: where they are)",
    )
    parser.add_argument(
        "--length", type=int, default=2048, metavar="TOKENS", help="tokens of a piece"
    )
    add_phase_argument(parser)
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help="first tokens of a piece, its prompt; the others are forced as generated tokens, and "
        "they alone are scored (default: all are prompt, and scored)",
    )
    plots.add_plot_argument(parser)


def _add_needle_arguments(parser: argparse.ArgumentParser) -> None:
    """Recall of a number that a long text mentions once, by where it stands.

    Each prompt is made-up prose with one sentence such as "The secret number of Lisbon is 7342.",
    and ends in "The secret number of Lisbon is". Recall is the part of greedy answers that begin
    with the very number. "Depth" is where the sentence stands: 0 at the start, 1 at the end;
    "distance" is how many tokens before the answer the number stood.

    With --phase prefill, generated tokens see everything, but the first is predicted by the
    prompt's last token, which has the window. That first token is the blank before the number, and
    is easily guessed. With --digit-first the prompt ends in the blank, and the first token is a
    digit.

    With --generated N, the last N tokens of each text, the question among them, are forced as
    generated tokens: so the question is asked after a long answer, and the number stands in the
    prompt. That is what --phase decode is for.

    What the window gains is printed beside what it forgets: the time to the first token of a prompt
    of each length, which nothing else runs beside.
    """
    _add_setup_arguments(parser)
    add_window_size_argument(parser, 1024)
    add_sink_tokens_argument(parser, 4)
    add_full_attention_layers_argument(parser)
    add_phase_argument(parser)
    parser.add_argument(
        "--digit-first",
        action="store_true",
        help="the first token of an answer is a digit (default: the blank before it)",
    )
    parser.add_argument(
        "--generated",
        type=int,
        default=0,
        metavar="N",
        help="last tokens of a text that are forced as generated",
    )
    parser.add_argument(
        "--lengths", default="1024,2048,4096", metavar="TOKENS,...", help="lengths of the texts"
    )
    parser.add_argument(
        "--depths", type=int, default=5, metavar="N", help="places of the number, from start to end"
    )
    parser.add_argument(
        "--trials", type=int, default=4, metavar="N", help="texts of each length and depth"
    )
    plots.add_plot_argument(parser)


def _add_stream_arguments(parser: argparse.ArgumentParser) -> None:
    """One request many times longer than its window and than what the model was trained on.

    The first half of the stream is a prompt; the second half is decoded, token by token, with each
    token forced and scored. The table has the perplexity of every stretch and the pages that the
    request held in it. The stream ends as it began, so one passage is scored twice: half a trained
    length behind the start, and at the very end.

    With --phase prefill the decoded half has no window: it sees the whole stream and keeps its
    pages. With --phase decode it alone has one, and sees the whole prompt beside it.

    Arms: "shifted" has sinks just before the window, wherever it is (position_shift), "sinks" has
    them where they are, "window" has none, "full" is full attention.
    """
    _add_setup_arguments(parser)
    parser.add_argument(
        "--tokens", type=int, help=f"tokens of the stream (default: {STREAM_TIMES} trained lengths)"
    )
    add_window_size_argument(parser, 1024)
    add_sink_tokens_argument(parser, 4)
    add_full_attention_layers_argument(parser)
    add_phase_argument(parser)
    parser.add_argument(
        "--arms", default="shifted,sinks", metavar="ARM,...", help="what is compared"
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8, repeated as needed (default: made-up prose)",
    )
    plots.add_plot_argument(parser)


def _add_setup_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`swa_vllm.tools.engines.setup.setup_of` reads."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint: a directory or a hub's name")
    add_engine_arguments(parser, dtype="auto", max_num_batched_tokens=512, block_size="vLLM's")


# What adds flags, whose docstring is the help text, and an example.
EVALUATIONS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "ppl": (
        _add_ppl_arguments,
        "Qwen/Qwen3-0.6B --text book.txt --window full,1024,512 --sink-tokens 0,4",
    ),
    "needle": (
        _add_needle_arguments,
        "Qwen/Qwen3-0.6B --window 1024 --sink-tokens 4 --lengths 1024,4096,8192",
    ),
    "stream": (
        _add_stream_arguments,
        "Qwen/Qwen3-0.6B --tokens 200000 --window 1024 --sink-tokens 4",
    ),
}
