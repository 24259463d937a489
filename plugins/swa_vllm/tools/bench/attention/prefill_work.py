"""The keys that prefill kernels load and multiply for one chunk: ours, and vLLM's in Triton."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from vllm.v1.attention.ops.triton_unified_attention import _get_tile_size

from swa_backend.kernels.plans import NumberFormat, Target, plan_prefill
from swa_backend.pages import ceil_div
from swa_backend.window import first_visible, num_visible
from swa_vllm.tools.bench.attention.times import HEAD_DIM, PAGE

# Rows of a query block of vLLM's kernel.
_STOCK_ROWS = 16


@dataclass(frozen=True)
class PrefillWork:
    """The work of a kernel for one chunk and one KV head.

    Attributes:
        num_keys: keys loaded from the L2 cache, over all query blocks.
        tile_work: products of a query with a key, as a multiple of those it sees.
    """

    num_keys: int
    tile_work: float


def prefill_work(
    target: Target, window: int, context: int, num_queries: int, group: int
) -> dict[str, PrefillWork]:
    """Count the work of a bfloat16 chunk behind ``context`` tokens, ``here`` and by ``stock``."""
    plan = plan_prefill(
        target,
        group=group,
        head_dim=HEAD_DIM,
        page=PAGE,
        has_sinks=False,
        query_format=NumberFormat.BFLOAT16,
        kv_format=NumberFormat.BFLOAT16,
    )
    visible = sum(num_visible(context + i, window) for i in range(num_queries))
    keys = work = 0
    for low, stop, step in _work_of_query_blocks(window, context, num_queries, plan.rows_per_block):
        cached = max(0, min(stop, context) - low)
        own = stop - low - cached
        keys += cached + own
        work += (ceil_div(cached, plan.tile) + ceil_div(own, plan.tile)) * plan.tile * step
    stock_keys = stock_work = 0
    tile = _get_tile_size(HEAD_DIM, window, torch.bfloat16.itemsize, is_prefill=True)
    for low, stop, step in _work_of_query_blocks(
        window, context, num_queries, _STOCK_ROWS // group
    ):
        first = low // tile * tile
        stock_keys += stop - first
        stock_work += ceil_div(stop - first, tile) * tile * step
    return {
        "here": PrefillWork(keys, work / visible),
        "stock": PrefillWork(stock_keys, stock_work / visible),
    }


def _work_of_query_blocks(
    window: int, context: int, num_queries: int, rows: int
) -> Iterator[tuple[int, int, int]]:
    """Yield the first key of each query block, the one behind its last, and its queries."""
    for first in range(0, num_queries, rows):
        step = min(rows, num_queries - first)
        yield first_visible(context + first, window), context + first + step, step
