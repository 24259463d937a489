"""What only a GPU shows: CUDA graphs, torch.compile, both of vLLM's model runners, and its own
attention beside windows."""

import math
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from consistency import engine_arguments, perplexity
from swa_vllm.attention.triton.backend import SWATritonBackend
from tests.helpers.dense_qwen3 import DenseQwen3, Sight
from tests.helpers.eagle3 import eagle3_config
from tests.helpers.engines import (
    EngineFactory,
    ModelFactory,
    attention_layers,
    generate,
    num_free_pages,
    resolve_here,
)
from tests.helpers.exactness import check_exact
from tests.helpers.tiny_models import FULL, random_prompts
from tests.helpers.trained_models import LENGTH, MIXED, held_out, hugging_face

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "graphs": {"enforce_eager": False, "compilation_config": GRAPHS},
    "compiled": {"enforce_eager": False},
}
# A NaN is looked for on the host, which no graph can do.
UNWATCHED = {"debug_poison": False}
# Options, and lengths of prompts; turned back over more tokens, shifted queries have more rounding
# than the dense model whose fp32 noise is allowed.
CASES: tuple[tuple[dict[str, Any], tuple[int, ...]], ...] = (
    ({"window": 40, "prefill_pages": "survivors"}, (1, 39, 41, 100, 230)),
    ({"window": 20, "sink_tokens": 4, "position_shift": True}, (1, 24, 39, 41, 80)),
)


@pytest.mark.parametrize("is_v2", [True, False], ids=["V2", "V1"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("options", "lengths"), CASES, ids=["window", "shifted sinks"])
def test_engine_equals_a_dense_model(
    options: dict[str, Any],
    lengths: tuple[int, ...],
    mode: str,
    is_v2: bool,
    engine: EngineFactory,
    tiny_model: ModelFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five requests decode in a graph of eight; chunks of 64 tokens."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(is_v2)))
    model = tiny_model(**FULL)
    llm = engine(
        model,
        **MODES[mode],
        additional_config={"swa": {**UNWATCHED, **options}},
        max_num_batched_tokens=64,
        seed=int(is_v2),  # another engine for each runner
    )
    layers = attention_layers(llm)
    assert {layer.attn_backend for layer in layers} == {SWATritonBackend}
    num_free = num_free_pages(llm)
    prompts = random_prompts(lengths)
    answers = generate(llm, prompts, num_tokens=24)
    windows = tuple(layer.sliding_window for layer in layers)
    sinks, shift = options.get("sink_tokens", 0), bool(options.get("position_shift"))
    check_exact(prompts, answers, DenseQwen3(model, Sight(windows, sinks, shift)))
    assert num_free_pages(llm) == num_free


@pytest.mark.parametrize("mode", MODES)
def test_drafts_change_no_token(
    mode: str, engine: EngineFactory, tiny_model: ModelFactory, tmp_path: Any
) -> None:
    model = tiny_model(**FULL)
    options = {"swa": {**UNWATCHED, "window": 20, "sink_tokens": 4}}
    prompts = random_prompts([29, 60, 200])
    plain = generate(engine(model, additional_config=options), prompts)
    resolve_here("Eagle3Qwen3ForCausalLM")
    llm = engine(
        model,
        **MODES[mode],
        additional_config=options,
        speculative_config=eagle3_config(tmp_path, **FULL),
    )
    assert [a.tokens for a in generate(llm, prompts)] == [a.tokens for a in plain]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_model_keeps_its_perplexity(dtype: str, mode: str, engine: EngineFactory) -> None:
    """Trained with two full layers, which vLLM's own backend serves, and two that slide."""
    config = Qwen3Config.from_pretrained(MIXED)
    arguments = {**engine_arguments(config, LENGTH), "dtype": dtype}
    llm = engine(
        MIXED,
        **arguments,
        **MODES[mode],
        additional_config={"swa": UNWATCHED},
        max_num_batched_tokens=300,
    )
    backends = [layer.attn_backend for layer in attention_layers(llm)]
    assert backends.count(SWATritonBackend) == 2
    assert backends[0] is not SWATritonBackend
    found = perplexity(llm, [held_out(MIXED)])
    assert math.isclose(found, hugging_face(MIXED, "own"), rel_tol=5e-3)
