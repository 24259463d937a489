"""Window-relative view of a step's batch, made once per step and group.

Rows of the block table are indexed by position and may name freed pages below the window (a
worker is never told of frees), so the rows are kept as they are and kernels get a view that
starts at each request's first live page.
"""

from dataclasses import replace

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID


def window_view(
    batch: CommonAttentionMetadata, window: int, block_size: int
) -> CommonAttentionMetadata:
    """``batch`` with each row's block table and length counted from its first live page.

    Attention depends on distances only, so shifting queries and keys of a row by the same number
    of whole pages changes nothing. ``slot_mapping`` and query offsets stay those of ``batch``.

    Args:
        batch: ``block_table_tensor`` int32 ``[num_reqs, max_pages]``, ``seq_lens`` int32
            ``[num_reqs]``, ``query_start_loc`` int32 ``[num_reqs + 1]``, all on one device.
        window: tokens a query sees, itself included.
        block_size: tokens a page.
    """
    query_lens = batch.query_start_loc.diff()
    first_visible = (batch.seq_lens - query_lens - (window - 1)).clamp_(min=0)
    first_page = first_visible // block_size  # [num_reqs]
    seq_lens = batch.seq_lens - first_page * block_size
    max_seq_len = int(seq_lens.max())
    table = batch.block_table_tensor
    columns = torch.arange(-(-max_seq_len // block_size), device=table.device)
    pages = (first_page[:, None] + columns).clamp_(max=table.shape[1] - 1)
    return replace(
        batch,
        seq_lens=seq_lens,
        max_seq_len=max_seq_len,
        block_table_tensor=table.gather(1, pages.long()),
    )


def rows_with_holes(view: CommonAttentionMetadata, block_size: int) -> torch.Tensor:
    """Rows whose chunk passes over pages that it does not store.

    Args:
        view: a :func:`window_view`: every entry of a row is live but for the holes.

    Returns:
        bool ``[num_reqs]``.
    """
    columns = torch.arange(view.block_table_tensor.shape[1])
    used = columns * block_size < view.seq_lens[:, None]
    return ((view.block_table_tensor == NULL_BLOCK_ID) & used).any(dim=1)


def select_rows(batch: CommonAttentionMetadata, first: int, stop: int) -> CommonAttentionMetadata:
    """The requests ``first..stop-1`` of ``batch`` as a batch of their own."""
    starts = batch.query_start_loc[first : stop + 1]
    tokens = slice(int(starts[0]), int(starts[-1]))
    seq_lens = batch.seq_lens[first:stop]
    return replace(
        batch,
        query_start_loc=starts - starts[0],
        query_start_loc_cpu=batch.query_start_loc_cpu[first : stop + 1] - tokens.start,
        seq_lens=seq_lens,
        num_reqs=stop - first,
        num_actual_tokens=tokens.stop - tokens.start,
        max_query_len=int(starts.diff().max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=batch.block_table_tensor[first:stop],
        slot_mapping=batch.slot_mapping[tokens],
    )
