"""The pages that a request holds, step by step, from sizes alone (imports no engine, no torch).

:class:`RequestPages` counts the pages of a request as the page manager allocates and frees them.
Both ask :mod:`swa_backend.pages` which pages are needed.
"""

from dataclasses import dataclass

from swa_backend.pages import WindowPages, ceil_div


@dataclass(frozen=True)
class PagePolicy:
    """Rules by which the pages of one layer are managed.

    Attributes:
        page_size: tokens a page.
        window: arithmetic of a sliding layer; None for full attention, which keeps every page.
        stores_all: whether a chunk's pages are all stored, as vLLM does, or survivors only.
        spare_tokens: slots behind the newest token.
        frees_by_schedule: whether a page is free once no step that is yet to be scheduled reads it,
            though one in flight may; otherwise once all steps that read it are settled.
        cap: most pages that admission charges a request for; None for no limit.
    """

    page_size: int
    window: WindowPages | None = None
    stores_all: bool = True
    spare_tokens: int = 0
    frees_by_schedule: bool = False
    cap: int | None = None

    def num_entries(self, num_tokens: int) -> int:
        """Count the block table's entries, pages or holes, of a request of ``num_tokens``."""
        return ceil_div(num_tokens + self.spare_tokens, self.page_size)

    def charge(self, num_tokens: int) -> int:
        """Count the pages that must be free when a request of ``num_tokens`` is admitted."""
        entries = self.num_entries(num_tokens)
        return entries if self.cap is None else min(self.cap, entries)


class RequestPages:
    """Pages of one request in one layer.

    Attributes:
        live: number of pages that the request holds now.
    """

    __slots__ = ("_death", "_num_entries", "_policy", "_ranges", "live")

    def __init__(self, policy: PagePolicy) -> None:
        self._policy = policy
        self._num_entries = 0
        self._ranges: list[range] = []
        self._death = 0  # tokens below the next query that free the next page
        self.live = 0

    def settle(self, num_settled: int, num_scheduled: int) -> int:
        """Free the pages that no later step reads; returns how many.

        Args:
            num_settled: tokens of the settled steps.
            num_scheduled: tokens of all steps so far, those in flight included.
        """
        window = self._policy.window
        if window is None:
            return 0
        next_query = num_settled
        if self._policy.frees_by_schedule:
            next_query = max(next_query, num_scheduled - window.rollback_tokens)
        if next_query < self._death:
            return 0
        dead = window.dead(next_query)
        kept = []
        for pages in self._ranges:
            kept.append(range(pages.start, min(pages.stop, dead.start)))
            kept.append(range(max(pages.start, dead.stop), pages.stop))
        self._ranges = [pages for pages in kept if pages]
        first_left = max(dead.stop, window.first_live(next_query))
        self._death = (first_left + 1) * window.page_size + window.window - 1
        before, self.live = self.live, sum(map(len, self._ranges))
        return before - self.live

    def missing(self, num_tokens: int) -> int:
        """Count the pages that a step ending before ``num_tokens`` has to allocate."""
        entries = self._policy.num_entries(num_tokens)
        if entries <= self._num_entries:
            return 0
        return entries - self._num_entries - len(self._holes(num_tokens))

    def take(self, num_tokens: int) -> None:
        """Allocate the pages that :meth:`missing` counts."""
        entries = self._policy.num_entries(num_tokens)
        if entries <= self._num_entries:
            return
        holes = self._holes(num_tokens)
        stop = holes.start if holes else entries
        self._add(range(self._num_entries, stop))
        if holes:
            self._add(range(holes.stop, entries))
        self._num_entries = entries

    def _add(self, pages: range) -> None:
        self.live += len(pages)
        if self._ranges and self._ranges[-1].stop == pages.start:
            self._ranges[-1] = range(self._ranges[-1].start, pages.stop)
        elif pages:
            self._ranges.append(pages)

    def _holes(self, num_tokens: int) -> range:
        window = self._policy.window
        if window is None or self._policy.stores_all:
            return range(0)
        return window.holes(self._num_entries, num_tokens)
