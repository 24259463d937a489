"""Several windows in one model: each is a KV group of its own, exact and freed by itself."""

import logging
import re
from typing import Any

import pytest

import swa_vllm
from tests.helpers.dense_qwen3 import DenseQwen3, Sight
from tests.helpers.engines import (
    NGRAMS,
    EngineFactory,
    ModelFactory,
    generate,
    managers,
    num_free_pages,
    scheduler,
)
from tests.helpers.exactness import LENGTHS, check_exact
from tests.helpers.tiny_models import FULL, random_prompts

SHORT, LONG = 40, 96
# Options, and the windows of the four layers.
CASES: dict[str, tuple[dict[str, Any], tuple[int | None, ...]]] = {
    "beside a full layer, sinks": (
        {"window": {"0": SHORT, "1-2": LONG}, "sink_tokens": 4},
        (SHORT, LONG, LONG, None),
    ),
    "all layers slide, survivors": (
        {"window": {"every:2": SHORT, "0,2": LONG}, "prefill_pages": "survivors"},
        (LONG, SHORT, LONG, SHORT),
    ),
    "in the prompt only": (
        {"window": {"0": SHORT, "1": LONG}, "phase": "prefill"},
        (SHORT, LONG, None, None),
    ),
    "in the answer only": (
        {"window": {"0-1": SHORT, "2-3": LONG}, "phase": "decode"},
        (SHORT, SHORT, LONG, LONG),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_layer_has_its_own_window(
    name: str, tiny_model: ModelFactory, engine: EngineFactory
) -> None:
    options, windows = CASES[name]
    model, prompts = tiny_model(**FULL), random_prompts(LENGTHS)
    llm = engine(model, max_num_batched_tokens=48, additional_config={"swa": options})
    num_free = num_free_pages(llm)
    answers = generate(llm, prompts)
    sight = Sight(windows, options.get("sink_tokens", 0), phase=options.get("phase", "both"))
    check_exact(prompts, answers, DenseQwen3(model, sight))
    again = generate(llm, prompts)
    assert [a.tokens for a in again] == [a.tokens for a in answers]
    assert again[-1].num_cached_tokens > 0
    assert num_free_pages(llm) == num_free
    if sight.phase == "both":
        groups = managers(llm)
        assert {manager.kv_cache_spec.sliding_window for manager in groups} == {SHORT, LONG}
        assert all(manager.snapshot().freed_by_window > 0 for manager in groups)


def test_drafts_are_exact(
    tiny_model: ModelFactory, engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a process of its own: it imports numba, after which vLLM 0.32 starts no second engine.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    options, windows = CASES["all layers slide, survivors"]
    model, prompts = tiny_model(**FULL), random_prompts(LENGTHS)
    drafting = {"additional_config": {"swa": options}, "speculative_config": NGRAMS}
    check_exact(
        prompts, generate(engine(model, **drafting), prompts), DenseQwen3(model, Sight(windows))
    )


@pytest.mark.everywhere
def test_the_table_of_layers_has_the_groups_of_the_metrics(
    tiny_model: ModelFactory, engine: EngineFactory, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(**FULL)
    engine(model)  # vLLM sets up its loggers
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    try:
        llm = engine(model, additional_config={"swa": {"window": {"0": SHORT, "1-2": LONG}}})
    finally:
        logger.removeHandler(caplog.handler)
    (table,) = [m for m in caplog.messages if m.startswith("SWA layers")]
    shown = {
        int(group): int(window) if window != "-" else None
        for window, first, last in re.findall(
            r"(?:sliding|full) +(\S+) .* (\d+)(?:-(\d+))?$", table, re.MULTILINE
        )
        for group in range(int(first), int(last or first) + 1)
    }
    counted = {group: c.window_tokens for (_, group), c in swa_vllm.stats(llm).items()}
    assert shown == {**dict.fromkeys(set(shown) - set(counted)), **counted}
    assert len(shown) == len(scheduler(llm).kv_cache_config.kv_cache_groups) == 4
