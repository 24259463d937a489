"""The real engine over this project's kernels, in Triton's interpreter, where each is slow: two
layers, short answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import EngineArgs

from swa_backend.kernels import device, tiles
from swa_vllm.attention.triton.backend import SWATritonBackend
from tests.engine.graph_cases import CASES as SERVED
from tests.engine.graph_cases import run
from tests.helpers.dense_qwen3 import DenseQwen3, Sight
from tests.helpers.eagle3 import eagle3_config
from tests.helpers.engines import (
    EngineFactory,
    ModelFactory,
    attention_layers,
    generate,
    managers,
    num_free_pages,
    resolve_here,
)
from tests.helpers.exactness import check_exact
from tests.helpers.tiny_models import FULL, PAGE_SIZE, SLIDING, WINDOW, Oracle, random_prompts

pytestmark = pytest.mark.everywhere


@dataclass(frozen=True)
class Case:
    """A window, options beside it, tokens of a step, and lengths of prompts."""

    window: int
    options: dict[str, Any]
    chunk: int
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        options = " ".join(f"{k}={v}" for k, v in self.options.items())
        return f"W={self.window} chunk={self.chunk} {options}"


SHIFTED = {"sink_tokens": 4, "position_shift": True}
CASES = (
    Case(40, {"prefill_pages": "survivors"}, 512, (39, 120)),
    Case(20, {"sink_tokens": 4, "full_attention_layers": "every:2"}, 64, (100, 1)),
    Case(20, SHIFTED, 64, (24, 100)),
    Case(20, {"phase": "prefill", "full_attention_layers": "0"}, 48, (39, 100)),
    Case(2, {"phase": "decode", "full_attention_layers": "0"}, 48, (39, 100)),
)
MORE = (
    Case(5, {"sink_tokens": 33, "position_shift": True}, 512, (37, 38, 39, 150)),
    Case(96, {**SHIFTED, "prefill_pages": "survivors"}, 64, (1, 99, 101, 260)),
    Case(40, {**SHIFTED, "phase": "prefill"}, 48, (1, 41, 100)),
    Case(1, {"sink_tokens": 33, "phase": "decode"}, 48, (1, 31, 32, 100)),
    Case(40, {"prefill_pages": "all", "full_attention_layers": "0"}, 48, (40, 41, 300)),
)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.full) for case in MORE)], ids=str
)
def test_engine_equals_a_dense_model(
    case: Case, engine: EngineFactory, tiny_model: ModelFactory
) -> None:
    """Pages that nobody holds are full of NaN, as in every engine of these tests."""
    model = tiny_model(**FULL, num_hidden_layers=2)
    llm = engine(
        model,
        additional_config={"swa": {"window": case.window, "impl": "triton", **case.options}},
        max_num_batched_tokens=case.chunk,
    )
    layers = attention_layers(llm)
    windows = tuple(layer.sliding_window for layer in layers)
    assert {a.attn_backend for a in layers if a.sliding_window} == {SWATritonBackend}
    assert not any(m.kv_cache_spec.storage.spare_tokens for m in managers(llm))
    num_free = num_free_pages(llm)
    prompts = random_prompts(case.lengths)
    answers = generate(llm, prompts, num_tokens=4)
    sinks, shift = (case.options.get(k, 0) for k in ("sink_tokens", "position_shift"))
    phase = case.options.get("phase", "both")
    sight = Sight(windows, sinks, bool(shift), phase=phase)
    check_exact(prompts, answers, DenseQwen3(model, sight))
    assert num_free_pages(llm) == num_free
    assert bool(managers(llm)) == (phase == "both")
    assert all(m.snapshot().freed_by_window > 0 for m in managers(llm))


@pytest.mark.gpu
def test_engine_equals_hugging_face(engine: EngineFactory, tiny_model: ModelFactory) -> None:
    model = tiny_model(**SLIDING, num_hidden_layers=2)
    llm = engine(model, additional_config={"swa": {"impl": "triton"}})
    prompts = random_prompts([2 * WINDOW + 5])
    check_exact(prompts, generate(llm, prompts, num_tokens=4), Oracle(model))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp8", torch.float8_e4m3fn),
        pytest.param("fp8_e5m2", torch.float8_e5m2, marks=pytest.mark.full),
    ],
)
def test_fp8_cache_holds_the_nearest_numbers(
    name: str, dtype: torch.dtype, engine: EngineFactory, tiny_model: ModelFactory
) -> None:
    """One layer: in a second, noise would choose between neighbouring fp8 numbers."""
    model = tiny_model(**FULL, num_hidden_layers=1)
    llm = engine(
        model,
        additional_config={"swa": {"window": 20, "impl": "triton"}},
        kv_cache_dtype=name,
    )
    for prompt in random_prompts([39, 60]):
        sight = Sight((20,), cached_from=len(prompt), cache_dtype=dtype)
        check_exact([prompt], generate(llm, [prompt], num_tokens=6), DenseQwen3(model, sight))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [20, 1])
def test_drafts_change_no_token(
    window: int, engine: EngineFactory, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    """With a window of 1, a page of the tokens to verify may be one that nothing later sees."""
    model = tiny_model(**FULL)
    options = {"swa": {"window": window, "full_attention_layers": "0-2", "impl": "triton"}}
    prompts = random_prompts([29, 60])
    answers = generate(engine(model, additional_config=options), prompts, num_tokens=8)
    check_exact(prompts, answers, DenseQwen3(model, Sight((None, None, None, window))))
    resolve_here("Eagle3Qwen3ForCausalLM")
    llm = engine(
        model,
        additional_config=options,
        speculative_config=eagle3_config(tmp_path, **FULL),
    )
    drafted = generate(llm, prompts, num_tokens=8)
    assert [a.tokens for a in drafted] == [a.tokens for a in answers]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [{}, {"sink_tokens": 4, "position_shift": True, "full_attention_layers": "every:2"}],
    ids=["window", "shifted sinks"],
)
def test_prefix_hits_change_no_token(
    options: dict[str, Any], engine: EngineFactory, tiny_model: ModelFactory
) -> None:
    """The second prompt goes on where a kept page of the first one ends."""
    model = tiny_model(**FULL, num_hidden_layers=2)
    swa = {"window": 20, "impl": "triton", "prefill_pages": "all", **options}
    llm = engine(model, additional_config={"swa": swa})
    windows = tuple(layer.sliding_window for layer in attention_layers(llm))
    sinks, shift = options.get("sink_tokens", 0), options.get("position_shift", False)
    oracle = DenseQwen3(model, Sight(windows, sinks, shift))
    (first,) = random_prompts([2 * PAGE_SIZE + 5])
    for prompt, num_cached in ((first, 0), (first + first[:9], 2 * PAGE_SIZE)):
        answers = generate(llm, [prompt], num_tokens=3)
        assert answers[0].num_cached_tokens == num_cached
        check_exact([prompt], answers, oracle)


@pytest.mark.gpu
def test_preempted_requests_start_over(
    engine: EngineFactory, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    model = tiny_model(**FULL, num_hidden_layers=2)
    run(SERVED["preempted"], {}, engine, model, tmp_path)


def test_kernels_on_a_cpu_without_the_interpreter_are_refused(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "IS_INTERPRETED", False)
    device.detect_target.cache_clear()
    arguments = EngineArgs(
        str(tiny_model(**SLIDING)), additional_config={"swa": {"impl": "triton"}}
    )
    with pytest.raises(ValueError, match="On a CPU set TRITON_INTERPRET=1 before the engine"):
        arguments.create_engine_config()
    device.detect_target.cache_clear()
