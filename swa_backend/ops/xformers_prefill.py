"""Prefill attention by xformers: a local mask over each chunk's window before it, and the chunk.

No mask of xformers is both paged and local (``make_paged`` on a local mask drops the window), so
what the chunks see of their pages is copied together first, which waits for the lengths on the
host; and none has sinks. A chunk's tokens are not stored here either.
"""

import torch

from swa_backend.window import first_visible


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
    sink_tokens: int,
    scale: float,
    sink_query: torch.Tensor | None,
    k_scale: float,
    v_scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """What :func:`swa_backend.ops.prefill_attention` computes.

    Raises:
        ValueError: sinks.
        NotImplementedError: xformers has no operator for the device, with its reasons.
    """
    if sink_tokens:
        raise ValueError(
            f'xformers has no mask with sinks, got sink_tokens={sink_tokens}; use impl="triton"'
        )
    out.zero_()
    starts = query_start_loc.tolist()
    keys, values, num_queries, num_keys = [], [], [], []
    tokens: list[int] = []
    for request, seq_len in enumerate(seq_lens.tolist()):
        own = range(starts[request], starts[request + 1])
        if not own or not seq_len:
            continue
        context = seq_len - len(own)
        positions = torch.arange(
            min(first_visible(context, window), context), context, device=kv_cache.device
        )
        page = kv_cache.shape[2]
        pages = block_table[request, positions // page].long()
        rows = kv_cache[pages, :, positions % page].float()  # [num_positions, Hkv, 2 * D]
        cached_key, cached_value = rows.chunk(2, dim=-1)
        keys += [(cached_key * k_scale).to(key.dtype), key[own.start : own.stop]]
        values += [(cached_value * v_scale).to(key.dtype), value[own.start : own.stop]]
        tokens += own
        num_queries.append(len(own))
        num_keys.append(len(positions) + len(own))
    if tokens:
        index = torch.tensor(tokens, device=query.device)
        states = query[index], torch.cat(keys), torch.cat(values)
        out[index] = _attend(*states, num_queries, num_keys, window, scale)
    return out


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_queries: list[int],
    num_keys: list[int],
    window: int | None,
    scale: float,
) -> torch.Tensor:
    from xformers.ops import fmha

    mask = fmha.attn_bias.BlockDiagonalMask.from_seqlens(num_queries, num_keys, device=query.device)
    if window is None:
        mask = mask.make_causal_from_bottomright()
    else:
        mask = mask.make_local_attention_from_bottomright(window)
    num_kv_heads, head_dim = key.shape[1:]
    group = query.shape[1] // num_kv_heads
    heads = (num_kv_heads, group, head_dim)
    key, value = (x[None, :, :, None].expand(1, len(x), *heads) for x in (key, value))
    attended: torch.Tensor = fmha.memory_efficient_attention_forward(
        query.reshape(1, -1, *heads), key, value, attn_bias=mask, scale=scale
    )
    return attended.reshape(query.shape)
