"""Quantized checkpoints: windowed layers answer as stock vLLM's do."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers.engines import EngineFactory, ModelFactory, attention_layers, describe
from tests.helpers.quantized_models import FORMATS, RUNNABLE
from tests.helpers.tiny_models import FULL, SLIDING, WINDOW


@pytest.mark.parametrize(
    ("checkpoint", "options", "windows"),
    [
        (SLIDING, {}, [WINDOW] * 4),
        # A window that nothing reaches the end of, in half of the layers.
        (FULL, {"window": 500, "full_attention_layers": "0-1"}, [None, None, 500, 500]),
    ],
    ids=["sliding", "mixed"],
)
@pytest.mark.parametrize("kind", FORMATS)
def test_quantized_weights_answer_as_stock(
    kind: str,
    checkpoint: dict[str, Any],
    options: dict[str, Any],
    windows: list[int | None],
    describe_stock: Callable[..., Any],
    engine: EngineFactory,
    quantized_model: ModelFactory,
) -> None:
    if kind not in RUNNABLE:
        pytest.skip("vLLM's CPU build runs this on processors with AVX-512 only")
    model = quantized_model(kind, **checkpoint)
    llm = engine(model, dtype="bfloat16", additional_config={"swa": options})
    cache_dtype = "fp8" if "fp8 cache" in kind else "auto"
    assert [layer.kv_cache_dtype for layer in attention_layers(llm)] == [cache_dtype] * 4
    assert [layer.sliding_window for layer in attention_layers(llm)] == windows
    answers = describe_stock(model, dtype="bfloat16")["answers"]
    assert [list(answer) for answer in describe(llm)["answers"]] == answers
    assert len({tuple(tokens) for tokens, _ in answers}) == len(answers)


def test_sinks_are_served_where_the_fp8_cache_of_a_checkpoint_is_declined(
    engine: EngineFactory, quantized_model: ModelFactory
) -> None:
    """What the refusal of both says to do."""
    served = {"dtype": "bfloat16", "additional_config": {"swa": {"sink_tokens": 4}}}
    plain = describe(engine(quantized_model("w8a8", **SLIDING), **served))
    model = quantized_model("w8a8 and an fp8 cache", **SLIDING)
    with pytest.raises(ValueError, match="use --kv-cache-dtype bfloat16"):
        engine(model, **served)
    declined = describe(engine(model, kv_cache_dtype="bfloat16", **served))
    assert declined["answers"] == plain["answers"]
