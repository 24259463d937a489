"""What the plugin changes in vLLM, and what it leaves alone."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import ModelRegistry
from vllm.model_executor.models import qwen3 as stock
from vllm.v1.attention.backends.registry import AttentionBackendEnum

import swa_backend
import swa_vllm
from swa_vllm.compat import architectures, backend_slot, versions
from tests.helpers.engines import EngineFactory, ModelFactory, attention_layers, describe, generate
from tests.helpers.tiny_models import BY_LAYER_TYPES, FULL, MIXED, SLIDING, WINDOW, random_prompts


def test_registering_twice_changes_nothing() -> None:
    def state() -> Any:
        models = {name: architectures.registered_class(name) for name in architectures.MODELS}
        return models, AttentionBackendEnum.CUSTOM.get_path()

    swa_vllm.register()
    first = state()
    swa_vllm.register()
    assert state() == first == (architectures.MODELS, backend_slot.BACKEND_PATH)


def test_other_architectures_stay_vllms_own() -> None:
    swa_vllm.register()
    for other in ("Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "LlamaForCausalLM"):
        owner = architectures.registered_class(other)
        assert owner is not None
        assert owner.startswith("vllm.")


def test_windowed_layers_get_our_parts_and_full_layers_keep_stock(
    engine: EngineFactory, tiny_model: ModelFactory
) -> None:
    layers = attention_layers(engine(tiny_model(**BY_LAYER_TYPES)))
    assert [layer.sliding_window for layer in layers] == [WINDOW, None] * 2
    assert [layer.attn_backend.get_name() for layer in layers] == ["CUSTOM", "CPU_ATTN"] * 2
    assert [type(layer).__name__ for layer in layers] == ["WindowedAttention", "Attention"] * 2


def test_start_up_logs_one_table(
    engine: EngineFactory, tiny_model: ModelFactory, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    try:
        options = {"window": 56, "full_attention_layers": "every:4"}
        engine(tiny_model(**FULL), additional_config={"swa": options})
    finally:
        logger.removeHandler(caplog.handler)
    (line,) = [m for m in caplog.messages if m.startswith("swa-backend ")]
    assert line == f"swa-backend {swa_backend.__version__}: window 56, 3 of 4 layers slide"
    (table,) = [m for m in caplog.messages if m.startswith("SWA layers")]
    assert caplog.messages.index(line) < caplog.messages.index(table)
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["SWA", "0-2", "sliding", "56", "0", "CUSTOM", "SWASpec", "1-3"],
        ["SWA", "3", "full", "-", "-", "CPU_ATTN", "FullAttentionSpec", "0"],
    ]


@pytest.mark.parametrize("checkpoint", [MIXED, SLIDING], ids=["mixed", "sliding"])
def test_enabled_false_serves_full_attention(
    engine: EngineFactory, tiny_model: ModelFactory, checkpoint: dict[str, Any]
) -> None:
    prompts = random_prompts([3 * WINDOW])
    full = generate(engine(tiny_model(**FULL)), prompts)
    llm = engine(tiny_model(**checkpoint), additional_config={"swa": {"enabled": False}})
    assert [layer.sliding_window for layer in attention_layers(llm)] == [None] * 4
    assert generate(llm, prompts) == full


def test_untested_vllm_refuses_windows_only(
    clean_registries: pytest.MonkeyPatch, engine: EngineFactory, tiny_model: ModelFactory
) -> None:
    clean_registries.setattr(versions, "vllm_version", lambda: "0.99.0")
    swa_vllm.register()
    assert generate(engine(tiny_model(**FULL, made_for="untested"), seed=1), random_prompts([4]))
    with pytest.raises(RuntimeError, match=r"tested with vLLM 0.32 and 0.33; this is .*SWA_ALLOW_"):
        engine(tiny_model(**MIXED, made_for="untested"), seed=1)
    clean_registries.setenv("SWA_ALLOW_UNTESTED_VLLM", "1")
    swa_vllm.register()
    assert generate(engine(tiny_model(**MIXED, made_for="allowed"), seed=2), random_prompts([4]))


@pytest.mark.parametrize(
    ("version", "tested"),
    [("0.32.0+cpu", True), ("0.33.1", True), ("0.34.0", False), ("1.32", False), ("dev", False)],
)
def test_tested_versions(version: str, tested: bool) -> None:
    assert versions.is_tested_version(version) is tested


class OtherQwen3(stock.Qwen3ForCausalLM):
    """The model of another plugin."""


def test_another_plugins_qwen3_is_left_alone_but_for_windows(
    clean_registries: pytest.MonkeyPatch, engine: EngineFactory, tiny_model: ModelFactory
) -> None:
    ModelRegistry.register_model("Qwen3ForCausalLM", OtherQwen3)
    swa_vllm.register()
    llm = engine(tiny_model(**FULL, made_for="guard"), seed=3)
    assert llm.apply_model(lambda model: isinstance(model, OtherQwen3)) == [True]
    with pytest.raises(
        RuntimeError, match=rf"{re.escape(__name__)}:OtherQwen3.*swa_vllm.models.qwen3"
    ):
        engine(tiny_model(**MIXED, made_for="guard"), seed=3)


@pytest.mark.parametrize("name", ["full", "llama"])
def test_models_without_window_are_exactly_stock(
    name: str,
    describe_stock: Callable[..., Any],
    engine: EngineFactory,
    tiny_model: ModelFactory,
    tiny_llama: Path,
) -> None:
    model = tiny_llama if name == "llama" else tiny_model(**FULL)
    llm = engine(model)
    here, there = describe(llm), describe_stock(model)
    # The outermost Qwen3 class is our subclass; it ran the stock constructor.
    assert here["modules"][1:] == there["modules"][1:]
    assert {k: here[k] for k in ("backends", "specs")} == {
        k: there[k] for k in ("backends", "specs")
    }
    assert [list(a) for a in here["answers"]] == there["answers"]
    assert swa_vllm.stats(llm) == {}


def test_all_sliding_model_answers_as_stock(
    describe_stock: Callable[..., Any], engine: EngineFactory, tiny_model: ModelFactory
) -> None:
    model = tiny_model(**SLIDING)
    answers = describe(engine(model))["answers"]
    assert [list(a) for a in answers] == describe_stock(model)["answers"]


def test_stock_vllm_still_refuses_mixed_layers(
    describe_stock: Callable[..., Any], tiny_model: ModelFactory
) -> None:
    """If this fails, upstream has learned to serve them: revisit what this plugin is for."""
    error = describe_stock(tiny_model(**MIXED))["error"]
    assert "Sliding window for some but all layers is not supported" in error


def test_stock_vllm_still_serves_layer_types_as_full_attention(
    describe_stock: Callable[..., Any], tiny_model: ModelFactory
) -> None:
    """Silently, where max_window_layers equals the layer count."""
    by_layer_types, full = (describe_stock(tiny_model(**c)) for c in (BY_LAYER_TYPES, FULL))
    assert by_layer_types["answers"] == full["answers"]
