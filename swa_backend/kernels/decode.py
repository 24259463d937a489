"""Paged decode attention, split over the window: a kernel that reads keys, and one that merges.

Where one part holds all keys, the first stores the output and nothing is merged.

In the phase ``"decode"`` the prompt's keys below the window and the window's own are one row of
tiles, divided among programs as a window is. In ``"prefill"`` the window of a generated token is
the whole text.

The window, not the text, is divided among programs, so that all of them work at any length, and the
launch depends on shapes only, as CUDA graphs demand. The kernels do not depend on the number of
parts, which the grid says: it changes with the number of requests while the engine serves.
Flash-decoding's split, online softmax and merge: Dao et al.,
https://pytorch.org/blog/flash-decoding/.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from swa_backend.attention_call import AttentionCall
from swa_backend.kernels.launch import Launcher, kernel_launcher
from swa_backend.kernels.plans import DecodePlan, Target
from swa_backend.kernels.tiles import (
    as_operand,
    attend,
    first_seen,
    first_seen_of_block,
    load_pages,
    load_rows,
    request_of_query_tile,
)


@triton.jit(
    do_not_specialize=["stride_table_request", "num_tokens", "num_reqs", "window", "sink_tokens"],
    do_not_specialize_on_alignment=[
        *("lse_ptr", "block_table_ptr", "seq_lens_ptr", "query_start_loc_ptr", "prompt_lens_ptr"),
    ],
)
def decode_kernel(
    out_ptr,
    query_ptr,
    sink_query_ptr,
    kv_ptr,
    lse_ptr,
    block_table_ptr,
    seq_lens_ptr,
    query_start_loc_ptr,
    prompt_lens_ptr,
    stride_out_token,
    stride_out_head,
    stride_query_token,
    stride_query_head,
    stride_sink_query_token,
    stride_sink_query_head,
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
    value_scale,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PER_BLOCK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    PHASE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    DOT: tl.constexpr,
):
    """Compute attention of one block of queries, one KV head and one part of the keys.

    A block is up to ``ROWS_PER_BLOCK`` queries of one request times ``GROUP`` heads. The parts are
    those of the window; with sinks, the last one are the sinks below it. In the phase ``"decode"``
    they are those of the prompt below the window, and then the window's. Writes the part's output
    ``[HEAD_DIM]`` and base-2 log-sum-exp of each row; a row that sees nothing writes -inf only.
    A single part, which is not ``IS_SPLIT``, is the output, and has no log-sum-exp.
    Rows behind the last request's count as one more request, which has no keys.
    """
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_splits = tl.num_programs(2) - HAS_SINKS
    if IS_RAGGED:
        block = tl.program_id(0)
        request = request_of_query_tile(query_start_loc_ptr, num_reqs + 1, block, ROWS_PER_BLOCK)
        is_request = request < num_reqs
        token_start = tl.load(query_start_loc_ptr + request)
        stop_ptr = query_start_loc_ptr + request + 1
        num_queries = tl.load(stop_ptr, mask=is_request, other=num_tokens) - token_start
        first = (block - token_start // ROWS_PER_BLOCK - request) * ROWS_PER_BLOCK
        if first >= num_queries:
            return
        seq_len = tl.load(seq_lens_ptr + request, mask=is_request, other=0)
        prompt_len = 0
        if PHASE != "both":
            prompt_len = tl.load(prompt_lens_ptr + request, mask=is_request, other=0)
    else:
        request = tl.program_id(0)
        token_start = request
        num_queries = 1
        seq_len = tl.load(seq_lens_ptr + request)
        prompt_len = 0
        if PHASE != "both":
            prompt_len = tl.load(prompt_lens_ptr + request)
        first = 0

    rows = tl.arange(0, ROWS)
    query_idx = first + rows // GROUP
    is_row = (rows < ROWS_PER_BLOCK * GROUP) & (query_idx < num_queries)
    head = kv_head * GROUP + rows % GROUP
    position = seq_len - num_queries + query_idx  # [ROWS]
    row_low = first_seen(position, window, prompt_len, PHASE)

    first_position = seq_len - num_queries + first
    last_position = tl.minimum(first_position + ROWS_PER_BLOCK, seq_len) - 1
    low, highest_low = first_seen_of_block(first_position, last_position, window, prompt_len, PHASE)
    # The keys of a program: positions, or with a prompt below the window, the place of the tile.
    pinned_stop = 0
    window_place = low
    if PHASE == "decode":
        sink_tokens = tl.maximum(sink_tokens, prompt_len)
        pinned_stop = tl.minimum(sink_tokens, highest_low)
        window_place = tl.cdiv(pinned_stop, TILE) * TILE
    num_window = tl.maximum(last_position + 1 - low, 0)
    first_place = 0 if PHASE == "decode" else low
    num_tiles = tl.cdiv(window_place - first_place + num_window, TILE)
    span = tl.cdiv(num_tiles, num_splits) * TILE
    start = first_place + split * span
    stop = tl.minimum(start + span, window_place + num_window)
    row_start = row_low
    row_stop = position + 1

    token = (token_start + query_idx).to(tl.int64)
    dims = tl.arange(0, HEAD_DIM)
    q_offset = token * stride_query_token + head * stride_query_head
    q_ptr = query_ptr
    if HAS_SINKS:
        if split == num_splits:
            start = 0
            stop = tl.minimum(sink_tokens, highest_low)
            row_start = tl.zeros_like(row_low)
            row_stop = tl.minimum(row_low, sink_tokens)
            q_ptr = sink_query_ptr
            q_offset = token * stride_sink_query_token + head * stride_sink_query_head
    q = tl.load(q_ptr + q_offset[:, None] + dims[None, :], mask=is_row[:, None], other=0.0).to(DOT)

    table_ptr = block_table_ptr + request.to(tl.int64) * stride_table_request
    key_ptr = kv_ptr + kv_head.to(tl.int64) * stride_kv_head
    value_ptr = key_ptr + HEAD_DIM * stride_kv_dim
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], dtype=tl.float32)
    offsets = tl.arange(0, TILE)
    # Carried from tile to tile: loaded in the loop that uses them, page ids would take the
    # pipeline's stages, and keys and values would be left with one buffer.
    keys, key_stop = _tile_keys(start, offsets, stop, pinned_stop, window_place, low, PHASE)
    pages = load_pages(table_ptr, keys, key_stop, PAGE)
    for place in tl.range(start, stop, TILE):
        keys, key_stop = _tile_keys(place, offsets, stop, pinned_stop, window_place, low, PHASE)
        next_keys, next_stop = _tile_keys(
            place + TILE, offsets, stop, pinned_stop, window_place, low, PHASE
        )
        next_pages = load_pages(table_ptr, next_keys, next_stop, PAGE)
        if PHASE == "decode":
            is_window = place >= window_place
            row_start = tl.where(is_window, row_low, 0)
            row_stop = tl.where(is_window, position + 1, tl.minimum(row_low, sink_tokens))
        slots = pages.to(tl.int64) * stride_kv_page + (keys % PAGE) * stride_kv_slot
        is_read = keys < key_stop
        k = as_operand(load_rows(key_ptr, slots, is_read, stride_kv_dim, HEAD_DIM), DOT)
        v = as_operand(load_rows(value_ptr, slots, is_read, stride_kv_dim, HEAD_DIM), DOT)
        top, total, acc = attend(
            q, k, v, keys, row_start, row_stop, score_scale, top, total, acc, DOT
        )
        pages = next_pages

    safe_total = tl.where(total == 0.0, 1.0, total)
    acc = acc * (value_scale / safe_total)[:, None]
    if IS_SPLIT:
        part = (token * (tl.num_programs(1) * GROUP) + head) * tl.num_programs(2) + split
        tl.store(lse_ptr + part, top + tl.log2(safe_total), mask=is_row)
        # The merge does not read what a part that saw nothing would store.
        is_stored = is_row & (total > 0.0)
        out_offset = part * HEAD_DIM
    else:
        is_stored = is_row
        out_offset = token * stride_out_token + head * stride_out_head
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_offset[:, None] + dims[None, :], out, mask=is_stored[:, None])


@triton.jit
def _tile_keys(place, offsets, stop, pinned_stop, window_place, low, PHASE: tl.constexpr):
    """Find the positions of a tile's keys, and the position up to which they are read.

    Args:
        place: of the tile in the row of tiles: of the prompt's below the window, up to
            ``pinned_stop``, and of the window's from ``window_place`` on, which begins at
            ``low``. In other phases than ``"decode"`` places are positions.
        stop: place behind the last key that the program reads.
    """
    if PHASE == "decode":
        is_window = place >= window_place
        keys = tl.where(is_window, place - window_place + low, place) + offsets
        return keys, tl.where(is_window, stop - window_place + low, tl.minimum(stop, pinned_stop))
    return place + offsets, stop


@triton.jit(do_not_specialize=["num_parts"], do_not_specialize_on_alignment=["lse_ptr"])
def merge_kernel(
    out_ptr,
    partial_ptr,
    lse_ptr,
    stride_out_token,
    stride_out_head,
    num_parts,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Merge the parts of one query and head into its output; zeros if it saw no key."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = token * tl.num_programs(1) + head
    parts = tl.arange(0, PARTS)
    dims = tl.arange(0, HEAD_DIM)
    lse = tl.load(lse_ptr + row * num_parts + parts, mask=parts < num_parts, other=float("-inf"))
    top = tl.max(lse, axis=0)
    weights = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    # Parts that saw nothing wrote no output: whatever lies there is not read.
    offsets = (row * num_parts + parts)[:, None] * HEAD_DIM + dims[None, :]
    partial = tl.load(partial_ptr + offsets, mask=(lse > float("-inf"))[:, None], other=0.0)
    total = tl.sum(weights, axis=0)
    out = tl.sum(partial * weights[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    out_offset = token * stride_out_token + head * stride_out_head
    tl.store(out_ptr + out_offset + dims, out.to(out_ptr.dtype.element_ty))


@lru_cache(maxsize=1024)
def _decode_kernel_launchers(
    plan: DecodePlan, target: Target, num_kv_bytes: int
) -> tuple[Launcher, Launcher]:
    """Give the launchers of both kernels."""
    constants = {**plan.constants(), "DOT": tl.dtype(plan.dot)}
    merged = {"HEAD_DIM": plan.head_dim, "PARTS": plan.num_merged}
    return (
        kernel_launcher(decode_kernel, constants, target.decode_options(num_kv_bytes), target),
        kernel_launcher(merge_kernel, merged, target.options(), target),
    )


class DecodeLaunch:
    """The kernels of a planned batch, for any layer: one that reads keys and one that may merge."""

    def __init__(
        self,
        call: AttentionCall,
        plan: DecodePlan,
        target: Target,
        *,
        num_kv_bytes: int,
    ) -> None:
        """Prepare all but the tensors of a layer.

        Args:
            call: of ``query`` and ``kv_cache`` only the shapes count.
            num_kv_bytes: bytes of an element of the cache.
        """
        num_tokens, num_heads, _ = call.query.shape
        num_reqs = call.seq_lens.shape[0]
        self._grid = (plan.num_blocks(num_tokens, num_reqs), call.kv_cache.shape[1], plan.num_parts)
        self._merge_grid = (num_tokens, num_heads, 1)
        self._num_parts = plan.num_parts
        self._indices = (
            call.block_table,
            call.seq_lens,
            call.query_start_loc,
            call.prompt_lens,
        )
        self._table_stride = call.block_table.stride(0)
        self._numbers = (num_tokens, num_reqs, call.kernel_window, call.sink_tokens)
        self._read, self._merge = _decode_kernel_launchers(plan, target, num_kv_bytes)

    def __call__(
        self,
        query: torch.Tensor,
        sink_query: torch.Tensor | None,
        readable_cache: torch.Tensor,
        out: torch.Tensor,
        partial: torch.Tensor | None,
        lse: torch.Tensor | None,
        *,
        score_scale: float,
        value_scale: float,
    ) -> None:
        """Launch for the tensors of a layer.

        Args:
            readable_cache: the layer's, or its bytes where the target does not read e4m3.
            partial, lse: fp32 scratch, contiguous, ``[num_tokens, Hq, num_parts(, HEAD_DIM)]``;
                None where there is one part.
            score_scale: factor of the products of queries and cached keys, for scores in base 2.
            value_scale: factor of cached values.
        """
        first_out = out if partial is None else partial
        sink_query = query if sink_query is None else sink_query
        self._read(
            self._grid,
            (first_out, query, sink_query, readable_cache),
            (lse, *self._indices),
            (
                *first_out.stride()[:2],
                *query.stride()[:2],
                *sink_query.stride()[:2],
                *readable_cache.stride(),
                self._table_stride,
            ),
            (*self._numbers, score_scale, value_scale),
        )
        if partial is not None:
            self._merge(
                self._merge_grid, (out, partial), (lse,), out.stride()[:2], (self._num_parts,)
            )
