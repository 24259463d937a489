"""Prefill chunks in the real engine that store only what a later token can see."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
from vllm import LLM, EngineArgs
from vllm.config import VllmConfig

from swa_backend.metrics import PageCounts
from swa_backend.options import SWAConfigError
from swa_backend.pages import WindowPages, ceil_div
from swa_vllm.attention.cpu.builder import SWACPUMetadataBuilder
from swa_vllm.config import swa_config
from swa_vllm.config.implementation import Implementation
from swa_vllm.config.swa_config import SWAConfig
from swa_vllm.models.guard import refusing_windows
from swa_vllm.refusals import check_servable
from tests.helpers.engines import (
    Answer,
    EngineFactory,
    ModelFactory,
    attention_layers,
    generate,
    managers,
    num_free_pages,
)
from tests.helpers.tiny_models import FULL, MIXED, PAGE_SIZE, SLIDING, WINDOW, random_prompts

PAGES = WindowPages(WINDOW, PAGE_SIZE)
LENGTHS = (7, 3 * WINDOW, 9 * WINDOW, 11 * WINDOW)


def _options(prefill_pages: str, **options: Any) -> dict[str, Any]:
    return {"additional_config": {"swa": {"prefill_pages": prefill_pages, **options}}}


def test_a_request_holds_its_window_and_not_its_chunk(
    engine: EngineFactory, tiny_model: ModelFactory
) -> None:
    prompts = random_prompts(LENGTHS)

    def serve(policy: str) -> tuple[list[Answer], PageCounts]:
        llm = engine(tiny_model(**SLIDING), enable_prefix_caching=False, **_options(policy))
        answers = generate(llm, prompts)
        return answers, managers(llm)[0].snapshot()

    all_answers, all_counts = serve("all")
    answers, counts = serve("survivors")
    assert answers == all_answers
    assert (all_counts.skipped, counts.skipped > 0) == (0, True)
    assert all_counts.peak_live_per_request >= ceil_div(11 * WINDOW, PAGE_SIZE)
    assert counts.peak_live_per_request <= PAGES.max_held(1, 512)


def test_holes_and_decodes_share_a_batch(engine: EngineFactory, tiny_model: ModelFactory) -> None:
    """Requests that come while others decode: one step serves both, in several parts."""
    llm = engine(tiny_model(**MIXED), enable_prefix_caching=False, **_options("survivors"))
    prompts = random_prompts([9 * WINDOW, 5, 8 * WINDOW, 11, 7 * WINDOW], seed=5)
    alone = [generate(llm, [prompt])[0].tokens for prompt in prompts]
    # max_num_seqs lets a few in at first; the others join while those decode.
    together = generate(llm, prompts * 3)
    assert [answer.tokens for answer in together] == alone * 3


def test_groups_share_scratch_pages(engine: EngineFactory, tiny_model: ModelFactory) -> None:
    options = _options("survivors", window=WINDOW, full_attention_layers="0")
    llm = engine(tiny_model(**FULL), enable_prefix_caching=False, **options)
    generate(llm, random_prompts([9 * WINDOW]))
    worker = llm.llm_engine.model_executor.driver_worker.worker
    builders = [
        g.get_metadata_builder() for groups in worker.model_runner.attn_groups for g in groups
    ]
    windowed = [b for b in builders if isinstance(b, SWACPUMetadataBuilder)]
    assert len(windowed) == 3
    (pages,) = windowed[0]._scratch.values()
    assert all(list(b._scratch.values()) == [pages] for b in windowed)


def _serve_branches(llm: LLM) -> list[int]:
    """Cached tokens of three prompts that share their first 200 tokens, far from their ends.

    vLLM notices the junction at the second prompt, keeps it from then on, and the third hits it.
    """
    assert llm.reset_prefix_cache()
    shared, *rest = random_prompts([200, 100, 100, 100], seed=3)
    return [generate(llm, [shared + own])[0].num_cached_tokens for own in rest]


def test_room_for_the_prefix_cache_is_used(engine: EngineFactory, tiny_model: ModelFactory) -> None:
    model = tiny_model(**MIXED)
    expected = _serve_branches(engine(model, **_options("all")))
    assert expected == [0, 0, 192]
    assert _serve_branches(engine(model, **_options("auto"))) == expected


def test_what_skipping_costs_the_prefix_cache_is_counted(
    engine: EngineFactory, tiny_model: ModelFactory
) -> None:
    llm = engine(tiny_model(**MIXED), **_options("survivors"))
    lost_before = managers(llm)[0].snapshot().prefix_lost_tokens
    assert _serve_branches(llm) == [0, 0, 0]
    assert managers(llm)[0].snapshot().prefix_lost_tokens - lost_before == 192


@pytest.mark.everywhere
def test_sent_again_the_same_prompt_hits(engine: EngineFactory, tiny_model: ModelFactory) -> None:
    """Whatever its length: the survivors of a chunk are what the next prompt needs."""
    llm = engine(tiny_model(**SLIDING), **_options("survivors"))
    for length in range(6 * PAGE_SIZE, 7 * PAGE_SIZE + 1, 3):
        prompts = random_prompts([length], seed=length)
        first = generate(llm, prompts, num_tokens=2)
        again = generate(llm, prompts, num_tokens=2)
        assert again[0].tokens == first[0].tokens
        assert again[0].num_cached_tokens == (length - 1) // PAGE_SIZE * PAGE_SIZE


def test_a_pool_too_small_for_stock_vllm_serves(
    engine: EngineFactory, tiny_model: ModelFactory, describe_stock: Callable[..., Any]
) -> None:
    model, pool = tiny_model(**SLIDING), {"num_gpu_blocks_override": 9}
    assert "KV cache" in describe_stock(model, **pool)["error"]
    prompts = random_prompts(LENGTHS)
    tight = generate(engine(model, **pool), prompts)
    roomy = generate(engine(model), prompts)
    assert [a.tokens for a in tight] == [a.tokens for a in roomy]


def test_a_pool_too_small_names_the_length_that_fits_and_serves_it(
    engine: EngineFactory, tiny_model: ModelFactory
) -> None:
    """7 pages: 96 tokens take 3 of each kind of layer, one token more takes 4."""
    model, small = tiny_model(**MIXED), {"num_gpu_blocks_override": 8}
    with pytest.raises(ValueError, match="estimated maximum model length is 96"):
        engine(model, **small)
    longest = random_prompts([66])
    roomy = generate(engine(model), longest, num_tokens=30)
    llm = engine(model, **small, max_model_len=-1)  # as much as fits
    assert llm.llm_engine.vllm_config.model_config.max_model_len == 96
    assert generate(llm, longest, num_tokens=30)[0].tokens == roomy[0].tokens


def test_preempted_requests_start_over(engine: EngineFactory, tiny_model: ModelFactory) -> None:
    model, prompts = tiny_model(**MIXED), random_prompts([6 * WINDOW] * 4)
    common = {"max_model_len": 400, "enable_prefix_caching": False, **_options("survivors")}
    llm = engine(model, **common)
    roomy = generate(llm, prompts, num_tokens=100)
    needed = managers(llm)[0].snapshot().allocated
    del llm
    llm = engine(model, num_gpu_blocks_override=53, **common)
    num_free = num_free_pages(llm)
    tight = generate(llm, prompts, num_tokens=100)
    assert managers(llm)[0].snapshot().allocated > needed  # some started over
    assert [a.tokens for a in tight] == [a.tokens for a in roomy]
    assert num_free_pages(llm) == num_free


def test_reading_a_page_that_was_not_kept_is_found_out(
    engine: EngineFactory,
    tiny_model: ModelFactory,
    no_engine: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two survivors fewer: the next query reads the null page, which holds NaN."""
    llm = engine(tiny_model(**SLIDING), seed=9, **_options("survivors"))
    first_survivor = WindowPages.first_survivor
    monkeypatch.setattr(WindowPages, "first_survivor", lambda s, n: first_survivor(s, n) + 2)
    where = r"layers\.0\.self_attn\.attn for request .*0.* at position 270"
    with pytest.raises(RuntimeError, match=f"NaN in the output of model.{where}"):
        generate(llm, random_prompts([270]))
    del llm
    no_engine()  # it holds what it was serving


def test_null_page_is_poisoned(engine: EngineFactory, tiny_model: ModelFactory) -> None:
    llm = engine(tiny_model(**MIXED))
    generate(llm, random_prompts([2 * WINDOW]))
    assert all(layer.kv_cache[0].isnan().all() for layer in attention_layers(llm))


def test_poison_refuses_an_engine_in_another_process(
    tiny_model: ModelFactory,
    vllm_variables: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    vllm_variables.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(RuntimeError, match="Engine core initialization failed"):
        LLM(
            str(tiny_model(**SLIDING)),
            dtype="float32",
            enforce_eager=True,
            skip_tokenizer_init=True,
            additional_config={"swa": {"debug_poison": True}},
        )
    output = capfd.readouterr()
    assert "debug_poison works only with scheduler and worker in the main process" in (
        output.out + output.err
    )


def _config(tiny_model: ModelFactory, **options: Any) -> VllmConfig:
    """Of an engine for the sliding checkpoint, with ``swa`` options."""
    return EngineArgs(
        str(tiny_model(**SLIDING)),
        skip_tokenizer_init=True,
        dtype="float32",
        additional_config={"swa": options},
    ).create_engine_config()


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_are_refused(
    system: str, tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tiny_model)
    monkeypatch.setattr(sys, "platform", system)
    with pytest.raises(SWAConfigError, match=f"served on Linux only, this is {system}; serve"):
        check_servable(config, SWAConfig.from_vllm(config))


def test_no_gpu_backend_stores_every_page(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pages(policy: str) -> str:
        config = _config(tiny_model, prefill_pages=policy)
        swa = SWAConfig.from_vllm(config)
        check_servable(config, swa)
        return swa.storage.prefill_pages.value

    assert [pages(policy) for policy in ("auto", "survivors", "all")] == [
        "auto",
        "survivors",
        "all",
    ]
    monkeypatch.setattr(swa_config, "implementation_of", lambda _: Implementation.STOCK)
    assert pages("auto") == pages("all") == "all"
    with pytest.raises(ValueError, match="reads a chunk's keys from pages"):
        pages("survivors")


def test_a_guard_needs_nothing_of_the_engine_to_see_a_window(tiny_model: ModelFactory) -> None:
    """An untested vLLM may lack what else is decided from its config."""
    config = _config(tiny_model, prefill_pages="survivors")
    config.scheduler_config = None  # type: ignore[assignment]
    guarded = refusing_windows(type("Stock", (), {}), "because")
    with pytest.raises(RuntimeError, match="asks for sliding windows: because"):
        guarded(vllm_config=config)  # type: ignore[call-arg]
