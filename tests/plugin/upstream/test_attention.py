"""Attention on the batches of vLLM's own tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from swa_backend import ops
from swa_vllm.tools.engines.batches import make_batch
from swa_vllm.tools.engines.layer import make_layer
from tests.helpers.kernels.cases import DecodeCase, check_decode
from tests.helpers.kernels.prefill_cases import PrefillCase, check_prefill

MIXED_BATCH = ((1327, 1), (13, 5), (334, 129))  # tokens before the queries, queries
DECODES = (523, 37, 2011)


@pytest.mark.parametrize(
    ("window", "sinks"),
    [
        (64, 4),
        (128, 0),
        *(pytest.param(w, s, marks=pytest.mark.full) for w, s in ((64, 0), (256, 0), (256, 4))),
    ],
)
def test_kernels_are_right_on_upstreams_batches(
    window: int, sinks: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prefill = PrefillCase(window, MIXED_BATCH, sink_tokens=sinks, dtype=torch.bfloat16, group=4)
    decode = DecodeCase(window, DECODES, sink_tokens=sinks, dtype=torch.bfloat16, group=4)
    check_prefill(prefill, ops, monkeypatch, tmp_path)
    check_decode(decode, ops, monkeypatch, tmp_path)


# Tokens before the queries, queries; one request at a time is the last of the batch.
CPU_BATCHES = (
    ((212, 1), (0, 1), (311, 1), (6, 1), (7811, 1)),
    ((0, 1173), (0, 5), (13, 3), (4997, 134)),
    ((1464, 992), (4161, 1), (1233, 1), (1047, 98)),
)


@pytest.mark.parametrize("sinks", [0, 4])
def test_cpu_backend_is_right_on_upstreams_batches(
    sinks: int, no_engine: Callable[[], None]
) -> None:
    """With sinks the last request's outputs are plain torch's; without, all are vLLM's own."""
    no_engine()
    layer = make_layer("Qwen3-0.6B", 256, 8192, 400, {"sink_tokens": sinks})
    torch.nn.init.normal_(layer.attention.kv_cache)
    for requests in CPU_BATCHES:
        for turn in (0, 1):
            contexts, queries = zip(*requests[turn:], *requests[:turn], strict=True)
            batch = make_batch(list(contexts), list(queries), spare_tokens=sinks)
            qkv = layer.random_inputs(sum(queries))
            output = layer.run(layer.builder.build(0, batch), *qkv)
            if sinks:
                layer.check_against_torch(batch, qkv, output, 256, sinks)
            else:
                stock = layer.run_stock(layer.stock_builder.build(0, batch), *qkv)
                assert torch.equal(output, stock)
