"""The text of a trace, on a terminal or in a pipe."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise

from swa_backend.pages import ceil_div
from swa_backend.table import format_table
from swa_vllm.tools.common.terminal import BLUE, GREEN, GREY, YELLOW, paint
from swa_vllm.tools.trace.recording import Row, Trace

_LEVELS, _PLAIN_LEVELS = " ▁▂▃▄▅▆▇█", " .:-=+*%#"
# The kind that most of a request's pages are of.
_COLOURS = {"prefill": YELLOW, "window": BLUE, "sink": GREEN, "prompt": GREEN}


def print_trace(title: str, trace: Trace) -> None:
    """Print a line for each request, two for the pool, and a table of what is held at most."""
    num_steps = len(trace.used)
    width = min(num_steps, max(20, shutil.get_terminal_size((100, 24)).columns - 20))
    most = max(max(row.held) for row in trace.rows)
    colours = {kind: colour for kind, colour in _COLOURS.items() if kind in trace.kinds}
    legend = ", ".join(paint(kind, colour) for kind, colour in colours.items())
    print(
        f"{title}\n\npages held over {num_steps} steps ({most} at the height of a line): {legend}"
    )
    for index, row in enumerate(trace.rows):
        print(f"{f'request {index}':14}  {_draw_traced_request(row, colours, width, most)}")
    print(f"\npages of the pool ({trace.num_pages} at the height of a line)")
    for name, levels, colour in (
        ("full attention", trace.full, GREY),
        ("in use", trace.used, BLUE),
    ):
        print(f"{name:14}  {paint(_draw_trace_levels(levels, width, trace.num_pages), colour)}")
    beyond = sum(full > trace.num_pages for full in trace.full)
    print(f"at most {max(trace.used)} pages; full attention would hold {max(trace.full)}", end="")
    print(f", more than there are in {beyond} steps\n" if beyond else "\n")
    header = ("request", "prompt tokens", *trace.kinds, "held", "freed", "full attention")
    print(
        format_table(header, [_peaks(*numbered, trace.kinds) for numbered in enumerate(trace.rows)])
    )


def _peaks(index: int, row: Row, kinds: Sequence[str]) -> list[object]:
    """Make a row of the table: the most that the request has of each kind in a step."""
    steps = (*(getattr(row, kind) for kind in kinds), row.held, row.gone, row.full)
    return [index, row.num_prompt, *map(max, steps)]


def _draw_traced_request(row: Row, colours: Mapping[str, int], width: int, most: int) -> str:
    """Draw the pages of a request over time, in the colour of the most frequent kind."""
    cells = zip(
        _draw_trace_levels(row.held, width, most),
        *(_peaks_over_time(getattr(row, kind), width) for kind in colours),
        strict=True,
    )
    paints = list(colours.values())
    return "".join(paint(level, paints[kinds.index(max(kinds))]) for level, *kinds in cells)


def _draw_trace_levels(values: Sequence[int], width: int, most: int) -> str:
    """Draw ``width`` characters, each as high as the most in its part of the time."""
    encoding = sys.stdout.encoding or ""
    levels = _LEVELS if encoding.lower().startswith("utf") else _PLAIN_LEVELS
    top = len(levels) - 1
    # Rounded up: what is there is seen.
    return "".join(
        levels[min(top, ceil_div(value * top, most))] for value in _peaks_over_time(values, width)
    )


def _peaks_over_time(values: Sequence[int], width: int) -> list[int]:
    """Find the most in each of ``width`` parts of the time."""
    edges = [index * len(values) // width for index in range(width + 1)]
    return [max(values[a:b]) for a, b in pairwise(edges)]
