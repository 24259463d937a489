"""The oracle: window attention in plain torch, dense and readable, on the CPU.

Nothing here knows about kernels or engines; whatever a kernel accepts is accepted here too.
"""

import torch

from swa_backend.window import first_visible


def visible_mask(
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    window: int | None,
    sink_tokens: int = 0,
) -> torch.Tensor:
    """Boolean mask of :func:`swa_backend.window.is_visible` over two position vectors.

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
    """Additive mask of the last ``query_len`` of ``key_len`` positions, as Hugging Face's eager
    attention takes it.

    Returns:
        ``dtype`` ``[1, 1, query_len, key_len]``: 0 where visible, the dtype's minimum elsewhere.
    """
    if not 0 <= query_len <= key_len:
        raise ValueError(f"query_len must lie in 0..key_len={key_len}, got {query_len}")
    keys = torch.arange(key_len)
    visible = visible_mask(keys[key_len - query_len :], keys, window)
    mask = torch.full(visible.shape, torch.finfo(dtype).min, dtype=dtype)
    return mask.masked_fill(visible, 0.0)[None, None]


def slice_cache(
    key: torch.Tensor, value: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of a dense cache that a next token can still see: its last ``window - 1`` keys.

    Args:
        key, value: ``[..., num_tokens, head_dim]``.

    Returns:
        Views ``[..., min(num_tokens, window - 1), head_dim]``.
    """
    first = first_visible(key.shape[-2], window)
    return key[..., first:, :], value[..., first:, :]


def gather_pages(pages: torch.Tensor, block_table: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The first ``num_tokens`` rows behind a block table.

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
    """Masked softmax attention in the inputs' precision; a row that sees nothing gives zeros.

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
