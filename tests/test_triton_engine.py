"""The real engine over this project's kernels, in Triton's interpreter, where each is slow: two
layers, short answers."""

from dataclasses import dataclass
from typing import Any

import pytest
from vllm import EngineArgs

from conftest import EngineFactory, ModelFactory
from dense_qwen3 import DenseQwen3, Sight
from engine_tools import attention_layers, generate, managers, num_free_pages
from swa_backend.config import SWAConfigError
from swa_backend.kernels import device, tiles
from swa_vllm.backend_triton import SWATritonBackend
from swa_vllm.refusals import check_servable
from test_exactness import check_exact
from tiny_models import FULL, SLIDING, WINDOW, Oracle, random_prompts


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
)
MORE = (
    Case(5, {"sink_tokens": 33, "position_shift": True}, 512, (37, 38, 39, 150)),
    Case(96, {**SHIFTED, "prefill_pages": "survivors"}, 64, (1, 99, 101, 260)),
    Case(40, {"prefill_pages": "all", "full_attention_layers": "0"}, 48, (40, 41, 300)),
)


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
    assert {m.kv_cache_spec.spare_tokens for m in managers(llm)} == {0}
    num_free = num_free_pages(llm)
    prompts = random_prompts(case.lengths)
    answers = generate(llm, prompts, num_tokens=4)
    sinks, shift = (case.options.get(k, 0) for k in ("sink_tokens", "position_shift"))
    check_exact(prompts, answers, DenseQwen3(model, Sight(windows, sinks, bool(shift))))
    assert num_free_pages(llm) == num_free
    assert all(m.snapshot().freed_by_window > 0 for m in managers(llm))


def test_engine_equals_hugging_face(engine: EngineFactory, tiny_model: ModelFactory) -> None:
    model = tiny_model(**SLIDING, num_hidden_layers=2)
    llm = engine(model, additional_config={"swa": {"impl": "triton"}})
    prompts = random_prompts([2 * WINDOW + 5])
    check_exact(prompts, generate(llm, prompts, num_tokens=4), Oracle(model))


def test_kernels_on_a_cpu_without_the_interpreter_are_refused(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "IS_INTERPRETED", False)
    device.target_of.cache_clear()
    config = EngineArgs(
        str(tiny_model(**SLIDING)), additional_config={"swa": {"impl": "triton"}}
    ).create_engine_config()
    with pytest.raises(SWAConfigError, match="On a CPU set TRITON_INTERPRET=1 before the engine"):
        check_servable(config)
    device.target_of.cache_clear()
