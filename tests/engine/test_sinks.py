"""Sink tokens in the real engine, against a dense model in fp64 that was written apart."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import LLM, EngineArgs

from swa_backend.options import PrefillPages, SWAConfigError
from swa_backend.pages import WindowPages
from swa_vllm.attention.cpu.ghost_tail import SinkCopies
from swa_vllm.attention.cpu.page_layout import PageLayout
from swa_vllm.attention.cpu.position_shift import PositionShift, ShiftedScratch
from swa_vllm.config import swa_config
from swa_vllm.config.implementation import Implementation
from swa_vllm.refusals import check_servable
from tests.helpers.dense_qwen3 import DenseQwen3, Sight
from tests.helpers.engines import (
    NGRAMS,
    EngineFactory,
    ModelFactory,
    check_drafts_were_verified,
    generate,
    managers,
    num_free_pages,
)
from tests.helpers.exactness import check_exact
from tests.helpers.pairwise import pairwise
from tests.helpers.tiny_models import FULL, PAGE_SIZE, ROPE, WINDOW, Oracle, random_prompts

SINKS = (1, 4, PAGE_SIZE, PAGE_SIZE + 1)
WINDOWS = (5, 40, 96)  # below a page, not a multiple of one, several pages
LAYERS = {"sliding": "none", "mixed": "every:2"}
CHUNKS = (16, 512)
POLICIES = [policy.value for policy in PrefillPages]
DIMENSIONS = (SINKS, WINDOWS, LAYERS, (True, False), CHUNKS, ROPE, POLICIES)
Case = tuple[int, int, str, bool, int, str, str]


def _windows(window: int, layers: str) -> tuple[int | None, ...]:
    return (window, None) * 2 if layers == "mixed" else (window,) * 4


def _engine(engine: EngineFactory, model: Path, window: int, sinks: int, **kwargs: Any) -> LLM:
    options = {"window": window, "sink_tokens": sinks, **kwargs.pop("options", {})}
    return engine(model, additional_config={"swa": options}, **kwargs)


def _check(case: Case, tiny_model: ModelFactory, engine: EngineFactory) -> None:
    sinks, window, layers, shift, chunk, rope, policy = case
    model = tiny_model(**FULL, rope_parameters=ROPE[rope])
    options = {"full_attention_layers": LAYERS[layers], "position_shift": shift}
    options["prefill_pages"] = policy
    llm = _engine(engine, model, window, sinks, options=options, max_num_batched_tokens=chunk)
    num_free = num_free_pages(llm)
    seen = window + sinks
    prompts = random_prompts([1, max(2, seen - 12), seen, seen + 1, 2 * seen + PAGE_SIZE, 300])
    answers = generate(llm, prompts)
    check_exact(prompts, answers, DenseQwen3(model, Sight(_windows(window, layers), sinks, shift)))
    assert num_free_pages(llm) == num_free
    assert all(m.snapshot().freed_by_window > 0 for m in managers(llm))

    again = generate(llm, prompts)
    assert [a.tokens for a in again] == [a.tokens for a in answers]
    assert again[-1].num_cached_tokens > 0


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize(("interval", "num_hit"), [(0, 1), (4, 4)])
def test_a_new_end_hits_at_the_last_retained_page(
    interval: int, num_hit: int, layers: str, tiny_model: ModelFactory, engine: EngineFactory
) -> None:
    """vLLM's ``--prefix-cache-retention-interval``, here in pages.

    0, the default, retains ends of prompts; the page of the sinks is retained by either.
    """
    model, window, sinks = tiny_model(**FULL), 40, 4
    llm = _engine(
        engine,
        model,
        window,
        sinks,
        options={"full_attention_layers": LAYERS[layers]},
        prefix_cache_retention_interval=interval * PAGE_SIZE,
        max_num_batched_tokens=3 * PAGE_SIZE,
    )
    (first, other) = random_prompts([13 * PAGE_SIZE, 100], seed=interval)
    second = first[: 7 * PAGE_SIZE + 5] + other
    generate(llm, [first])
    (answer,) = generate(llm, [second])
    assert answer.num_cached_tokens == num_hit * PAGE_SIZE
    check_exact([second], [answer], DenseQwen3(model, Sight(_windows(window, layers), sinks)))


@pytest.mark.parametrize("case", pairwise(*DIMENSIONS), ids=str)
def test_engine_equals_a_dense_model(
    case: Case, tiny_model: ModelFactory, engine: EngineFactory
) -> None:
    _check(case, tiny_model, engine)


@pytest.mark.full
@pytest.mark.parametrize("case", list(product(*DIMENSIONS)), ids=str)
def test_engine_equals_a_dense_model_full_product(
    case: Case, tiny_model: ModelFactory, engine: EngineFactory
) -> None:
    _check(case, tiny_model, engine)


@pytest.mark.everywhere
def test_preempted_requests_start_over(engine: EngineFactory, tiny_model: ModelFactory) -> None:
    prompts = random_prompts([6 * WINDOW] * 4)
    common = {
        "max_model_len": 400,
        "enable_prefix_caching": False,
        "options": {"full_attention_layers": "0-1"},
    }
    model = tiny_model(**FULL)
    llm = _engine(engine, model, WINDOW, 4, **common)
    roomy = generate(llm, prompts, num_tokens=100)
    needed = managers(llm)[0].snapshot().allocated
    del llm
    llm = _engine(engine, model, WINDOW, 4, num_gpu_blocks_override=57, **common)
    num_free = num_free_pages(llm)
    tight = generate(llm, prompts, num_tokens=100)
    assert managers(llm)[0].snapshot().allocated > needed  # some started over
    assert [a.tokens for a in tight] == [a.tokens for a in roomy]
    assert num_free_pages(llm) == num_free


@pytest.mark.parametrize("shift", [True, False])
def test_serves_up_to_max_model_len(
    shift: bool, engine: EngineFactory, tiny_model: ModelFactory
) -> None:
    """The last steps write copies of sinks behind the longest request there can be."""
    model = tiny_model(**FULL)
    for length in (4 * PAGE_SIZE, 4 * PAGE_SIZE + 1):
        llm = _engine(
            engine, model, 40, 33, max_model_len=length, options={"position_shift": shift}
        )
        (prompt,) = prompts = random_prompts([length - 20])
        answers = generate(llm, prompts, num_tokens=20)
        check_exact([prompt], answers, DenseQwen3(model, Sight((40,) * 4, 33, shift)))


def test_speculation_is_exact(
    engine: EngineFactory, tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts by n-grams: several queries a step, some of them rejected."""
    # In a process of its own: it imports numba, after which vLLM 0.32 starts no second engine.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    model = tiny_model(**FULL)
    options = {"position_shift": True}
    llm = _engine(
        engine,
        model,
        40,
        4,
        options=options,
        speculative_config=NGRAMS,
        disable_log_stats=False,
    )
    prompts = random_prompts([100] * 3, seed=4)  # whose answers repeat themselves now and then
    answers = generate(llm, prompts, num_tokens=120)
    check_exact(prompts, answers, DenseQwen3(model, Sight((40,) * 4, 4, shift=True)))
    check_drafts_were_verified(llm)


def test_a_request_holds_its_window_and_its_sinks(
    engine: EngineFactory, tiny_model: ModelFactory
) -> None:
    llm = _engine(engine, tiny_model(**FULL), WINDOW, 4, enable_prefix_caching=False)
    generate(llm, random_prompts([11 * WINDOW]))
    pages = WindowPages(WINDOW, PAGE_SIZE, sink_tokens=4)
    assert managers(llm)[0].snapshot().peak_live_per_request <= pages.max_held(1, 512, 4)


def _reserve_but_do_not_attend(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_elsewhere(self: SinkCopies, kv_cache: torch.Tensor, pages: torch.Tensor) -> None:
        key, value = self.layout.read(kv_cache, self.sources)
        self.layout.write(pages, self.targets, 0 * key, 0 * value)

    monkeypatch.setattr(SinkCopies, "copy", look_elsewhere)


def _attend_but_do_not_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WindowPages, "num_sink_pages", property(lambda self: 0))


@pytest.mark.parametrize("break_it", [_reserve_but_do_not_attend, _attend_but_do_not_reserve])
def test_mask_and_pages_have_to_agree(
    break_it: Callable[[pytest.MonkeyPatch], None],
    engine: EngineFactory,
    tiny_model: ModelFactory,
    no_engine: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(**FULL)
    break_it(monkeypatch)
    # A configuration of its own: what is broken here must not be served to another test.
    llm = _engine(engine, model, 41, 4, seed=break_it.__code__.co_firstlineno)
    prompts = random_prompts([200])
    with pytest.raises((AssertionError, RuntimeError)):
        check_exact(prompts, generate(llm, prompts), DenseQwen3(model, Sight((41,) * 4, 4)))
    del llm
    no_engine()  # it may hold what it was serving


def test_refused_where_vllms_own_backend_serves(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineArgs(
        str(tiny_model(**FULL)), additional_config={"swa": {"window": 40, "sink_tokens": 4}}
    ).create_engine_config()
    monkeypatch.setattr(swa_config, "implementation_of", lambda _: Implementation.STOCK)
    with pytest.raises(SWAConfigError, match="sink_tokens cannot be had with this platform"):
        check_servable(config, swa_config.SWAConfig.from_vllm(config))


def test_options_are_part_of_vllms_compile_cache_key(tiny_model: ModelFactory) -> None:
    def key(**options: Any) -> str:
        args = EngineArgs(str(tiny_model(**FULL)), additional_config={"swa": options})
        return str(args.create_engine_config().compute_hash())

    keys = {
        key(window=40),
        key(window=41),
        key(window=40, sink_tokens=4),
        key(window=40, sink_tokens=4, position_shift=True),
        key(window=40, full_attention_layers="0"),
    }
    assert len(keys) == 5


def test_scores_of_shifted_sinks_are_finer_than_the_dtype() -> None:
    """In bfloat16 a score of 100 would be off by up to 0.25; with what is left of it, by 0.001."""
    table = torch.zeros(4, 32)
    table[:, :16] = 1.0  # turns nothing
    rotary = SimpleNamespace(cos_sin_cache=table, rotary_dim=32, is_neox_style=True)
    shift = PositionShift(rotary, 32, 2)
    pages = PageLayout((1, 4, 64), torch.bfloat16, _write_plainly)
    cache = torch.randn(1, 1, 4, 64).bfloat16() * 3
    query = torch.randn(5, 2, 32).bfloat16() * 3
    slots = torch.tensor([0, 1])
    sinks = ShiftedScratch(pages, torch.zeros(5).long(), ((slice(0, 5), slots),), slots, slots)
    wide = shift.widen_query(query, sinks, cache)
    assert wide.shape[-1] == 64
    expected = torch.einsum("nhd,sd->nhs", query.float(), cache[0, 0, :2, :32].float())
    got = wide[..., 32:34].float() + wide[..., 34:36].float()
    assert (got - expected).abs().max() <= expected.abs().max() * 2**-16
    assert torch.equal(wide[..., :32], query)
    assert not wide[..., 36:].any()


def _write_plainly(
    key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor
) -> None:
    pages[0, :, slots] = torch.cat((key, value), dim=-1).transpose(0, 1)


def test_shift_needs_a_table() -> None:
    with pytest.raises(SWAConfigError, match="cannot rotate by object, which has no table"):
        PositionShift(object(), 32, 2)


@pytest.mark.parametrize("rope", ROPE)
def test_dense_model_is_hugging_faces_without_sinks(rope: str, tiny_model: ModelFactory) -> None:
    model = tiny_model(**FULL, rope_parameters=ROPE[rope])
    (prompt,) = random_prompts([120])
    overrides: dict[str, Any] = {
        "use_sliding_window": True,
        "sliding_window": 40,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    expected = Oracle(model, **overrides).score(prompt)
    got = DenseQwen3(model, Sight((40, None) * 2)).score(prompt)
    # Hugging Face's own softmax is in fp32.
    assert (got.logprobs - expected.logprobs).abs().max() <= expected.noise


def test_dense_model_tells_sinks_and_shifts_apart(tiny_model: ModelFactory) -> None:
    model = tiny_model(**FULL)
    (prompt,) = random_prompts([120])

    def score(sinks: int, shift: bool) -> torch.Tensor:
        return DenseQwen3(model, Sight((40,) * 4, sinks, shift)).score(prompt).logprobs

    scores = [score(4, False), score(4, True), score(3, False), score(5, True)]
    for i, one in enumerate(scores):
        for other in scores[:i]:
            assert (one - other).abs().max() > 1e-3
