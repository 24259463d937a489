"""Page manager of a KV group of windowed layers, in the engine core.

A request's table names one page for every ``block_size`` positions. Entries that no later token
sees are the null block: those that left the window, and the holes that a long prefill chunk leaves
(:mod:`swa_backend.pages` says which). Sink pages stay, and a prefix cache hit has to have them.

Without speculation and KV connectors, a page is free as soon as no step that is yet to be scheduled
reads it. Steps in flight may still read it: whoever takes it writes it in a later step, and a
worker runs its steps in order. So a request never holds the survivors of two chunks.

With prefix caching, holes that other prompts may hit are filled while the pool has room.
Such *granted* pages are never counted as needed, are freed at the request's next schedule, and
stay in the prefix cache until the pool reuses them.
"""

from collections.abc import Sequence

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from swa_backend.lost_prefix import SkippedPages
from swa_backend.metrics import PageCounts
from swa_backend.options import PrefillPages
from swa_backend.pages import ceil_div
from swa_backend.window import first_visible
from swa_vllm.kv_cache import live_managers
from swa_vllm.kv_cache.ledger import Held, PageLedger
from swa_vllm.kv_cache.prefix_hits import SinkPrefixHits
from swa_vllm.kv_cache.spec import SWASpec
from swa_vllm.metrics.board import Owner

logger = init_logger(f"vllm.{__name__}")


class SWAManager(SinkPrefixHits):
    """vLLM's sliding window manager, holding what the window needs and not the prefill chunk."""

    def __init__(self, kv_cache_spec: SWASpec, **kwargs: object) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._pages = kv_cache_spec.pages
        storage = kv_cache_spec.storage
        self._frees_by_schedule = kv_cache_spec.frees_by_schedule
        self._spare_tokens = storage.spare_tokens
        self._stores_all = storage.prefill_pages is PrefillPages.ALL
        self._grants = self.enable_caching and storage.prefill_pages is PrefillPages.AUTO
        self._held = PageLedger(
            Owner(kv_cache_spec.instance_id, kv_cache_spec.engine_index, self.kv_cache_group_id),
            window=kv_cache_spec.sliding_window,
            sink_tokens=storage.sink_tokens,
            num_ahead_tokens=kv_cache_spec.num_ahead_tokens,
        )
        self._skipped_pages = SkippedPages(self.block_pool.num_gpu_blocks)
        if kv_cache_spec.poison_key is not None:
            live_managers.add_manager(kv_cache_spec.poison_key, self)

    def snapshot(self) -> PageCounts:
        """Counts since the engine started."""
        return self._held.snapshot()

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        num_tokens += self._spare_tokens
        if apply_admission_cap and self.max_admission_blocks_per_request is not None:
            return self._admission_charge(
                request_id, num_tokens, new_computed_blocks, total_computed_tokens
            )
        num_pages = max(
            len(self.req_to_blocks.get(request_id, ())),
            # Hits, and behind them tokens that a connector loads.
            ceil_div(total_computed_tokens, self.block_size),
        )
        if request_id in self._held:  # running: no new hits, and mostly no new page either
            num_blocks = ceil_div(num_tokens, self.block_size) - num_pages
            if num_blocks <= 0:
                return 0
        else:
            num_blocks = super().get_num_blocks_to_allocate(
                request_id,
                num_tokens,
                new_computed_blocks,
                total_computed_tokens,
                num_local_computed_tokens,
                num_tokens_main_model,
                prefill_end=prefill_end,
            )
            num_blocks += self._get_num_evictable_blocks(
                self._hit_sinks(new_computed_blocks, total_computed_tokens)
            )
        return num_blocks - len(self._holes(num_pages, num_tokens_main_model))

    def _admission_charge(
        self,
        request_id: str,
        num_tokens: int,
        hit_blocks: Sequence[KVCacheBlock],
        num_computed_tokens: int,
    ) -> int:
        """Pages that admission charges: the most that the request may take from the pool.

        vLLM deducts all pages below the hit's window from the cap and may so charge nothing for a
        long hit, whose request then takes pages that were promised to others.
        """
        assert self.max_admission_blocks_per_request is not None
        cap = self.max_admission_blocks_per_request
        num_pages = ceil_div(num_tokens, self.block_size)
        if request_id in self._held:  # a session that goes on, with its pages
            still_needed = num_pages - len(self.req_to_blocks[request_id])
            return max(0, min(cap - self._held[request_id].live, still_needed))
        dead = self._pages.dead(num_computed_tokens)
        live_hits = [*hit_blocks[: dead.start], *hit_blocks[dead.stop :]]
        shared = sum(block.ref_cnt > 0 for block in live_hits if not block.is_null)
        return max(0, min(cap, num_pages - len(dead) - shared))

    def _hit_sinks(
        self, hit_blocks: Sequence[KVCacheBlock], num_computed_tokens: int
    ) -> Sequence[KVCacheBlock]:
        """Sink pages among a hit's pages that lie below the window, where vLLM looks at none."""
        return hit_blocks[
            : min(self._pages.num_sink_pages, self._pages.first_live(num_computed_tokens))
        ]

    def _holes(self, num_pages: int, num_tokens: int) -> range:
        return range(0) if self._stores_all else self._pages.holes(num_pages, num_tokens)

    def _admit(self, request_id: str) -> Held:
        return self._held.admit_request(
            request_id,
            self._pages,
            self.max_admission_blocks_per_request or 0,
        )

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        blocks = self.req_to_blocks[request_id]
        sinks = self._hit_sinks(
            new_computed_blocks, num_local_computed_tokens + num_external_computed_tokens
        )
        self.block_pool.touch(sinks)
        blocks[: len(sinks)] = sinks
        self._admit(request_id).num_hit_blocks = len(blocks)
        num_real = sum(not block.is_null for block in blocks)
        self._held.count_hit(request_id, num_real, num_local_computed_tokens)

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        num_pages = len(self.req_to_blocks[request_id])
        super().allocate_external_computed_blocks(
            request_id, num_local_computed_tokens, num_external_computed_tokens, record_for_zeroing
        )
        held = self._held[request_id]
        held.num_hit_blocks = len(self.req_to_blocks[request_id])
        self._held.count_taken(held, held.num_hit_blocks - num_pages)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        num_tokens += self._spare_tokens
        blocks = self.req_to_blocks[request_id]
        held = self._held.get(request_id) or self._admit(request_id)
        held.num_scheduled = num_tokens_main_model
        if len(blocks) * self.block_size >= num_tokens:
            return []
        held.first_new = len(blocks)
        held.holes = self._holes(len(blocks), num_tokens_main_model)
        holes = [self._null_block] * len(held.holes)
        taken = []
        if holes:  # up to them: sink pages
            first_tokens = held.holes.start * self.block_size
            taken = super().allocate_new_blocks(request_id, first_tokens, first_tokens)
            blocks.extend(holes)
        held.new_blocks = [*taken, *holes]
        taken = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        held.new_blocks += taken
        self._held.count_taken(held, len(held.new_blocks) - len(holes))
        if not self.enable_caching:  # else some of them may be filled yet
            self._held.count_skipped(request_id, len(holes))
        return held.new_blocks

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        # vLLM calls this once every group has taken what the step needs, and before it sends the
        # lists of new blocks to the workers: the moment to grant what is left over.
        held = self._held[request.request_id]
        if held.num_hit_blocks is not None:
            self._count_lost_prefix(request, held.num_hit_blocks)
            held.num_hit_blocks = None
        if held.holes:
            wanted = self._cacheable_holes(
                request, held.holes, retention_interval, replay_boundaries
            )
            self._fill_holes(request, held, wanted)
        super().cache_blocks(
            request, num_tokens, retention_interval, replay_boundaries=replay_boundaries
        )

    def _fill_holes(self, request: Request, held: Held, wanted: list[int]) -> None:
        """Grant the last of the ``wanted`` holes while more than half of the pool stays free."""
        spare = self.block_pool.get_num_free_blocks() - self.block_pool.num_gpu_blocks // 2
        # A session may rest between turns for any time, with all that it holds.
        may_grant = self._grants and not request.resumable
        num_granted = max(0, min(len(wanted), spare)) if may_grant else 0
        num_left = len(wanted) - num_granted
        table = self.req_to_blocks[request.request_id]
        new = self.block_pool.get_new_blocks(num_granted)
        for index, block in zip(wanted[num_left:], new, strict=True):
            table[index] = held.new_blocks[index - held.first_new] = block
        self._held.count_granted(request.request_id, num_granted)
        self._held.count_skipped(request.request_id, len(held.holes) - num_granted)
        held.holes = range(0)
        hashes = self._page_hashes(request)
        self._skipped_pages.add([hashes[i] for i in wanted[:num_left] if i < len(hashes)])

    def _count_lost_prefix(self, request: Request, num_hit_blocks: int) -> None:
        if request.skip_reading_prefix_cache:
            return
        reachable = self._page_hashes(request)[: (request.num_tokens - 1) // self.block_size]
        sinks = reachable[: self._pages.num_sink_pages]
        if not all(map(self._is_cached, sinks)):
            return  # no chunk skips a sink page: without one nothing could be hit anyway
        num_lost = self._skipped_pages.num_lost(
            reachable, num_hit_blocks, self._pages.num_hit_pages, self._is_cached
        )
        if num_lost:
            logger.warning_once(
                "SWA: prompts miss the prefix cache because prefill chunks skipped pages. With "
                'swa.prefill_pages="auto" they do so when memory is short, with "all" never.'
            )
        self._held.count_lost_prefix(num_lost * self.block_size)

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        return first_visible(num_computed_tokens, self._pages.window)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free pages that no step of the request reads which is yet to be scheduled.

        Args:
            processed_computed_tokens: tokens of its settled steps, by which vLLM frees.
        """
        if self._frees_by_schedule and (held := self._held.get(request_id)) is not None:
            next_query = held.num_scheduled - self._pages.rollback_tokens
            processed_computed_tokens = max(processed_computed_tokens, next_query)
        super().remove_skipped_blocks(request_id, processed_computed_tokens, num_prompt_tokens)

    def _remove_blocks_in_range(self, request_id: str, first_block: int, last_block: int) -> None:
        # The base class walks back from last_block to the first null block, which a hole would be.
        held = self._held.get(request_id)
        if held is None or last_block <= held.first_kept:
            return
        blocks = self.req_to_blocks[request_id]
        first_block = max(first_block, self._pages.num_sink_pages)
        last_block = min(last_block, len(blocks))
        dead = [
            index
            for index in range(last_block - 1, max(first_block, held.first_kept) - 1, -1)
            if not blocks[index].is_null
        ]
        held.first_kept = max(held.first_kept, last_block)
        self.block_pool.free_blocks([blocks[index] for index in dead])
        for index in dead:
            blocks[index] = self._null_block
        if dead:
            self._held.count_left_window(request_id, len(dead))

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._held.end_request(request_id)
        return super().pop_blocks_for_free(request_id)
