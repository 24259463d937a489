"""The text of a trace, on a terminal or in a pipe."""

import shutil
import sys
from collections.abc import Sequence
from itertools import pairwise

from swa_backend.pages import ceil_div
from swa_backend.table import format_table
from swa_vllm.tools.common.terminal import BLUE, GREEN, GREY, YELLOW, paint
from swa_vllm.tools.trace.recording import Row, Trace

_LEVELS, _PLAIN_LEVELS = " ▁▂▃▄▅▆▇█", " .:-=+*%#"
# The kind that most of a request's pages are of.
_COLOURS = {"prefill": YELLOW, "window": BLUE, "sink": GREEN}
_HEADER = ("request", "prompt", "window", "sink", "prefill", "held", "freed", "full attention")


def print_trace(title: str, trace: Trace) -> None:
    """Print a line for each request, two for the pool, and a table of what is held at most."""
    num_steps = len(trace.used)
    width = min(num_steps, max(20, shutil.get_terminal_size((100, 24)).columns - 20))
    most = max(max(row.held) for row in trace.rows)
    legend = ", ".join(paint(kind, colour) for kind, colour in _COLOURS.items())
    print(
        f"{title}\n\npages held over {num_steps} steps ({most} at the height of a line): {legend}"
    )
    for index, row in enumerate(trace.rows):
        print(f"{f'request {index}':14}  {_draw_traced_request(row, width, most)}")
    print(f"\npages of the pool ({trace.num_pages} at the height of a line)")
    print(
        f"{'full attention':14}  {paint(_draw_trace_levels(trace.full, width, trace.num_pages), GREY)}"
    )
    print(f"{'in use':14}  {paint(_draw_trace_levels(trace.used, width, trace.num_pages), BLUE)}")
    beyond = sum(full > trace.num_pages for full in trace.full)
    print(f"at most {max(trace.used)} pages; full attention would hold {max(trace.full)}", end="")
    print(f", more than there are in {beyond} steps\n" if beyond else "\n")
    print(
        format_table(_HEADER, [_trace_peak_row(index, row) for index, row in enumerate(trace.rows)])
    )


def _trace_peak_row(index: int, row: Row) -> list[object]:
    """Make a row of the table: the most that the request has of each kind in a step."""
    kinds = (row.window, row.sink, row.prefill, row.held, row.gone, row.full)
    return [index, row.num_prompt, *map(max, kinds)]


def _draw_traced_request(row: Row, width: int, most: int) -> str:
    """Draw the pages of a request over time, in the colour of the most frequent kind."""
    cells = zip(
        _draw_trace_levels(row.held, width, most),
        *(_peaks_over_time(getattr(row, kind), width) for kind in _COLOURS),
        strict=True,
    )
    colours = list(_COLOURS.values())
    return "".join(paint(level, colours[kinds.index(max(kinds))]) for level, *kinds in cells)


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
