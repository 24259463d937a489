"""Layers whose generated tokens alone have a window: what they keep, free and charge."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.request import Request

import swa_vllm
from swa_backend.pages import ceil_div
from swa_backend.window import Phase, is_visible
from swa_vllm.kv_cache.prompt_cache import PromptCacheSpec
from swa_vllm.kv_cache.prompt_window import PromptWindowManager, PromptWindowSpec
from tests.helpers.engines import ModelFactory
from tests.helpers.tiny_models import FULL
from tests.plugin.upstream.pages import (
    cached_pages,
    full_spec,
    hit_tokens,
    make_kv,
    make_request,
    serve,
)

PAGE = 4


def _spec(page: int = PAGE, **fields: Any) -> PromptWindowSpec:
    return PromptWindowSpec.from_stock(full_spec(page), None, **{"window": 6, **fields})


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    swa_vllm.register()
    init_none_hash(sha256)


def _manager(kv: KVCacheManager) -> PromptWindowManager:
    (manager,) = kv.coordinator.single_type_managers
    assert isinstance(manager, PromptWindowManager)
    return manager


def _stored(kv: KVCacheManager) -> set[int]:
    """Pages of the only request that are stored; the pool has no more in use."""
    (table,) = _manager(kv).req_to_blocks.values()
    stored = {i for i, block in enumerate(table) if not block.is_null}
    # The null page is in no queue.
    assert kv.block_pool.num_gpu_blocks - 1 - kv.block_pool.get_num_free_blocks() == len(stored)
    return stored


def _answer(kv: KVCacheManager, request: Request, num_tokens: int) -> None:
    """Generate tokens, each in a step of its own."""
    for token in range(num_tokens):
        request.num_computed_tokens = request.num_tokens
        request.append_output_token_ids(500 + token)
        assert kv.allocate_slots(request, 1) is not None


def _answered(kv: KVCacheManager, num_tokens: int = 5 * PAGE) -> Request:
    """A request that has freed pages of its answer behind a prompt of nearly three pages."""
    request = make_request("a", range(3 * PAGE - 1), PAGE)
    serve(kv, request)
    _answer(kv, request, num_tokens)
    return request


def _charge(kv: KVCacheManager, request: Request, num_tokens: int) -> int:
    """Pages that must be free before the request may start."""
    return _manager(kv).get_num_blocks_to_allocate(
        request.request_id, num_tokens, [], 0, 0, num_tokens, apply_admission_cap=True
    )


def _check_counts(kv: KVCacheManager, num_held: int, num_pinned: int) -> None:
    """What the manager counts of its only request: pages of the prompt, the window, and beyond."""
    spec, counts = _manager(kv).kv_cache_spec, _manager(kv).snapshot()
    num_prompt = min(num_held, ceil_div(num_pinned, spec.block_size))
    decoding = ceil_div(spec.window - 1, spec.block_size) + 1
    decoding += ceil_div(spec.lookahead_tokens + spec.spare_tokens, spec.block_size)
    num_window = min(num_held - num_prompt, decoding)
    assert (counts.live_prompt, counts.live_window, counts.live) == (
        num_prompt,
        num_window,
        num_held,
    )
    assert counts.allocated - counts.freed_by_window == num_held
    assert (counts.requests_live, counts.live_sink) == (1, 0)
    assert counts.reserved == spec.charge(num_pinned)


def _compute(
    spec: PromptWindowSpec, request: Request, steps: list[int], num_in_flight_steps: int
) -> int:
    """Compute a text in steps, of which some are not settled; the most pages held at once.

    After each step a page is not stored iff no query that is not settled sees any of its tokens.
    """
    kv = make_kv(spec)
    prompt_len, page, most = request.num_prompt_tokens, spec.block_size, 0
    for index, num_tokens in enumerate(steps):
        in_flight = sum(steps[max(0, index + 1 - num_in_flight_steps) : index])
        request.num_computed_tokens = sum(steps[:index])
        request.num_in_flight_tokens = in_flight
        settled = request.num_computed_tokens - in_flight
        kv.allocate_slots(request, num_tokens, num_lookahead_tokens=spec.lookahead_tokens)
        end = request.num_computed_tokens + num_tokens
        ahead = spec.lookahead_tokens + spec.spare_tokens
        num_pages = ceil_div(end + ahead, page)
        seen = {
            key // page
            for key in range(num_pages * page)
            for query in range(settled, num_pages * page)
            if is_visible(query, key, spec.window, spec.sink_tokens, Phase.DECODE, prompt_len)
        }
        assert _stored(kv) == seen
        _check_counts(kv, len(seen), max(prompt_len, spec.sink_tokens))
        most = max(most, len(seen))
    return most


@given(
    window=st.integers(1, 14),
    page=st.sampled_from([1, 3, 4]),
    sinks=st.sampled_from([0, 0, 2, 9]),
    spare=st.sampled_from([0, 6]),
    lookahead=st.sampled_from([0, 2]),
    prompt_len=st.integers(1, 16),
    steps=st.lists(st.sampled_from([1, 1, 1, 2, 5, 9]), min_size=1, max_size=15),
    num_in_flight_steps=st.integers(1, 2),
)
def test_pages_that_no_later_query_sees_are_freed_at_once(
    window: int,
    page: int,
    sinks: int,
    spare: int,
    lookahead: int,
    prompt_len: int,
    steps: list[int],
    num_in_flight_steps: int,
) -> None:
    """However the prompt, and an answer that is computed again, are cut into steps."""
    in_flight = (sum(steps[i : i + num_in_flight_steps]) for i in range(len(steps)))
    spec = _spec(
        page,
        window=window,
        sink_tokens=sinks,
        spare_tokens=spare,
        lookahead_tokens=lookahead,
        max_in_flight_tokens=max(in_flight),
    )
    request = make_request("a", range(prompt_len), page)
    request.append_output_token_ids([500] * max(0, sum(steps) - prompt_len))
    assert _compute(spec, request, steps, num_in_flight_steps) <= spec.charge(prompt_len)


@pytest.mark.parametrize("prompt_len", [1, PAGE, PAGE + 1])
@pytest.mark.parametrize("step", [1, 3, 5])
@pytest.mark.parametrize("spare", [0, 5])
def test_no_fewer_pages_are_charged_than_a_long_answer_takes(
    prompt_len: int, step: int, spare: int
) -> None:
    """Steps of a size that no page is a multiple of come to lie in every way across pages."""
    spec = _spec(spare_tokens=spare, max_in_flight_tokens=step)
    request = make_request("a", range(prompt_len), PAGE)
    request.append_output_token_ids([500] * 60)
    assert _compute(spec, request, [step] * (60 // step), 1) == spec.charge(prompt_len)


def test_a_request_that_starts_over_is_charged_no_more_than_it_will_hold() -> None:
    """A short text is charged its pages, an endless one those of its prompt and its window."""
    spec = _spec(spare_tokens=6, max_in_flight_tokens=8)
    kv = make_kv(spec)
    request = _answered(kv)
    kv.free(request)
    full = {num_tokens: ceil_div(num_tokens + 6, PAGE) for num_tokens in (11, 13, 33, 200)}
    charges = {num_tokens: _charge(kv, request, num_tokens) for num_tokens in full}
    assert charges == {n: min(pages, spec.charge(3 * PAGE - 1)) for n, pages in full.items()}
    assert charges[33] < full[33]
    fresh = make_request("b", range(200), PAGE)  # nobody has told the length of its prompt
    assert _charge(kv, fresh, 200) == full[200]


def test_without_prefix_caching_full_attentions_pages_are_charged() -> None:
    """No manager is shown a request then, so none knows where the prompt ends."""
    kv = make_kv(_spec(spare_tokens=6, max_in_flight_tokens=8), caching=False)
    request = _answered(kv)
    assert _stored(kv) == {0, 1, 2, 6, 7, 8, 9}
    kv.free(request)
    assert _charge(kv, request, 200) == ceil_div(206, PAGE)


def test_no_request_is_promised_more_than_the_longest_takes() -> None:
    spec = _spec(spare_tokens=6, max_in_flight_tokens=1000)
    assert spec.charge(9) > 200
    assert replace(spec, max_model_len=40).charge(9) == ceil_div(40 + 6, PAGE)
    few = replace(spec, max_in_flight_tokens=1)
    assert replace(few, max_model_len=40).charge(9) == few.charge(9) < 12


def test_a_dropped_request_is_forgotten() -> None:
    kv = make_kv(_spec(max_in_flight_tokens=8))
    request = _answered(kv)
    kv.free(request)
    assert _charge(kv, request, 200) < 50
    del request
    assert _charge(kv, make_request("a", range(2), PAGE), 200) == 50


def test_a_session_frees_nothing() -> None:
    """The next turn is a prompt, whose queries see every token before them."""
    kv = make_kv(_spec())
    request = make_request("a", range(3 * PAGE - 1), PAGE)
    request.resumable = True
    serve(kv, request)
    _answer(kv, request, 5 * PAGE)
    assert _stored(kv) == set(range(8))
    request.num_prompt_tokens = request.num_tokens
    _answer(kv, request, 5 * PAGE)
    assert _stored(kv) == set(range(13))
    assert _charge(kv, request, 200) == 50 - 13  # as full attention, what it holds is not asked for
    request.resumable = False  # it was the last turn
    _answer(kv, request, 1)
    assert _stored(kv) == set(range(8)) | {11, 12}


def test_a_session_without_prefix_caching_that_goes_on_is_an_error() -> None:
    kv = make_kv(_spec(), caching=False)
    request = _answered(kv)
    request.num_prompt_tokens = request.num_tokens
    with pytest.raises(RuntimeError, match=r"freed: .* needs prefix caching; remove --no-enable"):
        _answer(kv, request, 1)
    kv.free(request)  # all is computed anew, as the prompt that it is now
    request.num_computed_tokens = 0
    serve(kv, request)
    assert _stored(kv) == set(range(8))


def test_a_session_without_prefix_caching_goes_on_where_nothing_was_freed() -> None:
    kv = make_kv(_spec(), caching=False)
    request = _answered(kv, 5)
    request.num_prompt_tokens = request.num_tokens
    _answer(kv, request, 5 * PAGE)
    assert _stored(kv) == {0, 1, 2, 3, 7, 8}
    _check_counts(kv, 6, request.num_prompt_tokens)


def test_no_page_of_an_answer_is_cached() -> None:
    kv = make_kv(_spec())
    request = _answered(kv)
    assert cached_pages(kv, request, 0) == {0, 1}
    assert hit_tokens(kv, make_request("b", request.all_token_ids, PAGE)) == 2 * PAGE
    kv.free(request)
    request.num_computed_tokens = 0
    assert serve(kv, request) == 0  # and the request itself looks nothing up
    assert cached_pages(kv, request, 0) == {0, 1}  # after a step across the end of its prompt


def test_pages_of_a_prompt_that_others_hit_stay_cached() -> None:
    kv = make_kv(_spec())
    request = _answered(kv)
    other = make_request("b", [*range(3 * PAGE - 1), 7], PAGE)
    assert serve(kv, other) == 2 * PAGE
    kv.free(request)
    _answer(kv, other, 5 * PAGE)
    assert _stored(kv) == {0, 1, 2, 6, 7}


def test_start_up_counts_the_longest_prompt_and_spare_tokens(tiny_model: ModelFactory) -> None:
    config = EngineArgs(
        str(tiny_model(**FULL)), skip_tokenizer_init=True, max_model_len=160
    ).create_engine_config()
    for spare, num_pages in ((0, 10), (1, 11), (16, 11), (17, 12)):
        spec = _spec(16, spare_tokens=spare)
        assert spec.max_memory_usage_bytes(config) == num_pages * spec.page_size_bytes
        assert spec.max_num_blocks_per_req(config, 160) == num_pages


def test_layers_of_other_kinds_do_not_join_their_group() -> None:
    """vLLM would give all layers of a uniform model one spec, the first one's."""
    spec, everything = _spec(), PromptCacheSpec.from_stock(full_spec(PAGE), None)
    assert spec.is_uniform_with_collection({"0": spec, "1": _spec()})
    for other in (everything, _spec(window=7), full_spec(PAGE)):
        kinds = {"0": spec, "1": other}
        assert not spec.is_uniform_with_collection(kinds)
        with pytest.raises(AssertionError, match="pages of several kinds"):
            spec.merge([spec, other])
    assert not everything.is_uniform_with_collection({"0": everything, "1": spec})
