"""Page arithmetic of a window: which pages of a request a query can still see (no torch)."""

from swa_backend.window import first_visible


def ceil_div(numerator: int, denominator: int) -> int:
    """``numerator / denominator`` rounded up, for non-negative integers."""
    return -(-numerator // denominator)


def num_dead_pages(num_computed_tokens: int, window: int | None, page_size: int) -> int:
    """How many leading pages no later query sees once ``num_computed_tokens`` are computed.

    The next query sits at position ``num_computed_tokens`` and every later one sees less of the
    past, so a page is dead iff all of it lies below that query's window.
    """
    return first_visible(num_computed_tokens, window) // page_size


def max_window_pages(window: int, page_size: int) -> int:
    """Most pages that a decoding request can hold: ``ceil((W-1)/B) + 1``.

    The window of one query, wherever it starts inside a page.
    """
    return ceil_div(window - 1, page_size) + 1
