"""One page manager: prefix cache hits, freed pages, predicted and zeroed pages."""

import random
from collections.abc import Sequence

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    make_block_hash_with_group_id,
)

from swa_backend.options import PrefillPages
from swa_backend.window import is_visible
from swa_vllm.kv_cache.manager import SWAManager
from swa_vllm.kv_cache.spec import SWASpec
from tests.plugin.upstream.pages import (
    AUTO,
    POLICIES,
    full_spec,
    make_kv,
    make_manager,
    make_request,
    serve,
    windowed_spec,
)

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
        if is_visible(query, key, spec.sliding_window, spec.storage.sink_tokens)
    }


@pytest.mark.parametrize("pages", HITS)
def test_a_hit_is_the_longest_prefix_whose_window_is_cached(pages: str) -> None:
    spec, num_hit = windowed_spec(4, 2), HITS[pages]
    found = _hit_pages(spec, [page == "#" for page in pages])
    assert found == [i if i >= num_hit - 2 else -1 for i in range(num_hit)]


@pytest.mark.parametrize("sinks", [0, 1, 2, 5])
@pytest.mark.parametrize("window", [1, 2, 4, 5, 9])
def test_a_hit_has_all_that_its_next_query_sees(window: int, sinks: int) -> None:
    spec, rng = windowed_spec(window, 2, sink_tokens=sinks), random.Random(window)
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
        kv_cache_spec=windowed_spec(8, 4, sink_tokens=1),
        drop_eagle_block=False,
        alignment_tokens=2,
    )
    assert (blocks, num_tokens) == (pool.blocks[10:12], 8)


@pytest.mark.parametrize("sinks", [0, 1])
def test_pages_are_freed_as_the_window_leaves_them_the_later_first(sinks: int) -> None:
    pool = BlockPool(100, enable_caching=True, hash_block_size=2)
    manager = make_manager(windowed_spec(4, 2, sink_tokens=sinks), pool)
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
    manager = make_manager(windowed_spec(4, 2), pool)
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
    spec = windowed_spec(8, 2, policy, sink_tokens=sinks, spare_tokens=sinks)
    manager = make_manager(spec, pool, enable_caching=False, max_admission_blocks_per_request=4)
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
    kv = make_kv(full_spec(4, dtype=torch.float16, head_size=2), windowed_spec(8, 4, policy))
    assert kv.coordinator.kv_cache_config.needs_kv_cache_zeroing
    num_tokens = 82
    serve(kv, make_request("r", range(num_tokens), 4))
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


@pytest.mark.parametrize("sinks", [0, 1])
def test_pages_of_a_request_that_ends_are_handed_over_and_not_copied(sinks: int) -> None:
    pool = BlockPool(100, enable_caching=True, hash_block_size=2)
    manager = make_manager(windowed_spec(4, 2, sink_tokens=sinks), pool)
    num_free = pool.get_num_free_blocks()
    for name, num_tokens in (("short", 4), ("long", 22)):
        manager.allocate_new_blocks(name, num_tokens, num_tokens)
    manager.remove_skipped_blocks("long", 20)
    short, long = (manager.req_to_blocks[name] for name in ("short", "long"))
    live = [block for block in long if not block.is_null]
    assert manager.pop_blocks_for_free("short") is short
    popped = manager.pop_blocks_for_free("long")  # 0.33 leaves out null entries at its head
    assert [block for block in popped if not block.is_null] == live
    assert (popped is long) == (sinks > 0 or popped[0].is_null)
    assert not manager.req_to_blocks.keys() & {"short", "long"}
    assert all(block.ref_cnt == 1 for block in (*short, *live))
    pool.free_blocks([*reversed(popped), *reversed(short)])
    assert pool.get_num_free_blocks() == num_free
