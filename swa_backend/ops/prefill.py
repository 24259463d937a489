"""Attention of prefill chunks over their own keys and the pages before them."""

import math

import torch

from swa_backend import reference
from swa_backend.kernels.device import on_device_of
from swa_backend.kernels.plans import plan_prefill
from swa_backend.ops import xformers_prefill
from swa_backend.ops.checks import (
    check_for_kernels,
    check_integers,
    check_like,
    check_requests,
    describe,
)
from swa_backend.ops.dispatch import FORMATS, readable, resolve


def prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    window: int | None,
    sink_tokens: int = 0,
    scale: float | None = None,
    sink_query: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Attention of each request's last tokens: over their own keys, and over pages before these.

    Of pages only keys that a query sees and that lie before the request's first query are read:
    the chunk itself need not be stored. The launch depends on shapes, ``window`` and
    ``sink_tokens`` only.

    Args:
        query: fp32, fp16 or bf16 ``[num_tokens, Hq, D]``, ``Hq`` a multiple of ``Hkv``.
        key, value: the same tokens', as query, ``[num_tokens, Hkv, D]``.
        kv_cache: the same dtype, or fp8 (e4m3fn, e5m2), ``[num_pages, Hkv, page, 2 * D]``.
        block_table: int32 ``[num_reqs, max_pages]``, page ids in the order of positions.
        query_start_loc: int32 ``[num_reqs + 1]``; request ``r`` has the tokens from entry ``r`` to
            entry ``r + 1``, the last of them at position ``seq_lens[r] - 1``.
        seq_lens: int32 ``[num_reqs]``, tokens including these; 0 marks a padded row.
        window: tokens a query sees, itself included; None for all.
        sink_tokens: leading tokens that every query sees.
        scale: of the scores, positive; ``D ** -0.5`` by default.
        sink_query: as query; meets the sinks below the window instead of it.
        k_scale, v_scale: what the numbers of an fp8 cache are multiplied by; ``key`` and ``value``
            are taken as they are.
        out: where to write, as query.
        impl: also ``"xformers"``, which waits for the host and has no sinks.

    Returns:
        As query; zeros in padded rows and in those behind the last request's.

    Raises:
        TypeError, ValueError: a dtype, shape or number other than these.
    """
    check_requests(
        query,
        kv_cache,
        block_table,
        seq_lens,
        query_start_loc,
        window=window,
        sink_tokens=sink_tokens,
        sink_query=sink_query,
        scale=scale,
        k_scale=k_scale,
        v_scale=v_scale,
        out=out,
        key=key,
        value=value,
    )
    # Required here, as it is not where each request has one query.
    check_integers("query_start_loc", query_start_loc, torch.int32, (seq_lens.shape[0] + 1,))
    own_shape = (query.shape[0], kv_cache.shape[1], query.shape[2])
    if key.shape != own_shape or key.dtype != query.dtype:
        raise TypeError(
            f"key must have query's dtype and tokens and the cache's heads, {list(own_shape)}; "
            f"query is {describe(query)}, key {describe(key)}"
        )
    check_like("value", value, key, "key")
    chosen = resolve(impl, kv_cache.device, others=("xformers",))
    implementations = {
        "torch": reference.prefill_attention,
        "triton": _prefill,
        "xformers": xformers_prefill.prefill_attention,
    }
    return implementations[chosen](
        query,
        key,
        value,
        kv_cache,
        block_table,
        query_start_loc,
        seq_lens,
        window=window,
        sink_tokens=sink_tokens,
        scale=query.shape[2] ** -0.5 if scale is None else scale,
        sink_query=sink_query,
        k_scale=k_scale,
        v_scale=v_scale,
        out=torch.empty_like(query) if out is None else out,
    )


def _prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    window: int | None,
    sink_tokens: int,
    scale: float,
    sink_query: torch.Tensor | None,
    k_scale: float,
    v_scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    num_tokens, num_heads, head_dim = query.shape
    check_for_kernels(head_dim, query=query, key=key, value=value, sink_query=sink_query, out=out)
    pages, factor, target = readable(kv_cache)
    if num_tokens == 0:
        return out
    # The most keys that a table can name: full attention is a window of so many.
    capacity = max(1, block_table.shape[1] * kv_cache.shape[2])
    size = capacity if window is None else min(window, capacity)
    plan = plan_prefill(
        target,
        group=num_heads // kv_cache.shape[1],
        head_dim=head_dim,
        page=kv_cache.shape[2],
        has_sinks=sink_tokens > 0 and size < capacity,
        query_format=FORMATS[query.dtype],
        kv_format=FORMATS[kv_cache.dtype],
    )
    from swa_backend.kernels.prefill import launch_prefill

    with on_device_of(kv_cache):
        launch_prefill(
            out,
            query,
            query if sink_query is None else sink_query,
            key,
            value,
            pages,
            block_table,
            query_start_loc,
            seq_lens,
            window=size,
            sink_tokens=sink_tokens,
            score_scale=scale * math.log2(math.e),
            key_scale=k_scale * factor,
            value_scale=v_scale * factor,
            plan=plan,
            target=target,
        )
    return out
