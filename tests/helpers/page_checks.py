"""What holds of a page manager and its pool after every step, in the real engine and without one.

Derived from the spec that the manager serves, and not by the arithmetic it uses itself.
"""

from collections.abc import Iterable
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.request import Request

from swa_backend.options import PrefillPages
from swa_backend.pages import ceil_div
from swa_backend.window import Phase, first_visible
from swa_vllm.kv_cache.manager import SWAManager
from swa_vllm.kv_cache.prompt_window import PromptWindowManager


def check_held(
    manager: SWAManager, request_id: str, num_settled: int, num_scheduled: int = 0
) -> None:
    """A request that was just scheduled holds its sinks, no dead page, and what was promised.

    Args:
        num_settled: tokens computed for good before the step.
        num_scheduled: tokens of all steps before it, in flight or not.
    """
    spec, blocks = manager.kv_cache_spec, manager.req_to_blocks[request_id]
    held = [i for i, block in enumerate(blocks) if not block.is_null]
    kept = spec.sliding_window + spec.replayed_tokens
    if spec.frees_by_schedule:
        num_settled = max(num_settled, num_scheduled - spec.rollback_tokens)
    first = first_visible(max(0, num_settled), kept) // spec.block_size
    sinks = range(ceil_div(spec.storage.sink_tokens, spec.block_size))
    assert all(i in sinks or i >= first for i in held)
    assert held[: len(sinks)] == list(sinks)[: len(blocks)]
    assert manager._held[request_id].live == len(held)
    # Grants may go beyond; they are given back at the next step.
    if spec.storage.prefill_pages is not PrefillPages.AUTO or not manager.enable_caching:
        assert manager.max_admission_blocks_per_request is not None
        assert len(held) <= manager.max_admission_blocks_per_request


def check_held_by_answer(manager: PromptWindowManager, request: Request, num_settled: int) -> None:
    """A request that was just scheduled holds what its prompt and its window need, and no more."""
    spec, blocks = manager.kv_cache_spec, manager.req_to_blocks[request.request_id]
    prompt_len = request.num_prompt_tokens
    held = [i for i, block in enumerate(blocks) if not block.is_null]
    first = first_visible(num_settled, spec.window, Phase.DECODE, prompt_len) // spec.block_size
    kept = ceil_div(max(spec.sink_tokens, prompt_len), spec.block_size)
    assert held == [i for i in range(len(blocks)) if i < kept or i >= first]
    assert len(held) <= spec.charge(prompt_len)


def check_counts(manager: SWAManager) -> None:
    """What a manager counts as held now is what its tables hold."""
    spec, tables = manager.kv_cache_spec, manager.req_to_blocks.values()
    held = [[not block.is_null for block in blocks] for blocks in tables if blocks]
    num_sinks = ceil_div(spec.storage.sink_tokens, spec.block_size)
    ahead = spec.storage.spare_tokens + spec.lookahead_tokens
    decoding = manager._pages.max_survivors + ceil_div(ahead, spec.block_size)
    behind = [sum(pages[num_sinks:]) for pages in held]
    counts = manager.snapshot()
    assert counts.live_sink == sum(sum(pages[:num_sinks]) for pages in held)
    assert counts.live_window == sum(min(n, decoding) for n in behind)
    assert counts.live_prefill == sum(max(0, n - decoding) for n in behind)
    assert counts.requests_live == len(held)
    assert manager.max_admission_blocks_per_request is not None
    assert counts.reserved == len(held) * manager.max_admission_blocks_per_request


def check_counts_of_answers(manager: PromptWindowManager, requests: Iterable[Request]) -> None:
    """What a manager counts as held now is what the tables of its ``requests`` hold."""
    spec, pinned, live, reserved = manager.kv_cache_spec, 0, 0, 0
    for request in requests:
        held = sum(not block.is_null for block in manager.req_to_blocks[request.request_id])
        num_pinned = max(spec.sink_tokens, request.num_prompt_tokens)
        pinned += min(held, ceil_div(num_pinned, spec.block_size))
        live += held
        reserved += spec.charge(request.num_prompt_tokens)
    counts = manager.snapshot()
    assert (counts.live_prompt, counts.live, counts.live_sink) == (pinned, live, 0)
    assert counts.reserved == reserved


def held_pages(pool: BlockPool) -> list[int]:
    """Pages of a pool that someone holds."""
    return [b.block_id for b in pool.blocks if b.ref_cnt and not b.is_null]


def check_nothing_held(pool: BlockPool, managers: Iterable[Any]) -> None:
    """After all requests ended: every page is free, and every count and table says so."""
    assert not held_pages(pool)
    assert pool.get_num_free_blocks() == len(pool.blocks) - 1  # all but the null page
    for manager in managers:
        assert not manager.req_to_blocks
        if isinstance(manager, SWAManager | PromptWindowManager):
            counts = manager.snapshot()
            assert counts.live == counts.requests_live == counts.reserved == 0
            assert len(manager._held) == 0
