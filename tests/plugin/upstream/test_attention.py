"""Attention on the batches of vLLM's own tests."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from swa_backend import ops
from swa_vllm.tools.engines.batches import make_batch
from swa_vllm.tools.engines.layer import make_layer
from tests.helpers.kernels.cases import DecodeCase, check_decode
from tests.helpers.kernels.guard import DEVICE
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


@dataclass(frozen=True)
class Shapes:
    """Sizes that a test of vLLM's kernels gives them; ``chunks`` as in :class:`PrefillCase`."""

    window: int
    page: int
    num_kv_heads: int
    group: int
    head_dim: int
    dtype: torch.dtype
    seq_lens: tuple[int, ...]
    chunks: tuple[tuple[int, int], ...]
    kv_dtype: torch.dtype | None = None


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FLASHINFER = ((1328, 18, 463), MIXED_BATCH)
FLASHINFER_DECODES = ((1, 54, 293, 70), ((0, 1), (13, 5)))
FLASH_ATTN = (DECODES, MIXED_BATCH)
PREFIX = ((1041, 17), ((17, 40), (700, 1), (40, 129)))  # within the lengths that it draws
SHAPES = {
    "flashinfer": Shapes(64, 32, 1, 6, 256, BF16, *FLASHINFER),
    "flashinfer, decodes": Shapes(64, 16, 8, 4, 128, BF16, *FLASHINFER_DECODES),
    "flash_attn": Shapes(256, 16, 4, 1, 128, BF16, *FLASH_ATTN),
    "prefix_prefill, 16": Shapes(16, 32, 1, 64, 128, FP16, *PREFIX),
    "prefix_prefill, 2048": Shapes(2048, 32, 2, 1, 128, FP16, *PREFIX),
    "prefix_prefill, e4m3": Shapes(16, 32, 2, 1, 128, FP16, *PREFIX, E4M3),
    "prefix_prefill, e5m2": Shapes(16, 32, 2, 1, 128, FP32, *PREFIX, E5M2),
}
LARGE = {
    "flashinfer": Shapes(64, 32, 8, 4, 256, BF16, *FLASHINFER),
    "flash_attn": Shapes(256, 16, 2, 4, 256, BF16, *FLASH_ATTN),
    "prefix_prefill": Shapes(2048, 32, 1, 64, 128, FP16, (2048, 1041), ((1024, 129), (700, 1))),
}


@pytest.mark.parametrize(
    "shapes",
    [
        *(pytest.param(shapes, id=name) for name, shapes in SHAPES.items()),
        *(
            pytest.param(shapes, id=f"{name}, large", marks=pytest.mark.full)
            for name, shapes in LARGE.items()
        ),
    ],
)
def test_kernels_are_right_at_upstreams_shapes(
    shapes: Shapes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = vars(shapes)
    prefill = {key: value for key, value in sizes.items() if key != "seq_lens"}
    decode = {key: value for key, value in sizes.items() if key != "chunks"}
    check_prefill(PrefillCase(**prefill), ops, monkeypatch, tmp_path)
    check_decode(DecodeCase(**decode), ops, monkeypatch, tmp_path)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_a_window_holds_the_query_and_the_keys_before_it(
    window: int | None, num_queries: int, impl: str
) -> None:
    """Keys of zeros weigh the same, and the value of a token is its number: no oracle is needed."""
    first = 8 - num_queries
    with DEVICE:
        values = torch.arange(1.0, 9.0)
        rows = torch.cat([torch.zeros(8, 64), values[:, None].expand(-1, 64)], dim=-1)
        cache = torch.cat([rows, torch.full((8, 128), float("nan"))]).view(1, 1, 16, 128)
        query, key, value = torch.zeros(num_queries, 4, 64), *rows[first:, None].chunk(2, dim=-1)
        table, seq_lens = torch.zeros(1, 1).int(), torch.tensor([8]).int()
        starts = torch.tensor([0, num_queries]).int()
    expected = [values[max(0, q + 1 - (window or 8)) : q + 1].mean() for q in range(first, 8)]
    decoded = ops.decode_attention(
        query, cache, table, seq_lens, window=window, query_start_loc=starts, impl=impl
    )
    prefilled = ops.prefill_attention(
        query, key, value, cache, table, starts, seq_lens, window=window, impl=impl
    )
    for output in (decoded, prefilled):
        torch.testing.assert_close(output[:, 0, 0], torch.stack(expected))


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
