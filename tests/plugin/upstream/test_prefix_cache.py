"""What the prefix cache keeps, and what a second request hits."""

from typing import Any

import pytest
import torch
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    make_block_hash_with_group_id,
    maybe_convert_block_hash,
)
from vllm.v1.kv_cache_interface import (
    KVCacheSpec,
    KVCacheSpecKind,
    MambaSpec,
)
from vllm.v1.request import Request

from swa_backend.options import PrefillPages
from swa_vllm.kv_cache.manager import SWAManager
from swa_vllm.kv_cache.spec import SWASpec
from tests.plugin.upstream.pages import (
    ALL,
    AUTO,
    POLICIES,
    cached_pages,
    full_spec,
    hit_tokens,
    make_kv,
    make_request,
    serve,
    stock_spec,
    windowed_spec,
)

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
        sinks, sliding = 0, stock_spec(window, page)
    else:
        sliding = windowed_spec(window, page, policy, sink_tokens=sinks, drops_last_hit=eagle)
    specs: list[KVCacheSpec] = [sliding] if full_page is None else [full_spec(full_page), sliding]
    kv = make_kv(*specs, retention=retention, eagle=eagle)
    first = make_request("first", range(num_tokens), page)
    assert serve(kv, first) == 0
    assert cached_pages(kv, first, len(specs) - 1) == kept | set(range(sinks))
    kv.free(first)
    assert hit_tokens(kv, make_request("again", range(num_tokens), page)) == num_hit


def test_without_room_survivors_still_serve_the_same_prompt() -> None:
    kv = make_kv(windowed_spec(16, 16, PrefillPages.SURVIVORS), retention=0)
    first = make_request("first", range(256), 16)
    serve(kv, first)
    kv.free(first)
    assert hit_tokens(kv, make_request("again", range(256), 16)) == 240


@pytest.mark.parametrize("policy", [ALL, AUTO])
def test_groups_of_an_eagle_draft_and_its_target_keep_the_same_pages(policy: PrefillPages) -> None:
    sliding = windowed_spec(8, 8, policy, drops_last_hit=True)
    kv = make_kv(full_spec(32), sliding, sliding, eagle=True)
    first = make_request("first", range(72), 8)
    serve(kv, first)
    assert {4, 8} <= cached_pages(kv, first, 1) == cached_pages(kv, first, 2)
    kv.free(first)
    assert hit_tokens(kv, make_request("again", range(73), 8)) == 64


@pytest.mark.parametrize("policy", POLICIES)
def test_eagle_gives_back_the_last_page_of_a_hit(policy: PrefillPages) -> None:
    kv = make_kv(windowed_spec(16, 16, policy, drops_last_hit=True), num_pages=20, eagle=True)
    first = make_request("first", [0] * 37, 16)
    serve(kv, first)
    kv.free(first)
    assert hit_tokens(kv, make_request("again", [0] * 37, 16)) == 16
    _evict(kv, first, 0, 0)
    assert hit_tokens(kv, make_request("without", [0] * 37, 16)) == 0


def _evict(kv: KVCacheManager, request: Request, index: int, group: int) -> None:
    (block,) = kv.block_pool.get_cached_block(request.block_hashes[index], [group])
    kv.block_pool.cached_block_hash_to_block.pop(
        make_block_hash_with_group_id(request.block_hashes[index], group), block.block_id
    )


@pytest.mark.parametrize("policy", [ALL, AUTO])
def test_hits_of_pages_of_two_sizes_are_a_multiple_of_both(policy: PrefillPages) -> None:
    kv = make_kv(full_spec(32, dtype=torch.float16), windowed_spec(32, 16, policy))
    first = make_request("first", range(160), 16)
    serve(kv, first, 7 * 16)
    for num_tokens in (7 * 16 + 1, 6 * 16 + 1):
        assert hit_tokens(kv, make_request("again", range(num_tokens), 16)) == 6 * 16
    _evict(kv, first, 5, 1)
    assert hit_tokens(kv, make_request("evicted", range(7 * 16 + 1), 16)) == 4 * 16


@pytest.mark.parametrize("policy", [*POLICIES, None])
def test_a_windowed_group_is_hit_by_whole_pages_only(policy: PrefillPages | None) -> None:
    """Mamba's groups allow hits of a part of a page, where all groups do. None is stock."""
    mamba = MambaSpec(
        block_size=8, shapes=((1, 1),), dtypes=(torch.float32,), mamba_cache_mode="align"
    )
    assert make_kv(full_spec(2), mamba).coordinator.enable_partial_hash_hits
    sliding = stock_spec(4, 4) if policy is None else windowed_spec(4, 4, policy)
    kv = make_kv(full_spec(2), mamba, sliding)
    assert not kv.coordinator.enable_partial_hash_hits
    first = make_request("first", range(12), 2)
    serve(kv, first, 8)
    first.num_computed_tokens = 8
    kv.new_step_starts()
    assert kv.allocate_slots(first, 4) is not None
    kv.free(first)
    kv.new_step_starts()
    assert hit_tokens(kv, make_request("again", range(14), 2)) == 8


@pytest.mark.parametrize("policy", [ALL, AUTO])
def test_pages_outside_the_prefix_cache_are_reused_before_those_in_it(policy: PrefillPages) -> None:
    kv = make_kv(full_spec(32), windowed_spec(8, 8, policy))
    request = make_request("r", range(128), 8)
    serve(kv, request)
    blocks = [b for b in kv.coordinator.single_type_managers[1].req_to_blocks["r"] if not b.is_null]
    kept = {b.block_id for b in blocks if b.block_hash is not None}
    others = {b.block_id for b in blocks} - kept
    assert kept
    kv.free(request)
    order = [b.block_id for b in kv.block_pool.free_block_queue.get_all_free_blocks()]
    assert max(map(order.index, others), default=-1) < min(map(order.index, kept))
    assert len(cached_pages(kv, request, 1)) == len(kept)


@pytest.mark.parametrize("policy", POLICIES)
def test_events_tell_of_the_pages_that_are_cached_and_their_window(policy: PrefillPages) -> None:
    kv = make_kv(full_spec(16), windowed_spec(40, 16, policy), events=True)
    request = make_request("r", range(320), 16)
    serve(kv, request)
    stored = {event.group_idx: event for event in kv.take_events()}
    for group, event in stored.items():
        hashes = [maybe_convert_block_hash(h) for h in request.block_hashes]
        assert event.block_hashes == [hashes[i] for i in sorted(cached_pages(kv, request, group))]
    assert (stored[1].kv_cache_spec_kind, stored[1].kv_cache_spec_sliding_window) == (
        KVCacheSpecKind.SLIDING_WINDOW,
        40,
    )


@pytest.mark.parametrize("sliding", [stock_spec(8, 4), windowed_spec(8, 4, AUTO)])
def test_vllm_announces_pages_of_sliding_groups_that_are_not_there(sliding: Any) -> None:
    """Why ``--kv-events-config`` is refused: once vLLM tells the truth, it can be served."""
    kv = make_kv(sliding, retention=0, events=True)
    first, again = (make_request(name, range(41), 4) for name in ("first", "again"))
    serve(kv, first)
    kv.free(first)
    kv.take_events()
    again.kv_cache_report_mode = "full"
    assert serve(kv, again) == 40
    hashes = [maybe_convert_block_hash(page_hash) for page_hash in again.block_hashes]
    cached = {hashes[i] for i in cached_pages(kv, first, 0)}
    assert set(kv.take_events()[0].block_hashes) > cached


@pytest.mark.parametrize("sliding", [stock_spec(8, 4), windowed_spec(8, 4, AUTO)])
def test_vllm_names_parents_that_were_never_announced(sliding: Any) -> None:
    kv = make_kv(sliding, retention=0, events=True)
    request = make_request("r", range(41), 4)
    serve(kv, request, 20)
    request.num_computed_tokens = 20
    assert kv.allocate_slots(request, 21) is not None
    first, second = kv.take_events()
    assert second.parent_block_hash not in {None, *first.block_hashes}


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
    found = _mask(
        windowed_spec(16, 4), 243, 250, 36, use_eagle=eagle, final_segment_end_block=final
    )
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
    spec = windowed_spec(window, 16, sink_tokens=sinks)
    found = _mask(spec, 0, 16, 16, retention_interval=retention, reachable_boundaries=boundaries)
    assert found == (None if expected is None else expected | set(range(sinks)))


def test_mask_of_an_alignment_within_a_page_keeps_everything() -> None:
    assert _mask(windowed_spec(32, 16), 0, 16, 24, retention_interval=24) is None


@pytest.mark.parametrize("policy", [ALL, AUTO])
@pytest.mark.parametrize(
    ("retention", "is_told", "expected"), [(None, False, 64), (0, False, 0), (0, True, 64)]
)
def test_a_shared_prefix_is_kept_once_its_junction_is_known(
    retention: int | None, is_told: bool, expected: int, policy: PrefillPages
) -> None:
    kv = make_kv(full_spec(16), windowed_spec(32, 16, policy), num_pages=200, retention=retention)
    texts = [[7] * 64 + [own] * 32 for own in (50, 60, 70)]
    serve(kv, make_request("0", texts[0], 16))
    second = make_request("1", texts[1], 16)
    *_, junction = kv.get_computed_blocks(second)
    if retention == 0:
        assert junction == 64
    if is_told:
        second.shared_prefix_boundary = junction
    serve(kv, second)
    assert hit_tokens(kv, make_request("2", texts[2], 16)) == expected
