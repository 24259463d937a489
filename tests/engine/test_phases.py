"""A window in one phase only, in the real engine, against a dense model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

import swa_vllm
from swa_backend.pages import WindowPages
from swa_vllm.attention.cpu import builder
from swa_vllm.attention.cpu.ghost_tail import SinkCopies
from swa_vllm.attention.layer import PromptCachedAttention, ReplacedAttention
from swa_vllm.kv_cache.prompt_cache import PromptCacheManager
from swa_vllm.kv_cache.prompt_window import PromptWindowManager, PromptWindowSpec
from tests.helpers.dense_qwen3 import Sight
from tests.helpers.dense_text import TextOracle
from tests.helpers.engines import (
    NGRAMS,
    Answer,
    EngineFactory,
    ModelFactory,
    attention_layers,
    check_drafts_were_verified,
    counting_preemptions,
    generate,
    num_free_pages,
    scheduler,
)
from tests.helpers.exactness import check_exact
from tests.helpers.pairwise import pairwise
from tests.helpers.tiny_models import FULL, PAGE_SIZE, random_prompts

WINDOW = 40
# Prompts that end inside a window, at pages' edges, and far beyond.
LENGTHS = (1, WINDOW - 1, 2 * PAGE_SIZE, 2 * PAGE_SIZE + 1, 3 * PAGE_SIZE - 1, 200)
LAYERS: dict[str, tuple[int | None, ...]] = {
    "sliding": (WINDOW,) * 4,
    "mixed": (WINDOW, WINDOW, WINDOW, None),
}
MIXED_EVERYWHERE = ("sliding", pytest.param("mixed", marks=pytest.mark.everywhere))
PHASES = ("prefill", "decode")
CHUNKS = {"below": 16, "equal": WINDOW, "above": 512}
SINKS = {
    "no sinks": (0, False),
    "sinks": (4, False),
    "more than a page": (33, False),
    "shifted sinks": (4, True),
}
UNSHIFTED = [name for name, (_, shift) in SINKS.items() if not shift]
Case = tuple[str, str, str, bool]
DIMENSIONS = (LAYERS, CHUNKS, SINKS, (True, False))


def _oracle(model: Path, phase: str, layers: str, sinks: str = "no sinks") -> TextOracle:
    return TextOracle(model, Sight(LAYERS[layers], *SINKS[sinks], phase=phase))


def _options(phase: str, layers: str, sinks: str = "no sinks") -> dict[str, Any]:
    num_sinks, shift = SINKS[sinks]
    options: dict[str, Any] = {"window": WINDOW, "phase": phase, "sink_tokens": num_sinks}
    if shift:
        options["position_shift"] = True
    if layers == "mixed":
        options["full_attention_layers"] = "3"
    return {"swa": options}


def _check_answers(
    case: Case, phase: str, num_tokens: int, model: Path, engine: EngineFactory
) -> LLM:
    """Answers are a dense model's, and the same again; gives the engine, which holds no page."""
    layers, chunk, sinks, caching = case
    llm = engine(
        model,
        max_num_batched_tokens=CHUNKS[chunk],
        enable_prefix_caching=caching,
        additional_config=_options(phase, layers, sinks),
    )
    assert {s for layer in attention_layers(llm) if (s := layer.sliding_window)} == {WINDOW}
    num_free = num_free_pages(llm)
    prompts = random_prompts(LENGTHS)
    answers = generate(llm, prompts, num_tokens)
    check_exact(prompts, answers, _oracle(model, phase, layers, sinks))
    assert num_free_pages(llm) == num_free
    again = generate(llm, prompts, num_tokens)
    assert [a.tokens for a in again] == [a.tokens for a in answers]
    assert (again[-1].num_cached_tokens > 0) == caching
    return llm


@pytest.mark.parametrize("case", pairwise(*DIMENSIONS), ids=str)
def test_prefill_phase_equals_a_dense_model(
    case: Case, tiny_model: ModelFactory, engine: EngineFactory
) -> None:
    llm = _check_answers(case, "prefill", 24, tiny_model(**FULL), engine)
    assert swa_vllm.stats(llm) == {}  # no page leaves a window


@pytest.mark.parametrize("case", pairwise(LAYERS, CHUNKS, UNSHIFTED, (True, False)), ids=str)
def test_decode_phase_equals_a_dense_model(
    case: Case, tiny_model: ModelFactory, engine: EngineFactory
) -> None:
    llm = _check_answers(case, "decode", 3 * WINDOW, tiny_model(**FULL), engine)
    managers = scheduler(llm).kv_cache_manager.coordinator.single_type_managers
    windowed = [m for m in managers if isinstance(m, PromptWindowManager)]
    assert len(windowed) == (1 if case[0] == "sliding" else 3)
    for manager in windowed:
        counts = manager.snapshot()
        assert counts.freed_by_window > 0
        assert counts.live == counts.requests_live == counts.reserved == 0
        assert counts.peak_live_per_request <= manager.kv_cache_spec.charge(max(LENGTHS))
    assert len(swa_vllm.stats(llm)) == len(windowed)


def _talk(llm: LLM, num_turns: int, seed: int) -> tuple[list[list[int]], list[Answer]]:
    """A conversation: each turn's prompt is the last one, its answer, and something new."""
    prompts, answers = [], []
    (text,) = random_prompts([2 * PAGE_SIZE + 7], seed=seed)
    for turn in range(num_turns):
        # So many that in either phase some are made under another mask than as a prompt.
        answers += generate(llm, [text], num_tokens=2 * WINDOW)
        prompts.append(text)
        text = text + answers[-1].tokens + random_prompts([10], seed=100 * seed + turn)[0]
    return prompts, answers


def _check_conversations(model: Path, engine: EngineFactory, phase: str, layers: str) -> None:
    """Answers become prompts: their keys are made anew, under the prompt's mask."""
    llm = engine(model, max_num_batched_tokens=64, additional_config=_options(phase, layers))
    oracle = _oracle(model, phase, layers)
    for seed, is_again in ((1, False), (2, False), (1, True), (3, False), (2, True)):
        prompts, answers = _talk(llm, 3, seed)
        check_exact(prompts, answers, oracle)
        # The second turn shares the first one's prompt with it, and nothing of its answer.
        expected = [len(p) // PAGE_SIZE * PAGE_SIZE for p in prompts[1:]]
        if not is_again:
            expected = [2 * PAGE_SIZE, expected[0]]
        assert [a.num_cached_tokens for a in answers[1:]] == expected


@pytest.mark.parametrize(
    ("phase", "layers"),
    [
        ("prefill", "sliding"),
        pytest.param("prefill", "mixed", marks=pytest.mark.everywhere),
        ("decode", "sliding"),
        ("decode", "mixed"),
    ],
)
def test_conversations(
    phase: str, layers: str, tiny_model: ModelFactory, engine: EngineFactory
) -> None:
    _check_conversations(tiny_model(**FULL), engine, phase, layers)


# Pools in which both requests start, and only one ends.
_SHORT_POOL = {
    ("prefill", "sliding"): 12,
    ("prefill", "mixed"): 12,
    ("decode", "sliding"): 16,
    ("decode", "mixed"): 58,
}


def _check_preempted_answer(model: Path, engine: EngineFactory, phase: str, layers: str) -> None:
    """A request starts over whose answer, so far, is in the prompt of one that still runs."""
    oracle, (short,) = _oracle(model, phase, layers), random_prompts([3 * PAGE_SIZE + 4])
    options = {"max_model_len": 10 * PAGE_SIZE, "additional_config": _options(phase, layers)}
    (answer,) = generate(engine(model, **options), [short], num_tokens=100)
    prompts = [short + answer.tokens[: 2 * PAGE_SIZE + 16], short]
    llm = engine(
        model, num_gpu_blocks_override=_SHORT_POOL[phase, layers], async_scheduling=False, **options
    )
    with counting_preemptions(llm) as preempted:
        answers = generate(llm, prompts, num_tokens=100)
    assert preempted == ["1"] or [name.split("-")[0] for name in preempted] == ["1"]
    check_exact(prompts, answers, oracle)


@pytest.mark.parametrize("layers", MIXED_EVERYWHERE)
@pytest.mark.parametrize("phase", PHASES)
def test_preempted_inside_the_answer(
    phase: str, layers: str, tiny_model: ModelFactory, engine: EngineFactory
) -> None:
    _check_preempted_answer(tiny_model(**FULL), engine, phase, layers)


@pytest.mark.parametrize("phase", PHASES)
def test_drafts_are_exact(
    phase: str, engine: EngineFactory, tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts by n-grams: several queries a step.

    A prompt of which all but the last token is cached has its last query and drafts in one step.
    """
    # In a process of its own: it imports numba, after which vLLM 0.32 starts no second engine.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    model = tiny_model(**FULL)
    llm = engine(
        model,
        additional_config=_options(phase, "mixed", "sinks"),
        speculative_config=NGRAMS,
        disable_log_stats=False,
    )
    # Some of whose answers repeat themselves now and then.
    prompts = random_prompts([3 * PAGE_SIZE + 1, 100, 100], seed=4)
    answers = generate(llm, prompts, num_tokens=120)
    check_exact(prompts, answers, _oracle(model, phase, "mixed", "sinks"))
    (again,) = generate(llm, prompts[:1], num_tokens=120)
    assert (again.tokens, again.num_cached_tokens) == (answers[0].tokens, 3 * PAGE_SIZE)
    check_drafts_were_verified(llm)


def _decide_by_query_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the step, not by the position: what computes one token counts as an answer."""

    def split(batch: CommonAttentionMetadata) -> tuple[CommonAttentionMetadata, list[bool]]:
        return batch, (batch.query_start_loc.diff() == 1).tolist()

    monkeypatch.setattr(builder, "split_at_prompt_ends", split)


def _cache_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptCacheManager, "cache_blocks", FullAttentionManager.cache_blocks)


def _look_answers_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cache_blocks = PromptCacheManager.cache_blocks

    def cache_and_forget(manager: PromptCacheManager, request: Request, *args: Any, **kwargs: Any):
        cache_blocks(manager, request, *args, **kwargs)
        request.skip_reading_prefix_cache = False

    monkeypatch.setattr(PromptCacheManager, "cache_blocks", cache_and_forget)


def _cache_answers_in_full_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        PromptCachedAttention, "get_kv_cache_spec", ReplacedAttention.get_kv_cache_spec
    )


def _copy_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the worker: neither the prompt's last tokens nor the window's first come along."""
    monkeypatch.setattr(SinkCopies, "copy", lambda self, kv_cache, pages: None)


def _check_long_answers(model: Path, engine: EngineFactory, phase: str, layers: str) -> None:
    """Until pages have left the window."""
    llm = engine(model, additional_config=_options(phase, layers))
    prompts = random_prompts([2 * PAGE_SIZE + 7, 5])
    answers = generate(llm, prompts, num_tokens=3 * PAGE_SIZE)
    check_exact(prompts, answers, _oracle(model, phase, layers))


@pytest.mark.parametrize(
    ("phase", "break_it", "check", "layers"),
    [
        ("prefill", _decide_by_query_length, _check_preempted_answer, "sliding"),
        ("prefill", _cache_answers, _check_conversations, "sliding"),
        ("prefill", _look_answers_up, _check_preempted_answer, "sliding"),
        ("prefill", _cache_answers_in_full_layers, _check_conversations, "mixed"),
        ("decode", _decide_by_query_length, _check_preempted_answer, "sliding"),
        ("decode", _cache_answers, _check_conversations, "sliding"),
        ("decode", _copy_nothing, _check_long_answers, "sliding"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_wrong_phases_are_noticed(
    phase: str,
    break_it: Callable[[pytest.MonkeyPatch], None],
    check: Callable[[Path, EngineFactory, str, str], None],
    layers: str,
    tiny_model: ModelFactory,
    engine: EngineFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_it(monkeypatch)
    with pytest.raises(AssertionError, match="is not the oracle's"):
        check(tiny_model(**FULL), engine, phase, layers)


def test_freeing_the_prompts_last_page_is_noticed(
    tiny_model: ModelFactory,
    engine: EngineFactory,
    no_engine: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the manager, as if only whole pages of a prompt were seen: free pages hold NaN."""
    pages = PromptWindowSpec.pages

    def whole(spec: PromptWindowSpec, num_prompt_tokens: int) -> WindowPages:
        return pages(spec, num_prompt_tokens // PAGE_SIZE * PAGE_SIZE)

    monkeypatch.setattr(PromptWindowSpec, "pages", whole)
    with pytest.raises(RuntimeError, match="a page was read that the request does not hold"):
        _check_long_answers(tiny_model(**FULL), engine, "decode", "sliding")
    no_engine()  # it holds what it was serving
