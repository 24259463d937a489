"""The oracle: window attention in plain torch, dense and readable, on the CPU.

Nothing here knows about kernels or engines; whatever a kernel accepts is accepted here too.
"""

import torch

from swa_backend.window import first_visible


def reference_mask(
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    window: int | None,
    sink_tokens: int = 0,
) -> torch.Tensor:
    """Evaluate :func:`swa_backend.window.is_visible` over two position vectors.

    Args:
        query_positions: int ``[Q]``.
        key_positions: int ``[K]``.

    Returns:
        bool ``[Q, K]``, true where the query sees the key.
    """
    distance = query_positions[:, None] - key_positions[None, :]
    mask = distance >= 0
    if window is None:
        return mask
    return mask & ((distance < window) | (key_positions[None, :] < sink_tokens))


def sliding_window_mask_4d(
    query_len: int, key_len: int, window: int | None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Make the additive mask of the last ``query_len`` of ``key_len`` positions.

    Hugging Face's eager attention takes it in this form. Serves tests and documentation only.

    Returns:
        ``dtype`` ``[1, 1, query_len, key_len]``: 0 where visible, the dtype's minimum elsewhere.
    """
    if not 0 <= query_len <= key_len:
        raise ValueError(f"query_len must lie in 0..key_len={key_len}, got {query_len}")
    keys = torch.arange(key_len)
    visible = reference_mask(keys[key_len - query_len :], keys, window)
    mask = torch.full(visible.shape, torch.finfo(dtype).min, dtype=dtype)
    return mask.masked_fill(visible, 0.0)[None, None]


def slice_cache(
    key: torch.Tensor, value: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the part of a dense cache that a next token can still see: the last ``window - 1`` keys.

    Serves tests and documentation only: the window as rolling caches keep it.

    Args:
        key, value: ``[..., num_tokens, head_dim]``.

    Returns:
        Views ``[..., min(num_tokens, window - 1), head_dim]``.
    """
    first = first_visible(key.shape[-2], window)
    return key[..., first:, :], value[..., first:, :]


def gather_pages(pages: torch.Tensor, block_table: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Gather the rows of the first ``num_tokens`` tokens by a block table.

    Serves tests and documentation only: what a block table means.

    Args:
        pages: ``[num_blocks, num_kv_heads, block, head_dim]``.
        block_table: int ``[num_pages]``, in the order of positions.

    Returns:
        ``[num_kv_heads, num_tokens, head_dim]``.
    """
    rows = pages[block_table.long()].transpose(0, 1).flatten(1, 2)
    return rows[:, :num_tokens]


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Compute masked softmax attention in the inputs' precision; zeros for rows without a key.

    Args:
        query: ``[num_heads, Q, head_dim]``.
        key, value: ``[num_kv_heads, K, head_dim]``; query head ``h`` reads KV head ``h // G``.
        mask: bool ``[Q, K]``, true where visible. Keys that no query sees may hold NaN.

    Returns:
        ``[num_heads, Q, head_dim]``.
    """
    group = query.shape[0] // key.shape[0]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    seen = mask.any(dim=0)
    key = key[:, seen].repeat_interleave(group, dim=0)
    value = value[:, seen].repeat_interleave(group, dim=0)
    scores = (query @ key.transpose(-1, -2)) * scale
    weights = scores.masked_fill(~mask[:, seen], float("-inf")).softmax(dim=-1)
    return weights.nan_to_num(0.0) @ value


def write_pages(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Do what :func:`swa_backend.ops.write_pages` does, token by token."""
    head_dim, page = key.shape[-1], kv_cache.shape[2]
    largest = torch.finfo(kv_cache.dtype).max
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        row = kv_cache[slot // page, :, slot % page]  # [Hkv, 2 * D]
        for x, scale, half in (
            (key, k_scale, row[:, :head_dim]),
            (value, v_scale, row[:, head_dim:]),
        ):
            if kv_cache.element_size() > 1:
                half.copy_(x[token])
            else:
                # torch's own conversion of an e5m2 overflow gives infinity.
                half.copy_((x[token].float() / scale).clamp(-largest, largest))


def decode_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    window: int | None,
    sink_tokens: int = 0,
    scale: float | None = None,
    sink_query: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute what :func:`swa_backend.ops.decode_attention` does, query by query, in fp64.

    Also takes fp64 queries, whose output is then not rounded.
    """
    if query_start_loc is None:
        query_start_loc = torch.arange(len(seq_lens) + 1)
    starts = query_start_loc.tolist()
    out = torch.empty_like(query) if out is None else out
    out.zero_()
    for request, seq_len in enumerate(seq_lens.tolist()):
        for token in range(starts[request], starts[request + 1]):
            position = seq_len - starts[request + 1] + token
            everything = torch.arange(max(seq_len, 0))
            visible = reference_mask(torch.tensor([position]), everything, window, sink_tokens)[0]
            # Table entries of the other positions may be stale.
            positions = visible.nonzero().flatten()
            rows = _gather_reference_rows(kv_cache, block_table[request], positions)
            key, value = rows.chunk(2, dim=-1)
            is_shifted = positions < first_visible(position, window)
            shifted = query if sink_query is None else sink_query
            out[token] = _reference_attention(
                query[token], shifted[token], key * k_scale, value * v_scale, is_shifted, scale
            )
    return out


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
) -> torch.Tensor:
    """Compute what :func:`swa_backend.ops.prefill_attention` does, query by query, in fp64.

    Also takes fp64 queries, whose output is then not rounded.
    """
    starts = query_start_loc.tolist()
    out = torch.empty_like(query) if out is None else out
    out.zero_()
    shifted = query if sink_query is None else sink_query
    for request, seq_len in enumerate(seq_lens.tolist()):
        tokens = range(starts[request], starts[request + 1])
        context = seq_len - len(tokens)
        for position, token in enumerate(tokens, start=context):
            everything = torch.arange(max(seq_len, 0))
            visible = reference_mask(torch.tensor([position]), everything, window, sink_tokens)[0]
            positions = visible.nonzero().flatten()
            is_cached = positions < context
            cached = _gather_reference_rows(kv_cache, block_table[request], positions[is_cached])
            own = (positions[~is_cached] - context + tokens.start).to(key.device)
            keys, values = cached.chunk(2, dim=-1)
            out[token] = _reference_attention(
                query[token],
                shifted[token],
                torch.cat((keys * k_scale, key[own].double().transpose(0, 1)), dim=1),
                torch.cat((values * v_scale, value[own].double().transpose(0, 1)), dim=1),
                positions < first_visible(position, window),
                scale,
            )
    return out


def _gather_reference_rows(
    kv_cache: torch.Tensor, table: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Gather cached keys and values at ``positions [K]``, fp64 ``[Hkv, K, 2 * D]``."""
    page = kv_cache.shape[2]
    pages = table.cpu()[positions // page].long()
    rows = kv_cache[pages.to(kv_cache.device), :, (positions % page).to(kv_cache.device)]
    return rows.double().transpose(0, 1)


def _reference_attention(
    query: torch.Tensor,
    shifted_query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_shifted: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    """Attend from one query ``[Hq, D]``; keys where ``is_shifted [K]`` meet ``shifted_query``."""
    group = query.shape[0] // key.shape[0]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key, value = (x.repeat_interleave(group, dim=0) for x in (key, value))
    plain, shifted = (torch.einsum("hd,hkd->hk", q.double(), key) for q in (query, shifted_query))
    scores = torch.where(is_shifted.to(query.device), shifted, plain) * scale
    return torch.einsum("hk,hkd->hd", scores.softmax(dim=-1), value)


def rotate_back(
    states: torch.Tensor,
    distances: torch.Tensor,
    table: torch.Tensor,
    *,
    is_neox: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute what :func:`swa_backend.ops.rotate_back` does, in complex fp64 numbers."""
    size = table.shape[1]
    cos, sin = (table[distances.abs()].double() / table[0, 0].double()).chunk(2, dim=-1)
    turns = torch.complex(cos, -sin * distances.sign()[:, None])[:, None]
    rotated = states[..., :size].double()
    shape = (2, size // 2) if is_neox else (size // 2, 2)
    pairs = rotated.view(*rotated.shape[:2], *shape)
    axis = -2 if is_neox else -1
    first, second = pairs.unbind(axis)
    turned = torch.complex(first, second) * turns
    both = torch.stack((turned.real, turned.imag), dim=axis).flatten(-2)
    out = torch.empty_like(states) if out is None else out
    out[..., :size] = both.to(states.dtype)
    out[..., size:] = states[..., size:]
    return out
