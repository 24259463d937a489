"""Functions that the kernels share: query blocks, tiles of keys and values, running softmax."""

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

# Decided by TRITON_INTERPRET when Triton was imported.
IS_INTERPRETED = isinstance(tl.sum, InterpretedFunction)


@triton.jit
def request_of_query_tile(query_start_loc_ptr, num_reqs, block, ROWS_PER_BLOCK: tl.constexpr):
    """Find the last request whose first query block is at or before ``block``.

    Request ``r`` starts at block ``query_start_loc[r] // ROWS_PER_BLOCK + r``, which leaves room
    for its last, partly filled block whatever the lengths are: no host needs to know them.
    """
    low = 0
    high = num_reqs
    while high - low > 1:
        middle = (low + high) // 2
        start = tl.load(query_start_loc_ptr + middle)
        is_after = start // ROWS_PER_BLOCK + middle > block
        low = tl.where(is_after, low, middle)
        high = tl.where(is_after, middle, high)
    return low


@triton.jit
def load_pages(table_ptr, keys, stop, PAGE: tl.constexpr):
    """Load the page id of every key below ``stop``; other entries may be stale and are not read."""
    return tl.load(table_ptr + keys // PAGE, mask=keys < stop, other=0)


@triton.jit
def load_rows(
    base_ptr,
    slots,
    is_read,
    stride_dim,
    HEAD_DIM: tl.constexpr,
    IS_MASKED: tl.constexpr = True,
):
    """Load rows ``[TILE, HEAD_DIM]`` at the element offsets ``slots [TILE]``, int64."""
    dims = tl.arange(0, HEAD_DIM)
    pointers = base_ptr + slots[:, None] + dims[None, :] * stride_dim
    mask = is_read[:, None] if IS_MASKED else None
    return tl.load(pointers, mask=mask, other=0.0 if IS_MASKED else None)


@triton.jit
def seen_by_all(start, stop, seen_start, seen_stop, TILE: tl.constexpr):
    """Find the tiles, counted from ``start``, whose keys lie from ``seen_start`` to ``seen_stop``.

    Returns:
        The position where the first begins and where the last ends; equal if there is none.
    """
    low = start + tl.cdiv(tl.maximum(seen_start - start, 0), TILE) * TILE
    low = tl.minimum(low, stop)
    return low, low + tl.maximum(tl.minimum(seen_stop, stop) - low, 0) // TILE * TILE


@triton.jit
def as_operand(x, DOT: tl.constexpr):
    """Convert ``x`` to the dtype of the product; bytes are fp8 e4m3 and become 1/256 of it.

    Shifted into place, the bits of an e4m3 number are those of an fp16 number whose exponent bias
    is larger by 8. Triton has no e4m3 for devices below 8.9; there the caller passes bytes.
    """
    if x.dtype == tl.uint8:
        wide = x.to(tl.uint16)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        x = bits.to(tl.float16, bitcast=True)
    return x.to(DOT)


@triton.jit
def attend(
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
    DOT: tl.constexpr,
    IS_MASKED: tl.constexpr = True,
):
    """Take one step of attention with a running softmax in base 2 (Dao et al., arXiv 2307.08691).

    Args:
        q, k, v: ``[ROWS, HEAD_DIM]``, ``[TILE, HEAD_DIM]`` twice, in the dtype of the products.
        keys: positions ``[TILE]``; a row sees those from ``row_start`` to ``row_stop`` ``[ROWS]``.
        top, total: fp32 ``[ROWS]``: largest score so far, sum of ``2 ** (score - top)``.
        acc: fp32 ``[ROWS, HEAD_DIM]``, sum of the values times these weights.
        IS_MASKED: false where every row sees all keys.

    Returns:
        New top, total and acc.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [ROWS, TILE]
    if IS_MASKED:
        is_seen = (keys[None, :] >= row_start[:, None]) & (keys[None, :] < row_stop[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
    # The scale is positive, so the largest product is the largest score.
    new_top = tl.maximum(top, tl.max(scores, axis=1) * score_scale)
    # A row that has seen nothing yet would compute inf - inf.
    finite_top = tl.where(new_top == float("-inf"), 0.0, new_top) if IS_MASKED else new_top
    weights = tl.exp2(scores * score_scale - finite_top[:, None])
    factor = tl.exp2(top - finite_top)
    total = total * factor + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(DOT), v, acc * factor[:, None], input_precision="ieee")
    return new_top, total, acc
