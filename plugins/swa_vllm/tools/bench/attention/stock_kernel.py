"""vLLM's own Triton decode kernel: what it reads and launches, and what it compiles to.

After ``vllm/v1/attention/ops/triton_unified_attention.py`` and ``backends/triton_attn.py``.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from vllm.v1.attention.backends.triton_attn import (
    MIN_LAUNCH_GRID_SIZE_2D,
    NUM_PAR_SOFTMAX_SEGMENTS,
)
from vllm.v1.attention.ops.triton_unified_attention import _get_tile_size

from swa_backend.kernels.plans import Target
from swa_backend.pages import ceil_div
from swa_backend.window import first_visible
from swa_vllm.tools.bench.attention.arms import vllm_triton
from swa_vllm.tools.bench.attention.times import HEAD_DIM, AttentionCase, make_kernel_batch

# What imports Triton, of what a layer of TRITON_ATTN needs.
_MODULES = (
    "backends.triton_attn",
    "ops.triton_attention_helpers",
    "ops.triton_prefill_attention",
    "ops.triton_reshape_and_cache_flash",
    "ops.triton_unified_attention",
)
_ROWS = 16


@dataclass(frozen=True)
class StockWork:
    """The work that vLLM launches for a batch of decoding requests of equal length.

    Attributes:
        num_keys: keys that a request reads for each KV head.
        launched: programs that are started.
        useful: programs of these that read a key.
    """

    num_keys: int
    launched: int
    useful: int


def stock_work(case: AttentionCase) -> StockWork:
    """Count by the arithmetic of vLLM's launcher and kernel, for 16-bit queries."""
    batch, seq_len, num_kv_heads = case.batch, case.seq_len, case.num_kv_heads
    is_split = batch <= MIN_LAUNCH_GRID_SIZE_2D // num_kv_heads
    num_segments = NUM_PAR_SOFTMAX_SEGMENTS if is_split else 1
    tile = _get_tile_size(HEAD_DIM, case.window, 2, is_prefill=not is_split)
    first_tile = first_visible(seq_len - 1, case.window) // tile
    span = ceil_div(seq_len, num_segments * tile)
    last_tile = ceil_div(seq_len, tile) - 1
    return StockWork(
        num_keys=seq_len - first_tile * tile,
        launched=(batch // (_ROWS // case.group) + batch) * num_kv_heads * num_segments,
        useful=batch * num_kv_heads * (last_tile // span - first_tile // span + 1),
    )


def compile_stock(case: AttentionCase, target: Target) -> Any:
    """Compile the split kernel for ``case``; returns :class:`swa_backend.verify.aot.Facts`."""
    from swa_backend.verify import aot

    batch = make_kernel_batch(case, torch.device("cpu"), cold_bytes=1)
    with (
        aot.compiling_without_gpu(target) as kernels,
        real_triton_for_stock_kernel(aot.triton_modules(), target),
    ):
        for call in vllm_triton(batch):
            call()
    return aot.facts_of_compiled(kernels["kernel_unified_attention"], target)


@contextmanager
def real_triton_for_stock_kernel(
    modules: dict[str, Any], target: Target | None = None
) -> Iterator[None]:
    """Make vLLM's kernels Triton functions inside, where its build has a placeholder for Triton.

    Modules that are imported inside are forgotten behind it, and imported anew when needed.

    Args:
        target: what vLLM's launchers are told that ask torch for the device; None leaves it to
            torch.
    """
    stand_in = ModuleType("vllm.triton_utils")
    vars(stand_in).update(modules, HAS_TRITON=True)
    before, ask = dict(sys.modules), torch.cuda.get_device_capability
    if target is not None:
        capability = divmod(int(target.arch), 10)
        torch.cuda.get_device_capability = lambda device=None: capability
    sys.modules["vllm.triton_utils"] = stand_in
    for module in _MODULES:
        sys.modules.pop(f"vllm.v1.attention.{module}", None)
    try:
        yield
    finally:
        torch.cuda.get_device_capability = ask
        for name in sys.modules.keys() - before.keys():
            del sys.modules[name]
        sys.modules.update(before)
