"""Prefill attention by xformers: a local mask over each chunk's window before it, and the chunk.

No mask of xformers is both paged and local (``make_paged`` on a local mask drops the window), so
the keys that chunks see in their pages are gathered into one tensor first, which waits for the
lengths on the host. No mask has sinks. A chunk's tokens need not be stored here either.
"""

import torch

from swa_backend.attention_call import PrefillCall
from swa_backend.window import Phase, first_visible


def prefill_by_xformers(call: PrefillCall, out: torch.Tensor) -> torch.Tensor:
    """Write what :func:`swa_backend.ops.prefill_attention` computes to ``out``, and return it.

    Raises:
        ValueError: the call has sinks, or a phase.
        NotImplementedError: xformers has no operator for the device, with its reasons.
    """
    if call.sink_tokens:
        raise ValueError(
            f"xformers has no mask with sinks, got sink_tokens={call.sink_tokens}; use "
            'impl="triton"'
        )
    if call.phase is not Phase.BOTH:
        raise ValueError(
            f'xformers has no mask of phases, got phase="{call.phase}"; use impl="triton"'
        )
    out.zero_()
    key, value, device = call.key, call.value, call.kv_cache.device
    starts = call.query_start_loc.tolist()
    keys, values, num_queries, num_keys = [], [], [], []
    tokens: list[int] = []
    for request, seq_len in enumerate(call.seq_lens.tolist()):
        own = range(starts[request], starts[request + 1])
        if not own or not seq_len:
            continue
        context = seq_len - len(own)
        first = min(first_visible(context, call.window), context)
        positions = torch.arange(first, context, device=device)
        page = call.kv_cache.shape[2]
        pages = call.block_table[request, positions // page].long()
        rows = call.kv_cache[pages, :, positions % page].float()  # [num_positions, Hkv, 2 * D]
        cached_key, cached_value = rows.chunk(2, dim=-1)
        keys += [(cached_key * call.k_scale).to(key.dtype), key[own.start : own.stop]]
        values += [(cached_value * call.v_scale).to(key.dtype), value[own.start : own.stop]]
        tokens += own
        num_queries.append(len(own))
        num_keys.append(len(positions) + len(own))
    if tokens:
        index = torch.tensor(tokens, device=device)
        states = call.query[index], torch.cat(keys), torch.cat(values)
        out[index] = _attend_by_xformers(
            *states, num_queries, num_keys, call.window, call.softmax_scale
        )
    return out


def _attend_by_xformers(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_queries: list[int],
    num_keys: list[int],
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Attention of gathered keys, request by request: ``num_keys`` for the last ``num_queries``."""
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
