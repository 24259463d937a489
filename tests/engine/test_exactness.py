"""The real engine against Hugging Face's eager attention in fp64, by fp32 noise."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from swa_backend.options import PrefillPages
from tests.helpers.engines import EngineFactory, ModelFactory, generate, managers, num_free_pages
from tests.helpers.exactness import LENGTHS, check_exact
from tests.helpers.pairwise import pairwise
from tests.helpers.tiny_models import (
    BY_LAYER_TYPES,
    FULL,
    MIXED,
    ROPE,
    SLIDING,
    WINDOW,
    MoeOracle,
    Oracle,
    random_prompts,
    save_tiny_moe,
)

# Where the windows come from: what the checkpoint says, and the options beside it.
SOURCES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sliding": (SLIDING, {}),
    "mixed": (MIXED, {}),
    "layer_types": (BY_LAYER_TYPES, {}),
    "options": (FULL, {"window": WINDOW, "full_attention_layers": "every:4"}),
}
# What Hugging Face must be told to mean the same as the options.
ORACLE_OVERRIDES: dict[str, dict[str, Any]] = {
    "options": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    }
}
CHUNKS = {"below": 16, "equal": WINDOW, "above": 512}
Case = tuple[str, str, str, bool, str]


POLICIES = [policy.value for policy in PrefillPages]
DIMENSIONS = (SOURCES, CHUNKS, ROPE, (True, False), POLICIES)


def _check(case: Case, tiny_model: ModelFactory, engine: EngineFactory) -> None:
    source, chunk, rope, caching, prefill_pages = case
    checkpoint, options = SOURCES[source]
    model = tiny_model(**checkpoint, rope_parameters=ROPE[rope])
    llm = engine(
        model,
        max_num_batched_tokens=CHUNKS[chunk],
        enable_prefix_caching=caching,
        additional_config={"swa": {**options, "prefill_pages": prefill_pages}},
    )
    num_free = num_free_pages(llm)
    prompts = random_prompts(LENGTHS)
    # All at once: small chunks put prefill and decode of different requests into one batch.
    answers = generate(llm, prompts)
    check_exact(prompts, answers, Oracle(model, **ORACLE_OVERRIDES.get(source, {})))
    assert num_free_pages(llm) == num_free
    assert all(m.snapshot().freed_by_window > 0 for m in managers(llm))

    again = generate(llm, prompts)
    assert [a.tokens for a in again] == [a.tokens for a in answers]
    assert (again[-1].num_cached_tokens > 0) == caching


@pytest.mark.parametrize("case", pairwise(*DIMENSIONS), ids=str)
def test_engine_equals_hugging_face(
    case: Case, tiny_model: ModelFactory, engine: EngineFactory
) -> None:
    _check(case, tiny_model, engine)


@pytest.mark.parametrize(
    ("checkpoint", "options", "windows"),
    [
        ({"use_sliding_window": True, "sliding_window": WINDOW}, {}, (WINDOW,) * 4),
        (BY_LAYER_TYPES, {}, (WINDOW, None) * 2),
        (FULL, {"window": 24, "full_attention_layers": "0-1"}, (None, None, 24, 24)),
    ],
    ids=["sliding", "layer_types", "options"],
)
def test_moe_equals_hugging_faces_layers(
    checkpoint: dict[str, Any],
    options: dict[str, Any],
    windows: tuple[int | None, ...],
    tmp_path: Path,
    engine: EngineFactory,
) -> None:
    model = save_tiny_moe(tmp_path, **checkpoint)
    llm = engine(model, max_num_batched_tokens=16, additional_config={"swa": options})
    prompts = random_prompts(LENGTHS)
    check_exact(prompts, generate(llm, prompts), MoeOracle(model, windows))


@pytest.mark.full
@pytest.mark.parametrize("case", list(product(*DIMENSIONS)), ids=str)
def test_engine_equals_hugging_face_full_product(
    case: Case, tiny_model: ModelFactory, engine: EngineFactory
) -> None:
    _check(case, tiny_model, engine)


def test_oracle_tells_windows_apart(tiny_model: ModelFactory) -> None:
    """One token more or less in the window is far above the noise the tests allow."""
    model = tiny_model(**MIXED, rope_parameters=ROPE["default"])
    (prompt,) = random_prompts([2 * WINDOW])
    exact = Oracle(model).score(prompt)
    for window in (WINDOW - 1, WINDOW + 1):
        other = Oracle(model, sliding_window=window).score(prompt)
        assert (other.logprobs - exact.logprobs).abs().max() > 100 * exact.noise


def test_real_weights_equal_hugging_face(
    demo_model: dict[str, Path], engine: EngineFactory
) -> None:
    """30 layers, half of them sliding, several windows of text in one batch."""
    model = demo_model["mixed"]
    llm = engine(model, skip_tokenizer_init=False, max_num_batched_tokens=96)
    tokenizer = llm.get_tokenizer()
    text = "The river rises in the hills and runs past three old mills to the sea. " * 24
    long = tokenizer.encode(text)
    prompts = [tokenizer.encode("The capital of France is"), long[:129], long[:300]]
    check_exact(prompts, generate(llm, prompts, num_tokens=12), Oracle(model))
