"""FLOPs and bytes that vLLM's metrics count of a windowed model."""

from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.metrics.perf import AttentionMetrics, ExecutionContext

from swa_backend.window import is_visible
from swa_vllm.config.swa_config import SWAConfig
from tests.helpers.engines import ModelFactory
from tests.helpers.tiny_models import FULL, MIXED, SLIDING, WINDOW

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "sliding": SLIDING,
    "two of four": MIXED,
    "one of four": {**MIXED, "max_window_layers": 3},
    "one of four, the first": {
        **MIXED,
        "layer_types": ["sliding_attention", *["full_attention"] * 3],
    },
}
HEADS, KV_HEADS, HEAD_DIM, BYTES = 4, 2, 32, 4  # of the tiny models, in fp32


@pytest.mark.parametrize("num_tokens", [1, WINDOW, WINDOW + 1, 10 * WINDOW])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_decoding_costs_is_that_of_the_keys_that_each_layer_sees(
    name: str, num_tokens: int, tiny_model: ModelFactory
) -> None:
    config = EngineArgs(
        str(tiny_model(**CHECKPOINTS[name])), skip_tokenizer_init=True, dtype="float32"
    ).create_engine_config()
    windows = SWAConfig.from_vllm(config).layers.windows
    num_keys = sum(
        is_visible(num_tokens - 1, key, window) for window in windows for key in range(num_tokens)
    )
    step = ExecutionContext.from_single_request(
        num_tokens=1, context_len=num_tokens, is_prefill=False
    )
    metrics = AttentionMetrics.from_vllm_config(config)
    flops = metrics.get_num_flops_breakdown(step)
    assert flops["attn_qk"] == flops["attn_av"] == 2 * HEADS * HEAD_DIM * num_keys
    num_elements = len(windows) * HEADS * HEAD_DIM + num_keys * KV_HEADS * 2 * HEAD_DIM
    assert metrics.get_read_bytes_breakdown(step)["attn_input"] == num_elements * BYTES
