"""Window-relative view of a step's batch on CPUs, made once per step and group.

Rows of the block table are indexed by position and may name freed pages below the window (a
worker is never told of frees), so the rows are kept as they are and kernels get a view that
starts at each request's first live page.

The arithmetic is NumPy's: on a few dozen numbers its calls cost a tenth of PyTorch's.
"""

from typing import Any

import numpy as np
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
            ``[num_reqs]``, ``query_start_loc`` int32 ``[num_reqs + 1]``, all on the CPU.
        window: tokens a query sees, itself included.
        block_size: tokens a page.
    """
    ends, table = batch.seq_lens.numpy(), batch.block_table_tensor.numpy()
    starts = batch.query_start_loc.numpy()
    query_lens = starts[1:] - starts[:-1]
    first_page = np.maximum(ends - query_lens - (window - 1), 0) // block_size  # [num_reqs]
    seq_lens = ends - first_page * block_size
    max_seq_len = int(seq_lens.max())
    columns = np.arange(-(-max_seq_len // block_size), dtype=np.int32)
    pages = np.minimum(first_page[:, None] + columns, table.shape[1] - 1)
    return _changed(
        batch,
        seq_lens=torch.from_numpy(seq_lens),
        max_seq_len=max_seq_len,
        block_table_tensor=torch.from_numpy(table[np.arange(len(table))[:, None], pages]),
    )


def rows_with_holes(view: CommonAttentionMetadata, block_size: int) -> list[bool]:
    """Which rows' chunks pass over pages that they do not store.

    Args:
        view: a :func:`window_view`: every entry of a row is live but for the holes.
    """
    table = view.block_table_tensor.numpy()
    is_null = table == NULL_BLOCK_ID
    if not is_null.any():
        return [False] * len(table)
    num_pages = -(-view.seq_lens.numpy() // block_size)
    is_used = np.arange(table.shape[1]) < num_pages[:, None]
    return [bool(row) for row in (is_null & is_used).any(axis=1)]


def _changed(batch: CommonAttentionMetadata, **changes: Any) -> CommonAttentionMetadata:
    """``dataclasses.replace`` without its cost, which grows with the fields of the class."""
    new = object.__new__(type(batch))
    vars(new).update(vars(batch), **changes)
    return new


def select_rows(batch: CommonAttentionMetadata, first: int, stop: int) -> CommonAttentionMetadata:
    """The requests ``first..stop-1`` of ``batch`` as a batch of their own."""
    starts = batch.query_start_loc[first : stop + 1]
    tokens = slice(int(starts[0]), int(starts[-1]))
    seq_lens = batch.seq_lens[first:stop]
    return _changed(
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
