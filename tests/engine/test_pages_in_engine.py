"""Pages of windowed layers in the real engine: freed by the window, counted, all given back."""

import pytest
from vllm import LLM

import swa_vllm
from swa_backend.pages import WindowPages, ceil_div
from tests.helpers.engines import (
    EngineFactory,
    ModelFactory,
    attention_layers,
    generate,
    greedy,
    managers,
    num_free_pages,
    scheduler,
)
from tests.helpers.tiny_models import MIXED, PAGE_SIZE, SLIDING, WINDOW, random_prompts

CHUNK = 16
PAGES = WindowPages(WINDOW, PAGE_SIZE)


@pytest.fixture
def llm(engine: EngineFactory, tiny_model: ModelFactory) -> LLM:
    return engine(tiny_model(**MIXED), max_num_batched_tokens=CHUNK, enable_prefix_caching=False)


def _add(llm: LLM, name: str, num_prompt: int, num_tokens: int) -> None:
    (prompt,) = random_prompts([num_prompt])
    llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, greedy(num_tokens))


def test_a_page_lives_exactly_as_long_as_a_later_token_sees_it(llm: LLM) -> None:
    (manager,) = managers(llm)
    before = manager.snapshot()
    _add(llm, "walk", 5 * WINDOW, 60)
    request = next(iter(scheduler(llm).requests.values()))
    peak = 0
    while llm.llm_engine.has_unfinished_requests():
        computed = request.num_computed_tokens  # settled before this step frees and allocates
        llm.llm_engine.step()
        blocks = manager.req_to_blocks.get(request.request_id, [])
        if blocks:
            dead = [block.is_null for block in blocks]
            num_dead = PAGES.first_live(computed)
            assert dead == [True] * num_dead + [False] * (len(blocks) - num_dead)
            assert manager.snapshot().live == len(blocks) - num_dead
            peak = max(peak, len(blocks) - num_dead)
    after = manager.snapshot()
    assert after.live == 0
    assert after.allocated - before.allocated == ceil_div(5 * WINDOW + 59, PAGE_SIZE)
    assert after.freed_by_window > before.freed_by_window
    assert peak <= WindowPages(WINDOW + CHUNK, PAGE_SIZE).max_survivors
    assert after.peak_live_per_request == max(peak, before.peak_live_per_request)


def test_decoding_holds_no_more_than_its_window(llm: LLM) -> None:
    (manager,) = managers(llm)
    _add(llm, "decode", 1, 10 * WINDOW)
    held = []
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        held.append(manager.snapshot().live)
    assert max(held) == PAGES.max_survivors


def _walk(llm: LLM, *, poison: bool) -> list[tuple[int, float]]:
    """Tokens and log-probabilities of a long request, freed pages poisoned after every step."""
    pool = scheduler(llm).kv_cache_manager.block_pool
    caches = [layer.kv_cache for layer in attention_layers(llm)]
    _add(llm, f"poison-{poison}", 3 * WINDOW, 60)
    held, answer, num_poisoned = set[int](), [], 0
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            best = output.outputs[0]
            answer = [
                (token, step[token].logprob)
                for token, step in zip(best.token_ids, best.logprobs, strict=True)
            ]
        now = {block.block_id for block in pool.blocks if block.ref_cnt and not block.is_null}
        for page in (held - now) if poison else ():
            num_poisoned += 1
            for cache in caches:
                # Not NaN: the page may be allocated again next, and vLLM's CPU kernels multiply
                # what lies in its unwritten slots by a weight of zero.
                cache[page] = 1e4
        held |= now
    assert num_poisoned > 0 or not poison
    return answer


def test_freed_pages_are_never_read(llm: LLM) -> None:
    """Overwritten, they change no bit of the output."""
    assert _walk(llm, poison=True) == _walk(llm, poison=False)


@pytest.mark.parametrize("steps", [1, 7, 40])
def test_aborted_requests_give_every_page_back(llm: LLM, steps: int) -> None:
    num_free = num_free_pages(llm)
    names = ["a", "b", "c"]
    for name in names:
        _add(llm, name, 3 * WINDOW, 100)
    for _ in range(steps):
        llm.llm_engine.step()
    assert num_free_pages(llm) < num_free
    llm.llm_engine.abort_request(names)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    llm.llm_engine.step()
    assert num_free_pages(llm) == num_free
    assert managers(llm)[0].snapshot().live == 0


@pytest.mark.everywhere
def test_preempted_requests_finish_with_the_same_tokens(
    engine: EngineFactory, tiny_model: ModelFactory
) -> None:
    model = tiny_model(**MIXED)
    prompts = random_prompts([2 * WINDOW] * 4)
    common = {"enable_prefix_caching": False, "max_model_len": 256}
    roomy = generate(engine(model, **common), prompts, num_tokens=150)
    llm = engine(model, **common, num_gpu_blocks_override=28)
    num_free = num_free_pages(llm)
    tight = generate(llm, prompts, num_tokens=150)
    # 4 requests of 8 full and 3 window pages do not fit into 27: some had to start over.
    allocated = managers(llm)[0].snapshot().allocated
    assert allocated > 4 * ceil_div(2 * WINDOW + 149, PAGE_SIZE)
    assert [a.tokens for a in tight] == [a.tokens for a in roomy]
    assert num_free_pages(llm) == num_free


def test_one_group_for_all_layers_serves_the_same_tokens(
    engine: EngineFactory, tiny_model: ModelFactory
) -> None:
    """vLLM's single-group mode keeps every page; the windows still hold."""
    model = tiny_model(**MIXED)
    prompts = random_prompts([1, 3 * WINDOW])
    expected = generate(engine(model), prompts)
    llm = engine(model, disable_hybrid_kv_cache_manager=True)
    assert not managers(llm)
    assert swa_vllm.stats(llm) == {}
    assert [a.tokens for a in generate(llm, prompts)] == [a.tokens for a in expected]


def test_all_sliding_model_has_windowed_groups_only(
    engine: EngineFactory, tiny_model: ModelFactory
) -> None:
    llm = engine(tiny_model(**SLIDING))
    assert len(managers(llm)) == len(scheduler(llm).kv_cache_config.kv_cache_groups)
