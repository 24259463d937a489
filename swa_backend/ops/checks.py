"""Checks of what the operations on pages accept: shapes and dtypes, no wait for a device."""

import math
from typing import TypeGuard

import torch

from swa_backend.attention_call import AttentionCall, PrefillCall
from swa_backend.options import is_count

QUERY_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def describe_tensor(tensor: object) -> str:
    """Describe a tensor by dtype and shape, and anything else by its type, for messages."""
    if not isinstance(tensor, torch.Tensor):
        return f"a {type(tensor).__name__}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _operand_is_tensor(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor)


def check_rows(name: str, rows: torch.Tensor) -> None:
    """Raise unless ``rows`` is ``[num_tokens, heads, D]`` of a dtype that queries may have."""
    if not _operand_is_tensor(rows) or rows.dim() != 3 or rows.dtype not in QUERY_DTYPES:
        raise TypeError(
            f"{name} must be float32, float16 or bfloat16 [num_tokens, heads, head_dim]; "
            f"got {describe_tensor(rows)}"
        )


def check_table(table: torch.Tensor, states: torch.Tensor) -> None:
    """Raise unless ``table [num_positions, R]`` can rotate ``states [num_tokens, heads, D]``."""
    if not _operand_is_tensor(table) or table.dim() != 2 or table.dtype not in QUERY_DTYPES:
        raise TypeError(
            "table must be float32, float16 or bfloat16 [num_positions, rotary_dim]; "
            f"got {describe_tensor(table)}"
        )
    num_positions, size = table.shape
    if not num_positions or not 0 < size <= states.shape[2] or size % 2 or table.stride(1) != 1:
        raise ValueError(
            "table must have a position, rows that are contiguous, and an even number of columns "
            f"up to states' head_dim {states.shape[2]}; got {describe_tensor(table)}"
        )


def check_cache(kv_cache: torch.Tensor, rows: torch.Tensor, name: str) -> None:
    """Raise unless ``rows [num_tokens, heads, D]`` can be attended or stored with the cache."""
    check_rows(name, rows)
    if not _operand_is_tensor(kv_cache) or kv_cache.dtype not in (rows.dtype, *FP8_DTYPES):
        raise TypeError(
            f"kv_cache must have {name}'s dtype, float8_e4m3fn or float8_e5m2; {name} is "
            f"{describe_tensor(rows)}, kv_cache {describe_tensor(kv_cache)}"
        )
    if kv_cache.dim() != 4 or kv_cache.shape[3] != 2 * rows.shape[2]:
        raise ValueError(
            f"kv_cache must be [num_pages, num_kv_heads, page, {2 * rows.shape[2]}] (a key and a "
            f"value of head_dim {rows.shape[2]} a token); got {describe_tensor(kv_cache)}"
        )
    if not rows.shape[1] or rows.shape[1] % kv_cache.shape[1]:
        raise ValueError(
            f"{name} has {rows.shape[1]} heads, which is no multiple of the cache's "
            f"{kv_cache.shape[1]}; give as many, or a multiple for queries in groups"
        )
    _, _, stride_slot, stride_dim = kv_cache.stride()
    _, _, page, size = kv_cache.shape
    if (page - 1) * stride_slot + (size - 1) * stride_dim >= 2**31:
        raise ValueError(
            "kv_cache must have each page in one place, within 2**31 elements; got strides "
            f"{kv_cache.stride()}"
        )


def check_integers(
    name: str, tensor: object, dtype: torch.dtype, shape: tuple[int | None, ...]
) -> None:
    """Raise unless ``tensor`` has contiguous rows and this dtype and shape (None: any size)."""
    if not (
        _operand_is_tensor(tensor)
        and tensor.dtype == dtype
        and tensor.dim() == len(shape)
        and all(size in (None, got) for size, got in zip(shape, tensor.shape, strict=True))
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise TypeError(
            f"{name} must be {str(dtype).removeprefix('torch.')} [{wanted}]; "
            f"got {describe_tensor(tensor)}"
        )
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}; "
            f"call {name}.contiguous()"
        )


def check_scratch(scratch: torch.Tensor, kv_cache: torch.Tensor) -> None:
    """Raise unless ``scratch`` is a contiguous vector of fp32 on the cache's device."""
    if (
        not _operand_is_tensor(scratch)
        or scratch.dim() != 1
        or scratch.dtype != torch.float32
        or not scratch.is_contiguous()
    ):
        raise TypeError(f"scratch must be contiguous float32 [any]; got {describe_tensor(scratch)}")
    check_same_device(kv_cache, "kv_cache", scratch=scratch)


def check_call(
    call: AttentionCall, out: torch.Tensor | None, **others: torch.Tensor | None
) -> None:
    """Raise unless the arguments fit together; ``others`` must be on the cache's device too."""
    query, kv_cache = call.query, call.kv_cache
    check_cache(kv_cache, query, "query")
    check_rows_of_requests(call)
    check_operand_like("sink_query", call.sink_query, query, "query")
    check_operand_like("out", out, query, "query")
    check_window_operand(call.window, call.sink_tokens, call.sink_query is not None)
    scale = 1.0 if call.scale is None else call.scale
    check_scales(scale=scale, k_scale=call.k_scale, v_scale=call.v_scale)
    check_same_device(
        kv_cache,
        "kv_cache",
        query=query,
        block_table=call.block_table,
        seq_lens=call.seq_lens,
        query_start_loc=call.query_start_loc,
        sink_query=call.sink_query,
        out=out,
        **others,
    )


def check_rows_of_requests(call: AttentionCall) -> None:
    """Raise unless lengths, block table and starts are of the same requests."""
    check_integers("seq_lens", call.seq_lens, torch.int32, (None,))
    num_reqs = call.seq_lens.shape[0]
    check_integers("block_table", call.block_table, torch.int32, (num_reqs, None))
    if call.query_start_loc is not None:
        check_integers("query_start_loc", call.query_start_loc, torch.int32, (num_reqs + 1,))


def check_one_query_each(call: AttentionCall) -> None:
    """Raise unless each request has one query, or ``query_start_loc`` says how many."""
    num_tokens, num_reqs = call.query.shape[0], call.seq_lens.shape[0]
    if call.query_start_loc is None and num_tokens != num_reqs:
        raise ValueError(
            f"got {num_tokens} queries for {num_reqs} requests: give query_start_loc, without "
            "which each request has one"
        )


def check_operands_of_layer(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Raise unless a layer's tensors fit together, and the kernels take them."""
    check_cache(kv_cache, query, "query")
    check_operand_like("out", out, query, "query")
    check_operands_are_own(query, key, value, kv_cache)
    check_operands_for_kernels(query.shape[2], query=query, key=key, value=value, out=out)
    check_same_device(kv_cache, "kv_cache", query=query, key=key, value=value, out=out)


def check_operands_of_batch(shape: torch.Size, query: torch.Tensor, *rows: torch.Tensor) -> None:
    """Raise unless query has the shape that a batch was prepared for, and ``rows`` its tokens."""
    if query.shape != shape:
        raise ValueError(f"the batch has queries {list(shape)}, got {describe_tensor(query)}")
    for tensor in rows:
        if tensor.shape[0] != shape[0]:
            raise ValueError(f"the batch has {shape[0]} tokens, got {describe_tensor(tensor)}")


def check_prefill_call(call: PrefillCall, out: torch.Tensor | None) -> None:
    """Raise unless the arguments, the chunk's own keys and values included, fit together."""
    check_call(call, out, key=call.key, value=call.value)
    # Required here, as it is not where each request has one query.
    num_reqs = call.seq_lens.shape[0]
    check_integers("query_start_loc", call.query_start_loc, torch.int32, (num_reqs + 1,))
    check_operands_are_own(call.query, call.key, call.value, call.kv_cache)


def check_operands_are_own(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor
) -> None:
    """Raise unless ``key`` and ``value`` are of query's tokens and of the cache's heads."""
    own_shape = (query.shape[0], kv_cache.shape[1], query.shape[2])
    if key.shape != own_shape or key.dtype != query.dtype:
        raise TypeError(
            f"key must have query's dtype and tokens and the cache's heads, {list(own_shape)}; "
            f"query is {describe_tensor(query)}, key {describe_tensor(key)}"
        )
    check_operand_like("value", value, key, "key")


def check_operand_like(
    name: str, tensor: torch.Tensor | None, like: torch.Tensor, like_name: str
) -> None:
    """Raise unless ``tensor`` is None or has the dtype and shape of ``like``."""
    if tensor is None:
        return
    if not _operand_is_tensor(tensor) or tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise TypeError(
            f"{name} must be as {like_name}, {describe_tensor(like)}; got {describe_tensor(tensor)}"
        )


def check_window_operand(window: int | None, sink_tokens: int, has_sink_query: bool) -> None:
    """Raise for a window below 1, fewer than 0 sinks, or a sink query that no key would meet."""
    if window is not None and not is_count(window):
        raise ValueError(
            f"window must be an integer >= 1 and below 2**31, or None for full attention; got "
            f"{window!r}"
        )
    if not is_count(sink_tokens, least=0):
        raise ValueError(
            f"sink_tokens must be an integer >= 0 and below 2**31; got {sink_tokens!r}"
        )
    if has_sink_query and (window is None or not sink_tokens):
        raise ValueError("sink_query needs sink_tokens and a window: without both no key meets it")


def check_scales(**scales: float) -> None:
    """Raise for a scale that is not a positive number."""
    for name, scale in scales.items():
        if not isinstance(scale, int | float) or not 0 < scale < math.inf:
            raise ValueError(f"{name} must be a positive number, got {scale!r}")


def check_same_device(like: torch.Tensor, like_name: str, **others: torch.Tensor | None) -> None:
    """Raise for a tensor on another device than ``like``."""
    device = like.device
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{name} is on {tensor.device}, {like_name} on {device}; move it there"
            )


def check_head_dim(head_dim: int, remedy: str) -> None:
    """Raise for a head dimension that the kernels do not have."""
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise ValueError(
            f"the kernels need a head_dim that is a power of two and at least 16, got {head_dim}; "
            f"{remedy}"
        )


def check_operands_for_kernels(head_dim: int, **rows: torch.Tensor | None) -> None:
    """Raise for a head dimension or strides that the oracle takes but the kernels do not."""
    check_head_dim(head_dim, 'use impl="torch"')
    for name, tensor in rows.items():
        if tensor is not None and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}; "
                f"call {name}.contiguous()"
            )
