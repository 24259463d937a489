"""Specs, managers and requests as vLLM's own tests make them."""

from collections.abc import Sequence
from math import gcd, lcm
from typing import Any

import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
)
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from swa_backend.options import PrefillPages
from swa_vllm.config.storage import StoragePolicy
from swa_vllm.kv_cache.manager import SWAManager
from swa_vllm.kv_cache.spec import SWASpec

ALL, AUTO = PrefillPages.ALL, PrefillPages.AUTO
POLICIES = list(PrefillPages)


def windowed_spec(
    window: int,
    page: int,
    policy: PrefillPages = ALL,
    *,
    sink_tokens: int = 0,
    spare_tokens: int = 0,
    **fields: Any,
) -> SWASpec:
    """A spec of this plugin, of one KV head with one element."""
    common = {"num_kv_heads": 1, "head_size": 1, "dtype": torch.float32}
    storage = StoragePolicy(sink_tokens, spare_tokens, policy)
    return SWASpec(**{**common, **fields}, block_size=page, sliding_window=window, storage=storage)


def stock_spec(window: int, page: int) -> SlidingWindowSpec:
    """vLLM's spec of the same window."""
    return SlidingWindowSpec(
        block_size=page, num_kv_heads=1, head_size=1, dtype=torch.float32, sliding_window=window
    )


def full_spec(page: int, **fields: Any) -> FullAttentionSpec:
    """vLLM's spec of full attention."""
    common = {"num_kv_heads": 1, "head_size": 1, "dtype": torch.float32}
    return FullAttentionSpec(**{**common, **fields}, block_size=page)


def make_manager(spec: SWASpec, pool: BlockPool, **kwargs: Any) -> SWAManager:
    """A page manager over a pool, with no cap on what a request takes."""
    defaults: dict[str, Any] = {
        "enable_caching": True,
        "max_admission_blocks_per_request": 10**9,
        **kwargs,
    }
    return SWAManager(
        spec,
        block_pool=pool,
        kv_cache_group_id=0,
        scheduler_block_size=spec.block_size,
        **defaults,
    )


def make_kv(
    *specs: KVCacheSpec,
    num_pages: int = 100,
    retention: int | None = None,
    eagle: bool = False,
    events: bool = False,
    caching: bool = True,
) -> KVCacheManager:
    """vLLM's manager of a group a spec; with EAGLE the last group is its."""
    sizes = [spec.block_size for spec in specs]
    groups = [
        KVCacheGroupSpec([str(i)], spec, is_eagle_group=eagle and i == len(specs) - 1)
        for i, spec in enumerate(specs)
    ]
    config = KVCacheConfig(
        num_blocks=num_pages,
        kv_cache_tensors=[],
        kv_cache_groups=groups,
        prefix_cache_retention_interval=retention,
    )
    return KVCacheManager(
        config,
        max_model_len=8192,
        scheduler_block_size=lcm(*sizes),
        hash_block_size=gcd(*sizes),
        max_in_flight_tokens=8192,
        enable_caching=caching,
        use_eagle=eagle,
        enable_kv_cache_events=events,
    )


def make_request(name: str, tokens: Sequence[int], page: int) -> Request:
    """A request for 17 tokens after the prompt ``tokens``."""
    return Request(
        request_id=name,
        prompt_token_ids=list(tokens),
        sampling_params=SamplingParams(max_tokens=17),
        pooling_params=None,
        block_hasher=get_request_block_hasher(page, sha256),
    )


def hit_tokens(kv: KVCacheManager, request: Request) -> int:
    """Tokens that the prefix cache would give a request."""
    return int(kv.get_computed_blocks(request)[1])


def serve(kv: KVCacheManager, request: Request, num_tokens: int | None = None) -> int:
    """Schedule the whole prompt in one step; the tokens that the prefix cache gave."""
    blocks, num_hit, _ = kv.get_computed_blocks(request)
    num_new = (num_tokens or request.num_tokens) - num_hit
    assert kv.allocate_slots(request, num_new, num_hit, blocks) is not None
    return int(num_hit)


def cached_pages(kv: KVCacheManager, request: Request, group: int) -> set[int]:
    """Pages of a request that the prefix cache has for a group."""
    return {
        i
        for i, page_hash in enumerate(request.block_hashes)
        if kv.block_pool.get_cached_block(page_hash, [group])
    }
