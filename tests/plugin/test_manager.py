"""Rules of this plugin's manager: what it charges, which holes it fills, which hits it misses."""

import logging
from collections.abc import Iterator

import pytest
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

import swa_vllm
from swa_backend.options import PrefillPages
from tests.plugin.page_machine import PageMachine, Setup
from tests.plugin.upstream.pages import (
    ALL,
    AUTO,
    full_spec,
    hit_tokens,
    make_kv,
    make_manager,
    make_request,
    serve,
    windowed_spec,
)

POOL = Setup(num_pages=40, kinds=("sliding",), max_step_tokens=300)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What vLLM's loggers say, at DEBUG level too."""
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.DEBUG, logger="vllm.swa_vllm.kv_cache.ledger"):
            yield caplog
    finally:
        logger.removeHandler(caplog.handler)


@pytest.fixture(autouse=True)
def _registered() -> None:
    swa_vllm.register()
    init_none_hash(sha256)


def test_only_hits_that_others_hold_are_not_charged() -> None:
    """A hit that nobody holds is free memory, which the request takes from the pool."""
    pool = BlockPool(100, enable_caching=True, hash_block_size=2)
    manager = make_manager(windowed_spec(6, 2, sink_tokens=1), pool)
    hit = [*pool.blocks[1:2], *[pool.null_block] * 2, *pool.blocks[2:5]]  # 1 and 2 are dead

    def charge() -> int:
        return manager.get_num_blocks_to_allocate(
            "r", 40, hit, 12, 12, 40, apply_admission_cap=True
        )

    assert charge() == 20 - 2
    pool.touch(pool.blocks[1:4])
    assert charge() == 20 - 2 - 3


def test_a_session_is_charged_for_what_it_may_still_take() -> None:
    """Pages that it needs, up to the cap beyond those that it holds."""
    pool = BlockPool(100, enable_caching=False, hash_block_size=2)
    manager = make_manager(
        windowed_spec(6, 2), pool, enable_caching=False, max_admission_blocks_per_request=9
    )
    manager.allocate_new_blocks("r", 8, 8)

    def charge(num_tokens: int) -> int:
        return manager.get_num_blocks_to_allocate(
            "r", num_tokens, [], 0, 0, num_tokens, apply_admission_cap=True
        )

    assert [charge(num_tokens) for num_tokens in (4, 8, 10, 12, 20)] == [0, 0, 1, 2, 5]
    assert manager.get_num_blocks_to_allocate("r", 4, [], 0, 0, 4) == 0  # it has more than that


def test_without_a_cap_nothing_is_reserved() -> None:
    pool = BlockPool(100, enable_caching=False, hash_block_size=2)
    manager = make_manager(
        windowed_spec(6, 2), pool, enable_caching=False, max_admission_blocks_per_request=None
    )
    manager.allocate_new_blocks("r", 8, 8)
    assert (manager.snapshot().requests_live, manager.snapshot().reserved) == (1, 0)


def _held_after_one_chunk(setup: Setup, rest_at: int | None = None) -> list[int]:
    """Pages of a prompt of 35 pages, of which the window needs the last four."""
    machine = PageMachine(setup)
    machine.add(list(range(150)), 140, rest_at)
    machine.schedule(300)
    (manager,) = machine.managers
    held = [i for i, block in enumerate(manager.req_to_blocks["1"]) if not block.is_null]
    machine.finish()
    return held


def test_of_the_holes_that_a_prompt_may_hit_the_last_are_filled() -> None:
    """The pool has 39 pages and keeps 20 of them free."""
    assert _held_after_one_chunk(POOL) == list(range(16, 35))


def test_a_session_fills_no_hole() -> None:
    """It may rest between turns for any time, and would keep what it was granted."""
    assert _held_after_one_chunk(POOL, rest_at=145) == list(range(31, 35))


def _served_below_a_junction(policy: PrefillPages) -> tuple[int, set[int]]:
    """Hit of a third prompt that differs where the first two do, and pages of the second."""
    spec = windowed_spec(32, 16, policy, drops_last_hit=True)
    kv = make_kv(full_spec(16), spec, num_pages=200, retention=0, eagle=True)
    texts = [[7] * 64 + [own] * 400 for own in (50, 60, 70)]
    serve(kv, make_request("0", texts[0], 16))
    second = make_request("1", texts[1], 16)
    *_, second.shared_prefix_boundary = kv.get_computed_blocks(second)
    serve(kv, second)
    table = kv.coordinator.single_type_managers[1].req_to_blocks["1"]
    held = {i for i, block in enumerate(table) if not block.is_null}
    return hit_tokens(kv, make_request("2", texts[2], 16)), held


def test_with_eagle_one_page_more_is_kept_below_a_junction() -> None:
    """vLLM 0.33 caches it: a prompt that differs at the junction lacks the page EAGLE drops."""
    hit, held = _served_below_a_junction(AUTO)
    assert held == {1, 2, 3, 4} | set(range(25, 29))
    assert hit == _served_below_a_junction(ALL)[0]


def _lost_tokens(num_tokens: int, **params: int) -> int:
    """Tokens that a prompt is counted to miss after one of 256 tokens stored its last pages."""
    kv: KVCacheManager = make_kv(windowed_spec(16, 16, PrefillPages.SURVIVORS))
    serve(kv, make_request("first", range(256), 16))
    (manager,) = kv.coordinator.single_type_managers
    again = Request(
        request_id="again",
        prompt_token_ids=list(range(num_tokens)),
        sampling_params=SamplingParams(max_tokens=1, **params),
        pooling_params=None,
        block_hasher=get_request_block_hasher(16, sha256),
    )
    assert serve(kv, again) == 0
    return int(manager.snapshot().prefix_lost_tokens)


def test_what_becomes_of_pages_is_logged_once_there_are_any(
    logged: pytest.LogCaptureFixture,
) -> None:
    _held_after_one_chunk(POOL)
    said = dict.fromkeys(m for m in logged.messages if m.startswith("SWA group"))
    assert list(said) == [
        "SWA group 0: 15 pages of 1 are stored for the prefix cache",
        "SWA group 0: 16 pages of 1 need not be stored",
        "SWA group 0: 19 pages were held by 1 until now",
    ]


@pytest.mark.parametrize(("num_tokens", "num_lost"), [(112, 96), (113, 112), (128, 112)])
def test_the_page_of_a_prompts_last_token_is_never_lost(num_tokens: int, num_lost: int) -> None:
    """vLLM computes the last token anyway, and so its page if the prompt ends with it."""
    assert _lost_tokens(num_tokens) == num_lost


def test_a_request_that_reads_no_prefix_cache_loses_none_of_it() -> None:
    """A request for the log-probabilities of its prompt is computed whole."""
    assert _lost_tokens(128, prompt_logprobs=1) == 0
