"""The prefix cache of windowed layers, in which sink pages belong to every hit."""

from collections.abc import Sequence
from itertools import compress, takewhile
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashList,
    KVCacheBlock,
    resolve_block_hashes,
)
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.request import Request

from swa_vllm.kv_cache.spec import SWASpec


class SinkPrefixHits(SlidingWindowManager):
    """vLLM's sliding window manager with sink pages in its prefix cache hits."""

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        assert isinstance(kv_cache_spec, SWASpec)
        hashes = resolve_block_hashes(
            block_hashes, block_pool.hash_block_size, kv_cache_spec.block_size
        )
        num_sink_pages = kv_cache_spec.pages.num_sink_pages
        sinks = list(
            takewhile(
                lambda cached: cached is not None,
                (
                    block_pool.get_cached_block(block_hash, kv_cache_group_ids)
                    for block_hash in hashes[:num_sink_pages]
                ),
            )
        )
        if len(sinks) < num_sink_pages:  # nothing behind a missing sink can be hit
            max_length = min(max_length, len(sinks) * kv_cache_spec.block_size)
        hit, hit_length = super().find_longest_cache_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            drop_eagle_block,
            alignment_tokens,
            dcp_world_size,
            pcp_world_size,
        )
        for index, cached in enumerate(sinks[: len(hit[0])]):
            for blocks, block in zip(hit, cached, strict=True):
                blocks[index] = block
        return hit, hit_length

    @classmethod
    def reachable_block_mask(
        cls,
        start_block: int,
        end_block: int,
        alignment_tokens: int | None,
        kv_cache_spec: KVCacheSpec,
        *args: Any,
        **kwargs: Any,
    ) -> list[bool] | None:
        mask = super().reachable_block_mask(
            start_block, end_block, alignment_tokens, kv_cache_spec, *args, **kwargs
        )
        if mask is None:
            return None
        assert isinstance(kv_cache_spec, SWASpec)
        num_sinks = kv_cache_spec.pages.num_sink_pages
        return [i < num_sinks or mask[i - start_block] for i in range(start_block, end_block)]

    def _cacheable_holes(
        self,
        request: Request,
        holes: range,
        retention_interval: int | None,
        replay_boundaries: Sequence[int],
    ) -> list[int]:
        """Holes that vLLM would put into the prefix cache: mostly just those below a junction."""
        junction = request.shared_prefix_boundary
        boundaries = [*replay_boundaries, *([junction] if junction else [])]
        if junction and self.use_eagle:
            boundaries.append(junction - self.block_size)  # vLLM 0.33
        mask = self.reachable_block_mask(
            start_block=holes.start,
            end_block=holes.stop,
            alignment_tokens=self.cache_hit_alignment_tokens,
            kv_cache_spec=self.kv_cache_spec,
            use_eagle=self.use_eagle,
            retention_interval=retention_interval,
            reachable_boundaries=boundaries,
        )
        return list(holes if mask is None else compress(holes, mask))

    def _page_hashes(self, request: Request) -> Sequence[BlockHash]:
        return resolve_block_hashes(
            request.block_hashes, self.block_pool.hash_block_size, self.block_size
        )

    def _is_cached(self, block_hash: BlockHash) -> bool:
        return self.block_pool.get_cached_block(block_hash, [self.kv_cache_group_id]) is not None
