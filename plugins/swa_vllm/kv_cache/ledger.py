"""What the requests of a KV group hold: counted for metrics, and logged at DEBUG level."""

from dataclasses import dataclass, field

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from swa_backend.metrics import PageCounts
from swa_backend.pages import WindowPages
from swa_vllm.metrics.board import Owner, PageBoard

logger = init_logger(f"vllm.{__name__}")

# More pages than any request holds.
_UNLIMITED = 2**62


@dataclass
class Held:
    """Pages of one request: how many are real, and below which index all are dead.

    Attributes:
        pages: page arithmetic of the request.
        most: pages that it is promised.
        decoding: among these numbers of held pages only that of window pages differs.
        num_scheduled: tokens of all its steps so far, those in flight included.
    """

    pages: WindowPages
    most: int
    decoding: range
    live: int = 0
    first_kept: int = 0
    num_scheduled: int = 0
    # Of the step being scheduled: its holes, the first of its places in the table, and the list
    # that the scheduler sends to the workers.
    holes: range = field(default=range(0))
    first_new: int = 0
    new_blocks: list[KVCacheBlock] = field(default_factory=list)
    # Pages that the prefix cache gave; None once what it lost has been counted.
    num_hit_blocks: int | None = 0


class PageLedger:
    """Pages of the live requests of one KV group."""

    def __init__(
        self,
        owner: Owner,
        *,
        window: int,
        sink_tokens: int,
        num_ahead_tokens: int,
        pinned: str = "live_sink",
    ) -> None:
        """Start at zero.

        Args:
            num_ahead_tokens: slots that a step takes beyond its own tokens.
            pinned: the field of :class:`PageCounts` for pages below the window that stay.
        """
        self._group = owner.group
        self._num_ahead_tokens = num_ahead_tokens
        self._held: dict[str, Held] = {}
        self._board = PageBoard(owner)
        self._board.add("window_tokens", window)
        self._board.add("sink_tokens", sink_tokens)
        # Fields of PageCounts, in the order of WindowPages.kinds().
        self._live = ("live_window", pinned, "live_prefill")

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._held

    def __getitem__(self, request_id: str) -> Held:
        return self._held[request_id]

    def get(self, request_id: str) -> Held | None:
        """What a request holds, if it was admitted."""
        return self._held.get(request_id)

    def snapshot(self) -> PageCounts:
        """Counts since the engine started."""
        return self._board.snapshot()

    def admit_request(self, request_id: str, pages: WindowPages, most: int) -> Held:
        """Begin to count a request that holds nothing yet, and is promised ``most`` pages."""
        held = self._held[request_id] = Held(pages, most, self._decoding(pages))
        self._board.add("requests_live", 1)
        self._board.add("reserved", most)
        return held

    def change_pages(self, request_id: str, pages: WindowPages, most: int) -> None:
        """Count what a request holds by another arithmetic, and promise it ``most`` pages."""
        held = self._held[request_id]
        num_live = held.live
        self._count_held(held, -num_live)
        self._board.add("reserved", most - held.most)
        held.pages, held.most, held.decoding = pages, most, self._decoding(pages)
        self._count_held(held, num_live)

    def _decoding(self, pages: WindowPages) -> range:
        num_window, num_sinks, _ = pages.kinds(_UNLIMITED, self._num_ahead_tokens)
        return range(num_sinks, num_sinks + num_window + 1)

    def count_hit(self, request_id: str, num_pages: int, num_tokens: int) -> None:
        """Count a prefix cache hit of ``num_pages`` real pages for ``num_tokens`` tokens."""
        self._count_held(self._held[request_id], num_pages)
        self._board.add("prefix_hit_tokens", num_tokens)

    def count_taken(self, held: Held, num_pages: int) -> None:
        """Count pages that a request took from the pool."""
        self._count_held(held, num_pages)
        self._board.add("allocated", num_pages)
        self._board.raise_to("peak_live_per_request", held.live)

    def count_granted(self, request_id: str, num_pages: int) -> None:
        """Count pages that a request took for the prefix cache alone."""
        self.count_taken(self._held[request_id], num_pages)
        self._log_pages(request_id, num_pages, "of %s are stored for the prefix cache")

    def count_skipped(self, request_id: str, num_pages: int) -> None:
        """Count pages that a prefill chunk passed over."""
        self._board.add("skipped", num_pages)
        self._log_pages(request_id, num_pages, "of %s need not be stored")

    def count_lost_prefix(self, num_tokens: int) -> None:
        """Count tokens that missed the prefix cache because pages had been skipped."""
        self._board.add("prefix_lost_tokens", num_tokens)

    def count_left_window(self, request_id: str, num_pages: int) -> None:
        """Count pages that were given back because no later token sees them."""
        self._count_held(self._held[request_id], -num_pages)
        self._board.add("freed_by_window", num_pages)
        self._log_pages(request_id, num_pages, "of %s left its window")

    def end_request(self, request_id: str) -> None:
        """Count all that a request holds as given back, if it was admitted."""
        held = self._held.pop(request_id, None)
        if held is None:
            return
        self._log_pages(request_id, held.live, "were held by %s until now")
        self._count_held(held, -held.live)
        self._board.add("requests_live", -1)
        self._board.add("reserved", -held.most)

    def _count_held(self, held: Held, num_pages: int) -> None:
        before, held.live = held.live, held.live + num_pages
        if before in held.decoding and held.live in held.decoding:
            self._board.add("live_window", num_pages)
            return
        kinds = zip(self._kinds(held, before), self._kinds(held, held.live), strict=True)
        for name, (old, new) in zip(self._live, kinds, strict=True):
            self._board.add(name, new - old)

    def _kinds(self, held: Held, num_held: int) -> tuple[int, int, int]:
        return held.pages.kinds(num_held, self._num_ahead_tokens)

    def _log_pages(self, request_id: str, num_pages: int, what: str) -> None:
        if num_pages:
            logger.debug(f"SWA group %d: %d pages {what}", self._group, num_pages, request_id)
