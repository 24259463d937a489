"""vLLM 0.32's own tests of sliding windows, and where what they check is checked of this plugin.

Their cases are taken as facts; each test here names what it answers by its upstream name, without
``test_``. "ours" are this file's tests.

======================================================= ============================================
v1/core/test_single_type_kv_cache_manager.py
sliding_window_possible_cached_prefix                   ours: hits, with sinks too
sliding_window_cache_hit_with_finer_hash_alignment      ours: finer hashes
sliding_window_remove_skipped_blocks                    ours: freed; test_pages_in_engine.py
get_num_blocks_to_allocate, evictable_cached_blocks_*   ours: a hit's pages
predictor_matches_allocator_*                           ours: predicted; test_page_machine.py
sliding_window_records_new_blocks_for_zeroing           ours: zeroing, with granted pages
external_computed_blocks_*                              connectors: test_feature_pairs.py refuses
rswa_*, mamba_*, chunked_local_*, circular_*, kpool_*   not in a Qwen3
v1/core/test_swa_inflight_window_free.py
swa_free_waits_for_in_flight_step, *_immediate_when_sync ours: in flight; test_page_machine.py
num_in_flight_tokens_accounting                         vLLM's own; test_page_machine.py settles so
swa_admission_cap_accounts_for_overlapping_batches      ours: promised
connector_finish_frees_on_settled_basis                 connectors: refused
v1/core/test_prefix_caching.py
hybrid_cache_blocks_*, *_retention_interval_aligns_*,   ours: what is cached, what a second request
*_latest_only*, *_mtp_*, pure_swa_*, eagle_swa_*        hits; under each policy, with sinks too
eagle_grouped_swa_siblings_*, eagle_with_sliding_window ours: eagle
different_block_size                                    ours: pages of two sizes
swa_free_split_keeps_cached_tail_ahead_of_scratch       ours: free order
swa_reachable_block_mask_*                              ours: masks (dcp: refused)
swa_shared_prefix_reuse_under_zero_retention            ours: junction; test_prefix_hits.py
can_fit_full_sequence_swa_cap_admits_long_prompt        ours: smallest pool; test_prefill_pages.py
*_retention_interval_survives_recycling                 test_page_machine.py (retention)
prefill_hybrid_model, *_eagle, *_combinations           test_page_machine.py (kinds of groups)
kv_cache_events*, block_stored_event_group_idx*         ours: events
retention_interval_rejects_invalid, *_reset_*, *_salt*  vLLM's own code, which stays as it is
cache_hit_local_and_external_*, hisparse_*, nixl_*      connectors and offloading: refused
v1/core/test_kv_cache_utils.py
merge_kv_cache_spec, is_kv_cache_spec_uniform           ours: specs; test_plan.py (groups)
get_kv_cache_spec_kind_*, *_sliding_window_*            ours: specs
unify_kv_cache_page_size_uses_padding_*                 ours: specs
get_max_concurrency_*, get_kv_cache_config*, auto_fit_* test_plan.py, with started engines
unify_hybrid_kv_cache_specs                             test_pages_in_engine.py (one group)
draft_group_annotated_*                                 test_speculation.py
v1/test_kv_cache_spec_registry.py
builtin_*, custom_spec_register*, *uniform*             ours: specs; test_contracts.py
v1/core: prefix_replay, contiguous_kv_packing,          scratch groups, MLA and connectors only
deferred_block_free, partial_prefix_cache_*
v1/core/test_async_scheduler.py, test_scheduler.py      vLLM's scheduler, as it is, on our pages:
                                                        test_page_machine.py, engines/scheduler.py
v1/attention/test_group_sliding_window.py               test_pages_in_engine.py (one group)
v1/attention/test_backend_per_kind.py, e2e/*_per_kind   test_plugin.py (parts of each layer)
v1/attention/test_attention_backends.py
sliding_window_backend_correctness                      ours: CPU backend; test_exactness.py;
                                                        test_triton_builder.py
*_encoder_*, non_causal_*                               is_causal=false: test_plugin.py refuses
test_attention_splitting.py, test_batch_reordering.py   test_metadata.py, test_triton_builder.py
v1/attention/test_triton_attn_metadata_builder.py       test_ops.py, test_triton_builder.py
kernels/attention/test_cpu_attn.py                      ours: CPU backend, its batches and window
*_fp8*                                                  test_features.py, where the processor can
*_sink*                                                 learnt sinks (gpt-oss); alibi, softcap:
                                                        not in a Qwen3
kernels/attention/test_triton_unified_attention.py      ours: kernels, its batches and windows;
                                                        test_kernels.py (dtypes, fp8, strides)
*_mm_prefix*, *_softcap*, *_fp8_output                  not in a Qwen3's text
kernels/attention/test_segmented_attention.py           test_kernels.py (windows, offsets beyond 32
                                                        bits), test_triton_builder.py
v1/e2e/general/test_correctness_sliding_window.py       test_exactness.py, test_eval_needle.py,
                                                        test_pages_in_engine.py (one group)
v1/worker/test_kv_block_zeroer.py                       vLLM's own; ours: zeroing
======================================================= ============================================
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import gcd, lcm
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    get_request_block_hasher,
    init_none_hash,
    make_block_hash_with_group_id,
    maybe_convert_block_hash,
    unify_kv_cache_spec_page_size,
)
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVCacheSpecKind,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
    get_kv_cache_spec_kind,
    get_kv_cache_spec_sliding_window,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

import swa_vllm
from kernel_cases import DecodeCase, check_decode
from prefill_cases import PrefillCase, check_prefill
from swa_backend import ops
from swa_backend.config import PrefillPages
from swa_backend.window import is_visible
from swa_vllm.kv_cache.manager import SWAManager
from swa_vllm.kv_cache.spec import SWASpec
from swa_vllm.tools.common.arms import Arm
from swa_vllm.tools.engines.batches import make_batch
from swa_vllm.tools.engines.layer import make_layer
from swa_vllm.tools.engines.scheduler import Simulation
from swa_vllm.tools.engines.simulated import Engine

ALL, AUTO = PrefillPages.ALL, PrefillPages.AUTO
POLICIES = list(PrefillPages)


@pytest.fixture(autouse=True)
def _registered() -> None:
    swa_vllm.register()
    init_none_hash(sha256)


def _spec(window: int, page: int, policy: PrefillPages = ALL, **fields: Any) -> SWASpec:
    common = {"num_kv_heads": 1, "head_size": 1, "dtype": torch.float32}
    return SWASpec(
        **{**common, **fields}, block_size=page, sliding_window=window, prefill_pages=policy
    )


def _stock(window: int, page: int) -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=page, num_kv_heads=1, head_size=1, dtype=torch.float32, sliding_window=window
    )


def _full(page: int, **fields: Any) -> FullAttentionSpec:
    common = {"num_kv_heads": 1, "head_size": 1, "dtype": torch.float32}
    return FullAttentionSpec(**{**common, **fields}, block_size=page)


def _manager(spec: SWASpec, pool: BlockPool, **kwargs: Any) -> SWAManager:
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


def _kv(
    *specs: KVCacheSpec,
    num_pages: int = 100,
    retention: int | None = None,
    eagle: bool = False,
    events: bool = False,
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
        enable_caching=True,
        use_eagle=eagle,
        enable_kv_cache_events=events,
    )


def _request(name: str, tokens: Sequence[int], page: int) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=list(tokens),
        sampling_params=SamplingParams(max_tokens=17),
        pooling_params=None,
        block_hasher=get_request_block_hasher(page, sha256),
    )


def _hit(kv: KVCacheManager, request: Request) -> int:
    return int(kv.get_computed_blocks(request)[1])


def _serve(kv: KVCacheManager, request: Request, num_tokens: int | None = None) -> int:
    """Schedule the whole prompt in one step; the tokens that the prefix cache gave."""
    blocks, num_hit, _ = kv.get_computed_blocks(request)
    num_new = (num_tokens or request.num_tokens) - num_hit
    assert kv.allocate_slots(request, num_new, num_hit, blocks) is not None
    return int(num_hit)


def _cached(kv: KVCacheManager, request: Request, group: int) -> set[int]:
    return {
        i
        for i, page_hash in enumerate(request.block_hashes)
        if kv.block_pool.get_cached_block(page_hash, [group])
    }


# --- one manager ----------------------------------------------------------------------------------

HITS = {
    ".": 0,
    "..........": 0,
    "#": 1,
    "#.": 1,
    "##": 2,
    "##.": 2,
    "###": 3,
    "###.": 3,
    "##.#..##.###": 12,
    "##.#..##...": 8,
    "##.#..##...#": 8,
}


def _hit_pages(spec: SWASpec, is_cached: Sequence[bool]) -> list[int]:
    """What a lookup returns where these pages are in the cache, page ``i`` as block ``i + 10``."""
    pool = BlockPool(100, enable_caching=True, hash_block_size=spec.block_size)
    hashes = [BlockHash(str(i).encode()) for i in range(len(is_cached))]
    for i in (i for i, cached in enumerate(is_cached) if cached):
        pool.cached_block_hash_to_block.insert(
            make_block_hash_with_group_id(hashes[i], 0), pool.blocks[i + 10]
        )
    (blocks,), num_tokens = SWAManager.find_longest_cache_hit(
        block_hashes=hashes,
        max_length=len(hashes) * spec.block_size,
        kv_cache_group_ids=[0],
        block_pool=pool,
        kv_cache_spec=spec,
        drop_eagle_block=False,
        alignment_tokens=spec.block_size,
    )
    assert num_tokens == len(blocks) * spec.block_size
    return [-1 if block.is_null else block.block_id - 10 for block in blocks]


def _visible_pages(spec: SWASpec, num_pages: int) -> set[int]:
    """Pages that the query behind ``num_pages`` of them sees."""
    query = num_pages * spec.block_size
    return {
        key // spec.block_size
        for key in range(query)
        if is_visible(query, key, spec.sliding_window, spec.sink_tokens)
    }


@pytest.mark.parametrize("pages", HITS)
def test_a_hit_is_the_longest_prefix_whose_window_is_cached(pages: str) -> None:
    spec, num_hit = _spec(4, 2), HITS[pages]
    found = _hit_pages(spec, [page == "#" for page in pages])
    assert found == [i if i >= num_hit - 2 else -1 for i in range(num_hit)]


@pytest.mark.parametrize("sinks", [0, 1, 2, 5])
@pytest.mark.parametrize("window", [1, 2, 4, 5, 9])
def test_a_hit_has_all_that_its_next_query_sees(window: int, sinks: int) -> None:
    spec, rng = _spec(window, 2, sink_tokens=sinks), random.Random(window)
    for _ in range(200):
        cached = [rng.random() < 0.8 for _ in range(12)]
        # Up to a page that is cached, even where a window of one sees nothing of it.
        expected = max(
            n
            for n in range(13)
            if (n == 0 or cached[n - 1]) and all(cached[i] for i in _visible_pages(spec, n))
        )
        found = _hit_pages(spec, cached)
        assert len(found) == expected
        assert _visible_pages(spec, expected) <= set(found)


def test_finer_hashes_are_read_a_page_at_a_time() -> None:
    pool = BlockPool(100, enable_caching=True, hash_block_size=2)
    hashes = [BlockHash(str(i).encode()) for i in range(4)]
    for index, block in ((1, pool.blocks[10]), (3, pool.blocks[11])):
        pool.cached_block_hash_to_block.insert(
            make_block_hash_with_group_id(hashes[index], 0), block
        )
    (blocks,), num_tokens = SWAManager.find_longest_cache_hit(
        block_hashes=hashes,
        max_length=8,
        kv_cache_group_ids=[0],
        block_pool=pool,
        kv_cache_spec=_spec(8, 4, sink_tokens=1),
        drop_eagle_block=False,
        alignment_tokens=2,
    )
    assert (blocks, num_tokens) == (pool.blocks[10:12], 8)


@pytest.mark.parametrize("sinks", [0, 1])
def test_pages_are_freed_as_the_window_leaves_them_the_later_first(sinks: int) -> None:
    pool = BlockPool(100, enable_caching=True, hash_block_size=2)
    manager = _manager(_spec(4, 2, sink_tokens=sinks), pool)
    pages = [block.block_id for block in manager.allocate_new_blocks("r", 22, 22)]
    table = manager.req_to_blocks["r"]
    before = pool.get_num_free_blocks()
    for num_computed, num_dead in ((0, 0), (4, 0), (5, 1), (6, 1), (7, 2), (11, 4)):
        manager.remove_skipped_blocks("r", num_computed)
        dead = range(sinks, num_dead)
        assert [b.is_null for b in table] == [i in dead for i in range(11)]
        assert pool.get_num_free_blocks() == before + len(dead)
    order = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
    assert order.index(pages[3]) < order.index(pages[2])


def test_a_hits_evictable_pages_are_needed_and_not_taken_twice() -> None:
    pool = BlockPool(100, enable_caching=True, hash_block_size=2)
    manager = _manager(_spec(4, 2), pool)
    null, cached = pool.null_block, pool.blocks[1:11]
    for hit, needed in ((cached, 20), ([null] * 5 + cached[:5], 15)):
        assert manager.get_num_blocks_to_allocate("r", 40, hit, 0, 0, 40) == needed
    assert manager.get_num_blocks_to_allocate("r", 4, cached[:1], 2, 2, 4) == 2
    manager.add_local_computed_blocks("r", cached[:1], 2, 0)
    assert len(manager.allocate_new_blocks("r", 4, 4)) == 1
    assert len(manager.req_to_blocks["r"]) == 2


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_predicted_is_what_is_taken(policy: PrefillPages, sinks: int) -> None:
    pool = BlockPool(100, enable_caching=False, hash_block_size=2)
    spec = _spec(8, 2, policy, sink_tokens=sinks, spare_tokens=sinks)
    manager = _manager(spec, pool, enable_caching=False, max_admission_blocks_per_request=4)
    num_computed = 0
    for num_tokens in (4, 8, 12, 16, 60, 61, 62, 100):
        manager.remove_skipped_blocks("r", num_computed)
        before = pool.get_num_free_blocks()
        predicted = manager.get_num_blocks_to_allocate(
            "r", num_tokens, [], num_computed, 0, num_tokens
        )
        manager.allocate_new_blocks("r", num_tokens, num_tokens)
        assert predicted == before - pool.get_num_free_blocks()
        num_computed = num_tokens


@pytest.mark.parametrize("policy", POLICIES)
def test_new_pages_are_zeroed_but_for_those_that_their_step_fills(policy: PrefillPages) -> None:
    """Layers of two precisions, where vLLM zeroes: no slot that is read is left as it was."""
    kv = _kv(_full(4, dtype=torch.float16, head_size=2), _spec(8, 4, policy))
    assert kv.coordinator.kv_cache_config.needs_kv_cache_zeroing
    num_tokens = 82
    _serve(kv, _request("r", range(num_tokens), 4))
    zeroed = kv.take_new_block_ids()
    assert len(zeroed) == len(set(zeroed))
    full, sliding = (m.req_to_blocks["r"] for m in kv.coordinator.single_type_managers)
    assert {block.block_id for block in full} <= set(zeroed)
    not_zeroed = [
        i for i, b in enumerate(sliding) if not b.is_null and b.block_id not in set(zeroed)
    ]
    assert all((i + 1) * 4 <= num_tokens for i in not_zeroed)
    assert (not_zeroed != []) == (policy is AUTO)  # what was granted
    assert kv.take_new_block_ids() == []


# --- steps in flight, and what is promised --------------------------------------------------------


class Watched(Simulation):
    """Counts the null entries of the request's table when a step is scheduled."""

    def note(self, output: Any) -> None:
        self.num_null = [
            *getattr(self, "num_null", ()),
            sum(block.is_null for block in self.managers[0].req_to_blocks["r"]),
        ]


@pytest.mark.parametrize(("num_steps", "expected"), [(1, [0, 5, 5, 5]), (2, [0, 0, 5, 5])])
def test_pages_that_a_step_in_flight_reads_are_not_freed(
    num_steps: int, expected: list[int]
) -> None:
    engine = Engine(16, 16, 100, 512, 512, num_steps_in_flight=num_steps, prefill_pages=ALL)
    simulation = Watched(Arm.SWA, engine)
    simulation.add("r", range(100), 4)
    while simulation.step():
        pass
    assert simulation.num_null[:4] == expected


def test_what_is_promised_grows_with_steps_in_flight() -> None:
    def promised(policy: PrefillPages, chunk: int) -> list[int]:
        return [
            _spec(1024, 16, policy, num_steps_in_flight=n).max_admission_blocks_per_request(
                n * chunk, 32768
            )
            for n in (1, 2)
        ]

    for policy in POLICIES:  # chunks too short to leave holes
        assert promised(policy, 1024) == [129, 193]
    assert promised(ALL, 8192) == [577, 1089]
    assert promised(AUTO, 8192) == promised(PrefillPages.SURVIVORS, 8192) == [130, 195]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_smallest_pool_that_starts_admits_a_prompt_longer_than_what_is_promised(
    policy: PrefillPages,
) -> None:
    full, sliding = _full(16), _spec(64, 16, policy)
    cap = sliding.max_admission_blocks_per_request(128, 1024)
    assert cap <= 13
    config = KVCacheConfig(
        num_blocks=64 + cap + 1,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["f"], full), KVCacheGroupSpec(["s"], sliding)],
    )
    kv = KVCacheManager(
        config,
        max_model_len=1024,
        scheduler_block_size=16,
        hash_block_size=16,
        max_in_flight_tokens=128,
        enable_caching=True,
    )
    request = _request("r", range(32 * 16), 16)
    assert kv.allocate_slots(request, 16, full_sequence_must_fit=True) is not None


# --- the prefix cache -----------------------------------------------------------------------------

SMALL = (8, 8, 32)  # window, page, page of the full layers
PURE = (16, 16, None)
Sizes = tuple[int, int, int | None]


@pytest.mark.parametrize("sinks", [0, 1])
@pytest.mark.parametrize("policy", [ALL, AUTO, None], ids=["all", "auto", "stock"])
@pytest.mark.parametrize(
    ("sizes", "retention", "eagle", "num_tokens", "kept", "num_hit"),
    [
        (SMALL, None, False, 64, {3, 7}, 32),
        ((32, 16, 32), None, False, 112, {0, 1, 2, 3, 4, 5}, 96),
        (SMALL, 64, False, 128, {7, 11, 15}, 96),
        (SMALL, 0, False, 128, {11}, 96),
        (SMALL, None, True, 128, {3, 4, 7, 8, 11, 12, 15}, 96),
        (SMALL, None, True, 40, {3, 4}, 32),
        (SMALL, 0, True, 127, {7, 8}, 64),
        (PURE, 64, False, 256, {3, 7, 11, 14, 15}, 240),
        (PURE, 0, False, 256, {14}, 240),
        (PURE, None, False, 256, set(range(16)), 240),
    ],
)
def test_what_is_cached_and_what_the_same_prompt_then_hits(
    sizes: Sizes,
    retention: int | None,
    eagle: bool,
    num_tokens: int,
    kept: set[int],
    num_hit: int,
    policy: PrefillPages | None,
    sinks: int,
) -> None:
    """The facts are stock's, which also stands them."""
    window, page, full_page = sizes
    sliding: KVCacheSpec
    if policy is None:
        sinks, sliding = 0, _stock(window, page)
    else:
        sliding = _spec(window, page, policy, sink_tokens=sinks, drops_last_hit=eagle)
    specs: list[KVCacheSpec] = [sliding] if full_page is None else [_full(full_page), sliding]
    kv = _kv(*specs, retention=retention, eagle=eagle)
    first = _request("first", range(num_tokens), page)
    assert _serve(kv, first) == 0
    assert _cached(kv, first, len(specs) - 1) == kept | set(range(sinks))
    kv.free(first)
    assert _hit(kv, _request("again", range(num_tokens), page)) == num_hit


def test_without_room_survivors_still_serve_the_same_prompt() -> None:
    kv = _kv(_spec(16, 16, PrefillPages.SURVIVORS), retention=0)
    first = _request("first", range(256), 16)
    _serve(kv, first)
    kv.free(first)
    assert _hit(kv, _request("again", range(256), 16)) == 240


@pytest.mark.parametrize("policy", [ALL, AUTO])
def test_groups_of_an_eagle_draft_and_its_target_keep_the_same_pages(policy: PrefillPages) -> None:
    sliding = _spec(8, 8, policy, drops_last_hit=True)
    kv = _kv(_full(32), sliding, sliding, eagle=True)
    first = _request("first", range(72), 8)
    _serve(kv, first)
    assert {4, 8} <= _cached(kv, first, 1) == _cached(kv, first, 2)
    kv.free(first)
    assert _hit(kv, _request("again", range(73), 8)) == 64


@pytest.mark.parametrize("policy", POLICIES)
def test_eagle_gives_back_the_last_page_of_a_hit(policy: PrefillPages) -> None:
    kv = _kv(_spec(16, 16, policy, drops_last_hit=True), num_pages=20, eagle=True)
    first = _request("first", [0] * 37, 16)
    _serve(kv, first)
    kv.free(first)
    assert _hit(kv, _request("again", [0] * 37, 16)) == 16
    _evict(kv, first, 0, 0)
    assert _hit(kv, _request("without", [0] * 37, 16)) == 0


def _evict(kv: KVCacheManager, request: Request, index: int, group: int) -> None:
    (block,) = kv.block_pool.get_cached_block(request.block_hashes[index], [group])
    kv.block_pool.cached_block_hash_to_block.pop(
        make_block_hash_with_group_id(request.block_hashes[index], group), block.block_id
    )


@pytest.mark.parametrize("policy", [ALL, AUTO])
def test_hits_of_pages_of_two_sizes_are_a_multiple_of_both(policy: PrefillPages) -> None:
    kv = _kv(_full(32, dtype=torch.float16), _spec(32, 16, policy))
    first = _request("first", range(160), 16)
    _serve(kv, first, 7 * 16)
    for num_tokens in (7 * 16 + 1, 6 * 16 + 1):
        assert _hit(kv, _request("again", range(num_tokens), 16)) == 6 * 16
    _evict(kv, first, 5, 1)
    assert _hit(kv, _request("evicted", range(7 * 16 + 1), 16)) == 4 * 16


@pytest.mark.parametrize("policy", [ALL, AUTO])
def test_pages_outside_the_prefix_cache_are_reused_before_those_in_it(policy: PrefillPages) -> None:
    kv = _kv(_full(32), _spec(8, 8, policy))
    request = _request("r", range(128), 8)
    _serve(kv, request)
    blocks = [b for b in kv.coordinator.single_type_managers[1].req_to_blocks["r"] if not b.is_null]
    kept = {b.block_id for b in blocks if b.block_hash is not None}
    others = {b.block_id for b in blocks} - kept
    assert kept
    kv.free(request)
    order = [b.block_id for b in kv.block_pool.free_block_queue.get_all_free_blocks()]
    assert max(map(order.index, others), default=-1) < min(map(order.index, kept))
    assert len(_cached(kv, request, 1)) == len(kept)


@pytest.mark.parametrize("policy", POLICIES)
def test_events_tell_of_the_pages_that_are_cached_and_their_window(policy: PrefillPages) -> None:
    kv = _kv(_full(16), _spec(40, 16, policy), events=True)
    request = _request("r", range(320), 16)
    _serve(kv, request)
    stored = {event.group_idx: event for event in kv.take_events()}
    for group, event in stored.items():
        hashes = [maybe_convert_block_hash(h) for h in request.block_hashes]
        assert event.block_hashes == [hashes[i] for i in sorted(_cached(kv, request, group))]
    assert (stored[1].kv_cache_spec_kind, stored[1].kv_cache_spec_sliding_window) == (
        KVCacheSpecKind.SLIDING_WINDOW,
        40,
    )


def _mask(spec: SWASpec, start: int, end: int, alignment: int, **kwargs: Any) -> set[int] | None:
    mask = SWAManager.reachable_block_mask(
        start_block=start,
        end_block=end,
        alignment_tokens=alignment,
        kv_cache_spec=spec,
        **{"use_eagle": False, **kwargs},
    )
    return None if mask is None else {start + i for i, reachable in enumerate(mask) if reachable}


@pytest.mark.parametrize(
    ("final", "eagle", "expected"),
    [
        (300, False, {248, 249}),
        (250, False, {246, 247, 248, 249}),
        (300, True, {243, 248, 249}),
        (250, True, {243, 248, 249}),
    ],
)
def test_mask_of_a_segment_that_is_not_whole(final: int, eagle: bool, expected: set[int]) -> None:
    found = _mask(_spec(16, 4), 243, 250, 36, use_eagle=eagle, final_segment_end_block=final)
    assert found == expected


@pytest.mark.parametrize("sinks", [0, 1])
@pytest.mark.parametrize(
    ("retention", "junction", "window", "expected"),
    [
        (0, 96, 16, {5, 14}),
        (0, 96, 48, {3, 4, 5, 12, 13, 14}),
        (64, 96, 16, {3, 5, 7, 11, 14, 15}),
        (None, 96, 16, None),
        (0, None, 16, {14}),
    ],
)
def test_mask_keeps_the_window_below_a_junction(
    retention: int | None, junction: int | None, window: int, expected: set[int] | None, sinks: int
) -> None:
    boundaries = [255] if junction is None else [255, junction]
    spec = _spec(window, 16, sink_tokens=sinks)
    found = _mask(spec, 0, 16, 16, retention_interval=retention, reachable_boundaries=boundaries)
    assert found == (None if expected is None else expected | set(range(sinks)))


def test_mask_of_an_alignment_within_a_page_keeps_everything() -> None:
    assert _mask(_spec(32, 16), 0, 16, 24, retention_interval=24) is None


@pytest.mark.parametrize("policy", [ALL, AUTO])
@pytest.mark.parametrize(
    ("retention", "is_told", "expected"), [(None, False, 64), (0, False, 0), (0, True, 64)]
)
def test_a_shared_prefix_is_kept_once_its_junction_is_known(
    retention: int | None, is_told: bool, expected: int, policy: PrefillPages
) -> None:
    kv = _kv(_full(16), _spec(32, 16, policy), num_pages=200, retention=retention)
    texts = [[7] * 64 + [own] * 32 for own in (50, 60, 70)]
    _serve(kv, _request("0", texts[0], 16))
    second = _request("1", texts[1], 16)
    *_, junction = kv.get_computed_blocks(second)
    if retention == 0:
        assert junction == 64
    if is_told:
        second.shared_prefix_boundary = junction
    _serve(kv, second)
    assert _hit(kv, _request("2", texts[2], 16)) == expected


# --- specs ----------------------------------------------------------------------------------------


def test_spec_is_a_sliding_window_with_a_manager_and_a_kind_of_its_own() -> None:
    spec = _spec(128, 16, AUTO)
    assert KVCacheSpecRegistry.get_manager_class(spec) is SWAManager
    assert KVCacheSpecRegistry.get_uniform_type_base_spec(spec) is SWASpec
    assert get_kv_cache_spec_kind(spec) is KVCacheSpecKind.SLIDING_WINDOW
    assert get_kv_cache_spec_sliding_window(spec) == 128
    assert get_kv_cache_spec_sliding_window(_together(spec, replace(spec, num_kv_heads=2))) == 128
    assert get_kv_cache_spec_sliding_window(_together(spec, _spec(256, 16, AUTO))) is None


def _together(*specs: KVCacheSpec) -> UniformTypeKVCacheSpecs:
    named = {str(i): spec for i, spec in enumerate(specs)}
    return UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=named)


@pytest.mark.parametrize(
    ("other", "is_uniform"),
    [
        (_spec(128, 16), True),
        (_spec(128, 16, num_kv_heads=2), True),
        (_spec(256, 16), False),
        (_spec(128, 32), False),
        (_spec(128, 16, sink_tokens=4), False),
        (_spec(128, 16, PrefillPages.SURVIVORS), False),
        (_full(16), False),
    ],
)
def test_layers_share_a_group_only_with_the_same_pages(
    other: KVCacheSpec, is_uniform: bool
) -> None:
    spec = _spec(128, 16)
    for pair in ((spec, other), (other, spec)):
        named = {str(i): spec for i, spec in enumerate(pair)}
        assert UniformTypeKVCacheSpecs.is_uniform_type(named) is is_uniform


def test_a_drafts_stock_layer_has_a_group_of_its_own() -> None:
    """vLLM asks the first layer, which is the target's."""
    named = {"target": _spec(128, 16), "draft": _stock(128, 16)}
    assert not UniformTypeKVCacheSpecs.is_uniform_type(named)


def test_equal_specs_merge_and_others_do_not() -> None:
    spec = _spec(128, 16, AUTO, sink_tokens=4)
    assert spec.merge([spec, replace(spec)]) == spec
    for other in (replace(spec, sink_tokens=0), replace(spec, num_kv_heads=2), _full(16)):
        with pytest.raises((AssertionError, ValueError)):
            spec.merge([spec, other])


def test_smaller_pages_are_padded_and_stay_ours() -> None:
    target = _full(16, head_size=192, dtype=torch.bfloat16)
    sliding = _spec(1024, 16, AUTO, head_size=128, dtype=torch.bfloat16, sink_tokens=4)
    unified = unify_kv_cache_spec_page_size({"target": target, "sliding": sliding})
    assert unified["target"] == target
    assert unified["sliding"] == replace(sliding, page_size_padded=target.page_size_bytes)


# --- attention ------------------------------------------------------------------------------------

MIXED_BATCH = ((1327, 1), (13, 5), (334, 129))  # tokens before the queries, queries
DECODES = (523, 37, 2011)


@pytest.mark.parametrize(
    ("window", "sinks"),
    [
        (64, 4),
        (128, 0),
        *(pytest.param(w, s, marks=pytest.mark.full) for w, s in ((64, 0), (256, 0), (256, 4))),
    ],
)
def test_kernels_are_right_on_upstreams_batches(
    window: int, sinks: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prefill = PrefillCase(window, MIXED_BATCH, sink_tokens=sinks, dtype=torch.bfloat16, group=4)
    decode = DecodeCase(window, DECODES, sink_tokens=sinks, dtype=torch.bfloat16, group=4)
    check_prefill(prefill, ops, monkeypatch, tmp_path)
    check_decode(decode, ops, monkeypatch, tmp_path)


# Tokens before the queries, queries; one request at a time is the last of the batch.
CPU_BATCHES = (
    ((212, 1), (0, 1), (311, 1), (6, 1), (7811, 1)),
    ((0, 1173), (0, 5), (13, 3), (4997, 134)),
    ((1464, 992), (4161, 1), (1233, 1), (1047, 98)),
)


@pytest.mark.parametrize("sinks", [0, 4])
def test_cpu_backend_is_right_on_upstreams_batches(
    sinks: int, no_engine: Callable[[], None]
) -> None:
    """With sinks the last request's outputs are plain torch's; without, all are vLLM's own."""
    no_engine()
    layer = make_layer("Qwen3-0.6B", 256, 8192, 400, {"sink_tokens": sinks})
    torch.nn.init.normal_(layer.attention.kv_cache)
    for requests in CPU_BATCHES:
        for turn in (0, 1):
            contexts, queries = zip(*requests[turn:], *requests[:turn], strict=True)
            batch = make_batch(list(contexts), list(queries), spare_tokens=sinks)
            qkv = layer.random_inputs(sum(queries))
            output = layer.run(layer.builder.build(0, batch), *qkv)
            if sinks:
                layer.check(batch, qkv, output, 256, sinks)
            else:
                stock = layer.run_stock(layer.stock_builder.build(0, batch), *qkv)
                assert torch.equal(output, stock)
