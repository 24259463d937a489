"""What the requests of a KV group hold: counted for metrics, and logged at DEBUG level."""

from dataclasses import dataclass, field

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from swa_backend.metrics import PageCounts
from swa_vllm.kv_cache.spec import SWASpec
from swa_vllm.metrics.board import Owner, PageBoard

logger = init_logger(f"vllm.{__name__}")

# Fields of PageCounts, in the order of WindowPages.kinds().
_LIVE = ("live_window", "live_sink", "live_prefill")


@dataclass
class Held:
    """Pages of one request: how many are real, and below which index all are dead."""

    live: int = 0
    first_kept: int = 0
    # Of the step being scheduled: its holes, the first of its places in the table, and the list
    # that the scheduler sends to the workers.
    holes: range = field(default=range(0))
    first_new: int = 0
    new_blocks: list[KVCacheBlock] = field(default_factory=list)
    # Pages that the prefix cache gave; None once what it lost has been counted.
    num_hit_blocks: int | None = 0


class PageLedger:
    """Pages of the live requests of one KV group."""

    def __init__(self, spec: SWASpec, group: int, pool_size: int, max_per_request: int) -> None:
        """Start at zero; a request is promised ``max_per_request`` pages of ``pool_size``."""
        self._group = group
        self._pages = spec.pages
        self._num_ahead_tokens = spec.num_ahead_tokens
        self._max_per_request = max_per_request
        self._held: dict[str, Held] = {}
        self._board = PageBoard(Owner(spec.instance_id, spec.engine_index, group))
        self._board.add("window_tokens", spec.sliding_window)
        self._board.add("sink_tokens", spec.storage.sink_tokens)
        # Among these numbers of held pages only that of window pages differs.
        most, num_sinks, _ = self._page_kinds(pool_size)
        self._decoding = range(num_sinks, num_sinks + most + 1)

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

    def admit_request(self, request_id: str) -> Held:
        """Begin to count a request that holds nothing yet."""
        held = self._held[request_id] = Held()
        self._board.add("requests_live", 1)
        self._board.add("reserved", self._max_per_request)
        return held

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
        self._board.add("reserved", -self._max_per_request)

    def _count_held(self, held: Held, num_pages: int) -> None:
        before, held.live = held.live, held.live + num_pages
        if before in self._decoding and held.live in self._decoding:
            self._board.add("live_window", num_pages)
            return
        kinds = zip(self._page_kinds(before), self._page_kinds(held.live), strict=True)
        for name, (old, new) in zip(_LIVE, kinds, strict=True):
            self._board.add(name, new - old)

    def _page_kinds(self, num_held: int) -> tuple[int, int, int]:
        return self._pages.kinds(num_held, self._num_ahead_tokens)

    def _log_pages(self, request_id: str, num_pages: int, what: str) -> None:
        if num_pages:
            logger.debug(f"SWA group %d: %d pages {what}", self._group, num_pages, request_id)
