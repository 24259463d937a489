"""Prefill attention of ragged chunks: their own keys as tensors, the keys before in pages.

Query blocks of all requests lie one behind the other; each reads the tiles between the first key
that its first query sees and its last query, and none outside. The running softmax is that of Dao
et al., https://arxiv.org/abs/2307.08691.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from swa_backend.attention_call import AttentionCall
from swa_backend.kernels.launch import Launcher, kernel_launcher
from swa_backend.kernels.plans import PrefillPlan, Target
from swa_backend.kernels.tiles import (
    as_operand,
    attend,
    load_pages,
    load_rows,
    request_of_query_tile,
    seen_by_all,
)


@triton.jit(
    do_not_specialize=["stride_table_request", "num_tokens", "num_reqs", "window", "sink_tokens"],
    do_not_specialize_on_alignment=["block_table_ptr", "query_start_loc_ptr", "seq_lens_ptr"],
)
def prefill_kernel(
    out_ptr,
    query_ptr,
    sink_query_ptr,
    own_key_ptr,
    own_value_ptr,
    kv_ptr,
    block_table_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    stride_out_token,
    stride_out_head,
    stride_query_token,
    stride_query_head,
    stride_sink_query_token,
    stride_sink_query_head,
    stride_own_key_token,
    stride_own_key_head,
    stride_own_value_token,
    stride_own_value_head,
    stride_kv_page,
    stride_kv_head,
    stride_kv_slot,
    stride_kv_dim,
    stride_table_request,
    num_tokens,
    num_reqs,
    window,
    sink_tokens,
    score_scale,
    key_scale,
    value_scale,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PER_BLOCK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    DOT: tl.constexpr,
):
    """Compute the output of one block of queries and one KV head.

    A block is up to ``ROWS_PER_BLOCK`` queries of one request times ``GROUP`` heads. Rows behind
    the last request's count as one more request, which has no keys: they become zeros.
    """
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    request = request_of_query_tile(query_start_loc_ptr, num_reqs + 1, block, ROWS_PER_BLOCK)
    is_request = request < num_reqs
    token_start = tl.load(query_start_loc_ptr + request)
    token_stop = tl.load(query_start_loc_ptr + request + 1, mask=is_request, other=num_tokens)
    seq_len = tl.load(seq_lens_ptr + request, mask=is_request, other=0)
    num_queries = token_stop - token_start
    first = (block - token_start // ROWS_PER_BLOCK - request) * ROWS_PER_BLOCK
    if first >= num_queries:
        return
    context = seq_len - num_queries  # where the chunk begins

    rows = tl.arange(0, ROWS)
    query_idx = first + rows // GROUP
    is_row = (rows < ROWS_PER_BLOCK * GROUP) & (query_idx < num_queries)
    head = kv_head * GROUP + rows % GROUP
    position = context + query_idx  # [ROWS]
    row_low = tl.maximum(position - window + 1, 0)
    last_position = tl.minimum(context + first + ROWS_PER_BLOCK, seq_len) - 1

    token = (token_start + query_idx).to(tl.int64)
    dims = tl.arange(0, HEAD_DIM)
    offsets = tl.arange(0, TILE)
    table_ptr = block_table_ptr + request.to(tl.int64) * stride_table_request
    key_ptr = kv_ptr + kv_head.to(tl.int64) * stride_kv_head
    value_ptr = key_ptr + HEAD_DIM * stride_kv_dim
    own_key_ptr += kv_head.to(tl.int64) * stride_own_key_head
    own_value_ptr += kv_head.to(tl.int64) * stride_own_value_head
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], dtype=tl.float32)
    # The sinks below the window first, then the window.
    for sweep in tl.static_range(1 - HAS_SINKS, 2):
        start = tl.maximum(context + first - window + 1, 0)
        stop = last_position + 1
        row_start = row_low
        row_stop = position + 1
        seen_start = last_position - window + 1  # by every row
        seen_stop = context + first + 1
        q_ptr = query_ptr
        q_offset = token * stride_query_token + head * stride_query_head
        if HAS_SINKS:
            if sweep == 0:
                start = 0
                stop = tl.minimum(sink_tokens, tl.maximum(last_position - window + 1, 0))
                row_start = tl.zeros_like(row_low)
                row_stop = tl.minimum(row_low, sink_tokens)
                q_ptr = sink_query_ptr
                q_offset = token * stride_sink_query_token + head * stride_sink_query_head
        q = tl.load(q_ptr + q_offset[:, None] + dims[None, :], mask=is_row[:, None], other=0.0)
        q = q.to(DOT)

        cached_stop = tl.minimum(stop, context)
        cached_scale = score_scale * key_scale
        acc = acc / value_scale
        # Carried from tile to tile, as in the decode kernel.
        pages = load_pages(table_ptr, start + offsets, cached_stop, PAGE)
        for tile_start in tl.range(start, cached_stop, TILE):
            keys = tile_start + offsets
            next_pages = load_pages(table_ptr, keys + TILE, cached_stop, PAGE)
            slots = pages.to(tl.int64) * stride_kv_page + (keys % PAGE) * stride_kv_slot
            is_read = keys < cached_stop
            k = as_operand(load_rows(key_ptr, slots, is_read, stride_kv_dim, HEAD_DIM), DOT)
            v = as_operand(load_rows(value_ptr, slots, is_read, stride_kv_dim, HEAD_DIM), DOT)
            # The chunk's own keys come from elsewhere, also those that a row sees.
            keys = tl.where(is_read, keys, 2**31 - 1)
            top, total, acc = attend(
                q, k, v, keys, row_start, row_stop, cached_scale, top, total, acc, DOT
            )
            pages = next_pages
        acc = acc * value_scale

        # Phase 1 of the window are tiles that every row sees: no mask. Sinks have phase 2 only. (Of
        # cached keys, too, Triton 3.6 would let each product wait for the one before.)
        own_start = tl.maximum(start, context)
        low, high = seen_by_all(own_start, stop, seen_start, seen_stop, TILE)
        for phase in tl.static_range(2 - 2 * sweep, 3):
            phase_start = own_start if phase == 2 - 2 * sweep else (low if phase == 1 else high)
            phase_stop = low if phase == 0 else (high if phase == 1 else stop)
            for tile_start in tl.range(phase_start, phase_stop, TILE):
                keys = tile_start + offsets
                is_read = keys < stop
                own = (token_start + keys - context).to(tl.int64)
                k_slots, v_slots = own * stride_own_key_token, own * stride_own_value_token
                k = load_rows(own_key_ptr, k_slots, is_read, 1, HEAD_DIM, phase != 1).to(DOT)
                v = load_rows(own_value_ptr, v_slots, is_read, 1, HEAD_DIM, phase != 1).to(DOT)
                top, total, acc = attend(
                    q,
                    k,
                    v,
                    keys,
                    row_start,
                    row_stop,
                    score_scale,
                    top,
                    total,
                    acc,
                    DOT,
                    phase != 1,
                )

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_offset = token * stride_out_token + head * stride_out_head
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_offset[:, None] + dims[None, :], out, mask=is_row[:, None])


@lru_cache(maxsize=1024)
def _prefill_launcher(plan: PrefillPlan, target: Target) -> Launcher:
    constants = {**plan.constants(), "DOT": tl.dtype(plan.dot)}
    return kernel_launcher(
        prefill_kernel, constants, target.prefill_options(plan.has_sinks), target
    )


class PrefillLaunch:
    """The kernel of planned chunks, for any layer."""

    def __init__(
        self, call: AttentionCall, plan: PrefillPlan, target: Target, *, window: int
    ) -> None:
        """Prepare all but the tensors of a layer.

        Args:
            call: of ``query`` and ``kv_cache`` only the shapes count.
            window: as :meth:`AttentionCall.reach` says.
        """
        num_tokens, num_reqs = call.query.shape[0], call.seq_lens.shape[0]
        self._grid = (plan.num_blocks(num_tokens, num_reqs), call.kv_cache.shape[1], 1)
        self._indices = (call.block_table, call.query_start_loc, call.seq_lens)
        self._table_stride = call.block_table.stride(0)
        self._numbers = (num_tokens, num_reqs, window, call.sink_tokens)
        self._launch = _prefill_launcher(plan, target)

    def __call__(
        self,
        query: torch.Tensor,
        sink_query: torch.Tensor | None,
        key: torch.Tensor,
        value: torch.Tensor,
        readable_cache: torch.Tensor,
        out: torch.Tensor,
        *,
        score_scale: float,
        key_scale: float,
        value_scale: float,
    ) -> None:
        """Launch for the tensors of a layer.

        Args:
            readable_cache: the layer's, or its bytes where the target does not read e4m3.
            score_scale: factor of the products of queries and keys, for scores in base 2.
            key_scale, value_scale: factors of cached keys and of cached values.
        """
        sink_query = query if sink_query is None else sink_query
        self._launch(
            self._grid,
            (out, query, sink_query, key, value, readable_cache),
            self._indices,
            (
                *out.stride()[:2],
                *query.stride()[:2],
                *sink_query.stride()[:2],
                *key.stride()[:2],
                *value.stride()[:2],
                *readable_cache.stride(),
                self._table_stride,
            ),
            (*self._numbers, score_scale, key_scale, value_scale),
        )
