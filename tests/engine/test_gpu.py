"""What only a GPU shows: CUDA graphs, torch.compile, both of vLLM's model runners, and its own
attention beside windows."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from consistency import engine_arguments, perplexity
from swa_vllm import refusals
from swa_vllm.attention.triton.backend import SWATritonBackend
from tests.engine.graph_cases import CASES, GRAPHS, LONG, OPTIONS, SINKS, Case, run
from tests.helpers.eagle3 import eagle3_config
from tests.helpers.engines import (
    EngineFactory,
    ModelFactory,
    attention_layers,
    generate,
    resolve_here,
)
from tests.helpers.gpu.lines import record
from tests.helpers.tiny_models import FULL, WINDOW, random_prompts
from tests.helpers.trained_models import LENGTH, MIXED, held_out, hugging_face

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "graphs": GRAPHS,
    "compiled": {"enforce_eager": False},
}


def serve(
    case: Case,
    mode: str,
    is_v2: bool,
    engine: EngineFactory,
    tiny_model: ModelFactory,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run a case on one of vLLM's model runners."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(is_v2)))
    arguments = {**case.arguments, "seed": int(is_v2)}  # another engine for each runner
    model = tiny_model(**FULL, num_hidden_layers=case.num_layers)
    run(replace(case, arguments=arguments), MODES[mode], engine, model, directory)


@pytest.mark.parametrize("is_v2", [True, False], ids=["V2", "V1"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LONG)
def test_engine_equals_a_dense_model(
    name: str,
    mode: str,
    is_v2: bool,
    engine: EngineFactory,
    tiny_model: ModelFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five requests decode in a graph of eight; chunks of 64 tokens."""
    serve(LONG[name], mode, is_v2, engine, tiny_model, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", CASES)
def test_graphs_equal_a_dense_model(
    name: str,
    engine: EngineFactory,
    tiny_model: ModelFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three requests decode in a graph of four."""
    serve(CASES[name], "graphs", True, engine, tiny_model, tmp_path, monkeypatch)


@pytest.mark.parametrize("mode", MODES)
def test_drafts_change_no_token(
    mode: str, engine: EngineFactory, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    model = tiny_model(**FULL)
    options = {"swa": {**OPTIONS, **SINKS}}
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
        additional_config={"swa": OPTIONS},
        max_num_batched_tokens=300,
    )
    backends = [layer.attn_backend for layer in attention_layers(llm)]
    assert backends.count(SWATritonBackend) == 2
    assert backends[0] is not SWATritonBackend
    found = perplexity(llm, [held_out(MIXED)])
    assert math.isclose(found, hugging_face(MIXED, "own"), rel_tol=5e-3)


def test_offloading_changes_no_token(
    engine: EngineFactory, tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused until this has passed: pages that left a small pool come back from the host."""
    monkeypatch.setattr(refusals, "_refuse_transfer", lambda *args: None)
    llm = engine(
        tiny_model(**FULL),
        num_gpu_blocks_override=80,
        kv_offloading_size=1,
        additional_config={"swa": {"window": WINDOW, "full_attention_layers": "0-1"}},
    )
    prompts = random_prompts([300, 310, 320, 330, 340, 350])
    first = [generate(llm, [prompt])[0] for prompt in prompts]
    again = [generate(llm, [prompt])[0] for prompt in prompts]
    record(offloading="tokens found again", cached=[a.num_cached_tokens for a in again])
    assert [a.tokens for a in again] == [a.tokens for a in first]
    assert again[0].num_cached_tokens > 0
