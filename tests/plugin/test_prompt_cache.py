"""Layers that hold every page, of which the prefix cache keeps those of prompts."""

import pytest
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.request import Request

import swa_vllm
from swa_vllm.kv_cache.prompt_cache import PromptCacheSpec
from swa_vllm.kv_cache.prompt_window import PromptWindowSpec
from tests.plugin.upstream.pages import (
    cached_pages,
    full_spec,
    hit_tokens,
    make_kv,
    make_request,
    serve,
    stock_spec,
)

PAGE = 4
SPEC = PromptCacheSpec.from_stock(full_spec(PAGE), None)
WINDOWED = PromptWindowSpec.from_stock(full_spec(PAGE), None, window=2)


@pytest.fixture(autouse=True)
def _registered() -> None:
    swa_vllm.register()
    init_none_hash(sha256)


def _answer(kv: KVCacheManager, request: Request, num_tokens: int) -> None:
    """Generate tokens, each in a step of its own."""
    for token in range(num_tokens):
        request.num_computed_tokens = request.num_tokens
        request.append_output_token_ids(500 + token)
        assert kv.allocate_slots(request, 1) is not None


def test_layers_with_and_without_a_window_have_one_spec() -> None:
    assert PromptCacheSpec.from_stock(stock_spec(7, PAGE), None) == SPEC
    assert SPEC.merge([SPEC, SPEC]) == SPEC


@pytest.mark.parametrize(
    "other",
    [full_spec(PAGE), PromptCacheSpec.from_stock(full_spec(2 * PAGE), None)],
    ids=["stock", "other pages"],
)
def test_other_layers_do_not_join_their_group(other: PromptCacheSpec) -> None:
    """vLLM takes layers for one group if this raises nothing, and would cache all answers."""
    with pytest.raises(AssertionError, match="pages of several kinds"):
        SPEC.merge([SPEC, other])


def test_pages_inside_the_prompt_are_cached_and_no_others() -> None:
    kv = make_kv(SPEC)
    request = make_request("a", range(2 * PAGE + 1), PAGE)
    serve(kv, request, PAGE)  # a chunk, at whose end a page ends
    assert not request.skip_reading_prefix_cache
    request.num_computed_tokens = PAGE
    assert kv.allocate_slots(request, PAGE + 1) is not None
    assert request.skip_reading_prefix_cache  # its next token is an answer
    _answer(kv, request, 3 * PAGE)
    assert cached_pages(kv, request, 0) == {0, 1}
    assert hit_tokens(kv, make_request("b", request.all_token_ids, PAGE)) == 2 * PAGE


def test_a_request_that_starts_over_inside_its_answer_looks_nothing_up() -> None:
    """The text so far may be the prompt of another, whose keys are not its own."""
    kv = make_kv(SPEC)
    request = make_request("a", range(2 * PAGE), PAGE)
    serve(kv, request)
    _answer(kv, request, 2 * PAGE)
    serve(kv, make_request("b", [*request.all_token_ids, 7], PAGE))
    assert hit_tokens(kv, make_request("c", [*request.all_token_ids, 7], PAGE)) == 4 * PAGE
    kv.free(request)
    request.num_computed_tokens = 0
    assert serve(kv, request) == 0


def test_accepted_drafts_of_an_answer_are_not_looked_up_either() -> None:
    """With groups of two kinds a manager is told of whole pages only, here of none that answers."""
    kv = make_kv(SPEC, WINDOWED)
    request = make_request("a", range(2 * PAGE - 2), PAGE)
    serve(kv, request)
    request.num_computed_tokens = request.num_tokens
    request.append_output_token_ids([500, 501, 502, 503])  # three of them drafts
    serve(kv, make_request("b", [*request.all_token_ids, 7], PAGE))
    kv.free(request)
    request.num_computed_tokens = 0
    assert serve(kv, request) == 0


@pytest.mark.parametrize("others", [(), (WINDOWED,)], ids=["alone", "beside other groups"])
@pytest.mark.parametrize("left", [0, 2])
def test_the_next_turn_of_a_session_caches_no_answer(
    others: tuple[PromptCacheSpec, ...], left: int
) -> None:
    """It moves the end of the prompt beyond tokens whose keys are made.

    Of a prompt that leaves two slots of a page the answer is so short that it ends no page.
    """
    kv = make_kv(SPEC, *others)
    request = make_request("a", range(2 * PAGE - left), PAGE)
    request.resumable = True
    serve(kv, request)
    _answer(kv, request, 1 if left else 2 * PAGE - 1)
    num_turn = 4 * PAGE - request.num_tokens
    request.append_output_token_ids([600 + token for token in range(num_turn)])
    request.num_prompt_tokens = request.num_tokens
    request.num_computed_tokens = request.num_tokens - num_turn
    assert kv.allocate_slots(request, num_turn) is not None
    assert cached_pages(kv, request, 0) == ({0} if left else {0, 1})
    kv.free(request)  # all is computed anew, as the prompt that it is now
    request.num_computed_tokens = 0
    serve(kv, request)
    assert cached_pages(kv, request, 0) == {0, 1, 2, 3}
