"""Page manager of a KV group of windowed layers, in the engine core."""

from collections.abc import Sequence
from itertools import takewhile

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from swa_backend.metrics import PageCounts


class SWAManager(SlidingWindowManager):
    """vLLM's sliding window manager, which frees pages as they leave the window, with counts."""

    def __init__(self, kv_cache_spec: SlidingWindowSpec, **kwargs: object) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._allocated = 0
        self._freed_by_window = 0
        self._peak_live = 0

    def snapshot(self) -> PageCounts:
        """Counts since the engine started."""
        return PageCounts(
            allocated=self._allocated,
            freed_by_window=self._freed_by_window,
            live=sum(map(_num_live, self.req_to_blocks.values())),
            peak_live_per_request=self._peak_live,
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        new_blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        self._count_allocated(request_id, len(new_blocks))
        return new_blocks

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        num_before = len(self.req_to_blocks[request_id])
        super().allocate_external_computed_blocks(
            request_id, num_local_computed_tokens, num_external_computed_tokens, record_for_zeroing
        )
        self._count_allocated(request_id, len(self.req_to_blocks[request_id]) - num_before)

    def _count_allocated(self, request_id: str, num_blocks: int) -> None:
        if num_blocks:
            self._allocated += num_blocks
            self._peak_live = max(self._peak_live, _num_live(self.req_to_blocks[request_id]))

    def _remove_blocks_in_range(self, request_id: str, first_block: int, last_block: int) -> None:
        # Counted the way the base class frees: backward, until a page freed earlier.
        blocks = self.req_to_blocks.get(request_id, ())
        freed = range(min(last_block, len(blocks)) - 1, first_block - 1, -1)
        self._freed_by_window += sum(1 for _ in takewhile(lambda i: not blocks[i].is_null, freed))
        super()._remove_blocks_in_range(request_id, first_block, last_block)


def _num_live(blocks: Sequence[KVCacheBlock]) -> int:
    """Pages held: those behind the null blocks that replace freed ones."""
    return sum(1 for _ in takewhile(lambda block: not block.is_null, reversed(blocks)))
