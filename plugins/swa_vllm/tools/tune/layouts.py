"""What is worth trying within a limit of bytes: windows, sinks, numbers of full layers, pairs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

from swa_backend.window import Phase
from swa_vllm.tools.tune.candidates import Candidate, Layout
from swa_vllm.tools.tune.sizes import Sizer

_SMALLEST_WINDOW = 32
_COUNTS = 4  # of full layers, for each window
# Of two windows: which part of the sliding layers has the wider, and the narrower's size.
_WIDE_PARTS = (1 / 3, 1 / 2, 2 / 3)
_NARROW_PARTS = (1 / 2, 1 / 4)


def windows_to_try(longest: int) -> list[int]:
    """List the windows below ``longest``: powers of two, and those half-way between."""
    windows, window = [], _SMALLEST_WINDOW
    while window < longest:
        windows += [w for w in (window, window * 3 // 2) if w < longest]
        window *= 2
    return windows


def counts_of_full_layers(sizer: Sizer, layout: Layout, limit: int) -> list[int]:
    """List how many layers may be full within ``limit`` bytes for such a layout, the most first.

    A count is left out where more full layers take no more bytes, for KV groups are padded; but not
    with a window in the prompt only, where bytes are all the same.
    """
    counts, least = [], limit + 1
    for count in reversed(range(sizer.num_layers)):
        num_bytes = sizer.num_bytes(replace(layout, num_full=count).with_full_layers(range(count)))
        if num_bytes < least:
            counts.append(count)
            least = num_bytes if layout.phase is not Phase.PREFILL else least
    return counts


def widest_window(sizer: Sizer, layout: Layout, longest: int, limit: int) -> int:
    """Find the widest window of whole pages within ``limit`` bytes, or 0, for such a layout."""
    fits = partial(_fits, sizer, partial(_with_window, layout), limit)
    return sizer.limits.block_size * _largest_that(fits, (longest - 1) // sizer.limits.block_size)


def _with_window(layout: Layout, window: int) -> Candidate:
    return replace(layout, window=window).with_full_layers(range(layout.num_full))


def _largest_that(holds: Callable[[int], bool], most: int) -> int:
    """Find the largest number up to ``most`` for which a monotonic property holds, or 0."""
    least = 0
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if holds(middle) else (least, middle - 1)
    return least


def layouts_to_try(
    sizer: Sizer,
    sinks: Iterable[int],
    longest: int,
    limit: int,
    *,
    by_loss: bool,
    phase: Phase = Phase.BOTH,
) -> list[Layout]:
    """List what is to be tried within ``limit`` bytes.

    Args:
        longest: most tokens of which some have a window, which it must be below: of a request, or
            of its prompt or answer where the phase has the window there only.
        by_loss: as many layers as can be are full, or the fewest: full layers cost a model that was
            trained with a window. Otherwise numbers between are tried too.
    """
    if phase is Phase.DECODE:
        sinks = (0,)  # they are in the prompt, all of which stays
    sinks = list(sinks)
    layouts = dict.fromkeys(
        Layout(window, own, count, phase)
        for own in sinks
        for window in windows_to_try(longest - own)
        for count in _spread(
            counts_of_full_layers(sizer, Layout(window, own, 0, phase), limit), by_loss
        )
    )
    if phase is Phase.PREFILL:  # a window of any width fits
        return list(layouts)
    for own in sinks:
        widest = [
            replace(layout, window=widest_window(sizer, layout, longest - own, limit))
            for layout in (Layout(0, own, count, phase) for count in range(sizer.num_layers))
        ]
        # Neither a wider window nor more full layers can be had without giving up the other.
        layouts |= dict.fromkeys(
            layout
            for layout in widest
            if layout.window
            and not any(w.window >= layout.window and w.num_full > layout.num_full for w in widest)
        )
    return list(layouts)


def _spread(counts: Sequence[int], by_loss: bool) -> list[int]:
    if by_loss:
        return [*counts[:1], *counts[1:][-1:]]
    if len(counts) <= _COUNTS:
        return list(counts)
    last = len(counts) - 1
    return [counts[round(step * last / (_COUNTS - 1))] for step in range(_COUNTS)]


def two_windows_to_try(
    sizer: Sizer, candidate: Candidate, order: Sequence[int], longest: int, limit: int | None
) -> list[Candidate]:
    """Give some of a candidate's sliding layers a narrower window, and the others a wider one.

    Args:
        order: all layers, those first that are to see most.
        longest: what a window must be below.
        limit: bytes, for which the wider window is as wide as can be; None leaves the others as
            they are, so that the candidate takes less.
    """
    page, window = sizer.limits.block_size, candidate.window or 0
    sliding = [layer for layer in order if layer not in set(candidate.full_layers)]
    found = dict[Candidate, None]()
    for part, size in product(_WIDE_PARTS, _NARROW_PARTS):
        narrow = int(size * window) // page * page
        num_wide = round(part * len(sliding))
        if not narrow or not 0 < num_wide < len(sliding):
            continue
        make = partial(_two_windows, candidate, sliding[:num_wide], narrow, sizer.num_layers)
        if limit is None:
            found[make(window)] = None
            continue
        fits = partial(_fits, sizer, make, limit)
        wide = page * _largest_that(fits, (longest - 1) // page)
        if wide > window:
            found[make(wide)] = None
    return list(found)


def _two_windows(
    candidate: Candidate, wide_layers: Sequence[int], narrow: int, num_layers: int, wide: int
) -> Candidate:
    windows = [0 if layer in candidate.full_layers else narrow for layer in range(num_layers)]
    for layer in wide_layers:
        windows[layer] = wide
    return replace(candidate, window=wide, by_layer=tuple(windows))


def _fits(sizer: Sizer, make: Callable[[int], Candidate], limit: int, pages: int) -> bool:
    return sizer.num_bytes(make(pages * sizer.limits.block_size)) <= limit
