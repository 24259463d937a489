"""Page arithmetic of a window: which pages of a request are needed, and how many (no torch).

A page holds ``page_size`` consecutive tokens of one layer. Of a request's pages, in the order of
positions,

* *sink* pages hold the first ``sink_tokens`` tokens and stay as long as the request;
* *dead* pages lie wholly below the window of the next query, so no later query sees them;
* *survivors* of a step are the last pages it leaves behind, all that any later query can see.
  The others that it passes over are *holes*: a long chunk need not store them at all.

Scheduler, planner, benchmarks and tests ask this module and do not derive it again.
"""

from dataclasses import dataclass
from functools import cached_property

from swa_backend.window import first_visible


def ceil_div(numerator: int, denominator: int) -> int:
    """Divide and round up."""
    return -(-numerator // denominator)


def max_partial_tokens(page_size: int) -> int:
    """Most tokens of a prompt's end and of a window's head that fill no page of their own."""
    return 2 * (page_size - 1)


def max_pages_spanned(num_tokens: int, page_size: int) -> int:
    """Most pages that ``num_tokens`` consecutive tokens touch, wherever the first one lies."""
    return ceil_div(num_tokens - 1, page_size) + 1 if num_tokens > 0 else 0


@dataclass(frozen=True)
class WindowPages:
    """Pages of one request in one layer.

    Attributes:
        window: tokens a query sees, itself included.
        page_size: tokens a page.
        sink_tokens: leading tokens that every query sees.
        rollback_tokens: how far below a step's end the next query may start, because the step's
            last tokens were speculative and may be rejected.
        drops_last_hit: whether a prefix cache hit gives back its last page, as EAGLE's does.
    """

    window: int
    page_size: int
    sink_tokens: int = 0
    rollback_tokens: int = 0
    drops_last_hit: bool = False

    @property
    def num_sink_pages(self) -> int:
        """Leading pages that hold sink tokens."""
        return ceil_div(self.sink_tokens, self.page_size)

    @property
    def num_hit_pages(self) -> int:
        """Pages in a row that vLLM's prefix cache must have to serve a prompt up to their end."""
        return ceil_div(self.window - 1, self.page_size) + self.drops_last_hit

    @cached_property
    def max_survivors(self) -> int:
        """Window pages that a step leaves behind at most: ``ceil((W-1)/B) + 1`` without drafts.

        This is also the most that a decoding request holds.
        """
        seen = ceil_div(self.window - 1 + self.rollback_tokens, self.page_size)
        return max(seen, self.num_hit_pages) + 1

    def kinds(self, num_held: int, num_ahead_tokens: int = 0) -> tuple[int, int, int]:
        """Say what the pages that a request holds are for.

        Args:
            num_ahead_tokens: slots that a step takes beyond its own tokens.

        Returns:
            How many are window pages, no more than decoding needs; sink pages; and *prefill* pages
            beyond both, held for a chunk, for steps in flight or for the prefix cache.
        """
        num_sinks = min(num_held, self.num_sink_pages)
        decoding = self.max_survivors + ceil_div(num_ahead_tokens, self.page_size)
        num_window = min(num_held - num_sinks, decoding)
        return num_window, num_sinks, num_held - num_sinks - num_window

    def first_live(self, num_computed_tokens: int) -> int:
        """First page inside the window of the next query, at ``num_computed_tokens``."""
        return first_visible(num_computed_tokens, self.window) // self.page_size

    def dead(self, num_computed_tokens: int) -> range:
        """Pages that no later query sees once ``num_computed_tokens`` are computed for good."""
        first = self.num_sink_pages
        return range(first, max(first, self.first_live(num_computed_tokens)))

    def first_survivor(self, num_tokens: int) -> int:
        """First window page that a step ending before position ``num_tokens`` must leave behind.

        It is counted back from the last token's page and not from its window: if the same text
        comes again, vLLM finds it in the prefix cache by the :attr:`num_hit_pages` below that one.
        """
        last = (num_tokens - 1) // self.page_size
        return max(0, last - self.max_survivors + 1)

    def holes(self, num_pages: int, num_tokens: int) -> range:
        """Pages that a step ending before ``num_tokens`` passes over without storing them.

        Args:
            num_pages: pages that the request's table has before the step.
        """
        first = max(num_pages, self.num_sink_pages)
        return range(first, max(first, self.first_survivor(num_tokens)))

    def max_held(self, num_steps: int, num_in_flight_tokens: int, lookahead_tokens: int = 0) -> int:
        """Most pages that a request of any length holds; without rollback the exact maximum.

        These are the pages that the next query sees, and those that each step leaves behind that
        is scheduled but not yet settled; or one unbroken span, if chunks are too short for holes.

        Args:
            num_steps: steps in flight at once.
            num_in_flight_tokens: tokens of all steps in flight together.
            lookahead_tokens: slots that a step takes beyond its own tokens.
        """
        # The page of the next query is held even where a window of one sees nothing before it.
        settled = max(1, self.window - 1)
        per_step = self.max_survivors + ceil_div(lookahead_tokens, self.page_size)
        with_holes = (
            self.num_sink_pages
            + max_pages_spanned(settled + self.rollback_tokens + lookahead_tokens, self.page_size)
            + num_steps * per_step
        )
        return min(with_holes, self.max_held_without_holes(num_in_flight_tokens, lookahead_tokens))

    def max_held_without_holes(self, num_in_flight_tokens: int, lookahead_tokens: int = 0) -> int:
        """As :meth:`max_held`, of a request whose chunks store every page."""
        in_use = self.window - 1 + num_in_flight_tokens + lookahead_tokens
        return self.num_sink_pages + max_pages_spanned(in_use, self.page_size)

    def charge(
        self, num_steps: int, num_in_flight_tokens: int, lookahead_tokens: int, longest: int
    ) -> int:
        """Pages that a request of at most ``longest`` tokens, slots ahead included, may ever hold.

        Start-up sizing and admission both count with this number; see :meth:`max_held`.
        """
        held = self.max_held(num_steps, num_in_flight_tokens, lookahead_tokens)
        return min(held, ceil_div(longest, self.page_size))
