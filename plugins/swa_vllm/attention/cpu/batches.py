"""What CPU attention needs of a step's batch beyond vLLM's own metadata.

Rows of the block table are indexed by position and may name freed pages below the window (a
worker is never told of frees). vLLM's C++ operators take the rows as they are: they look at no page
that lies wholly below the window.

The arithmetic is NumPy's: on a few dozen numbers its calls cost a tenth of PyTorch's.
"""

from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID


def rows_with_holes(batch: CommonAttentionMetadata, window: int, block_size: int) -> list[bool]:
    """Tell for each request whether its chunk passes over pages that are not stored.

    Args:
        batch: ``block_table_tensor`` int32 ``[num_reqs, max_pages]``, ``seq_lens`` int32
            ``[num_reqs]``, ``query_start_loc`` int32 ``[num_reqs + 1]``, all on the CPU.
        window: tokens a query sees, itself included.
        block_size: tokens a page.
    """
    if batch.max_query_len == 1:
        return [False] * batch.num_reqs
    table, ends = batch.block_table_tensor.numpy(), batch.seq_lens.numpy()
    starts = batch.query_start_loc.numpy()
    query_lens = starts[1:] - starts[:-1]
    first_page = np.maximum(ends - query_lens - (window - 1), 0) // block_size
    num_pages = -(-ends // block_size)
    pages = np.arange(table.shape[1])
    in_use = (pages >= first_page[:, None]) & (pages < num_pages[:, None])
    return [bool(row) for row in ((table == NULL_BLOCK_ID) & in_use).any(axis=1)]


def copy_batch(batch: CommonAttentionMetadata, **changes: Any) -> CommonAttentionMetadata:
    """Copy a batch with some fields changed, at less cost than ``dataclasses.replace``."""
    new = object.__new__(type(batch))
    vars(new).update(vars(batch), **changes)
    return new


def select_rows(batch: CommonAttentionMetadata, first: int, stop: int) -> CommonAttentionMetadata:
    """The requests ``first..stop-1`` of ``batch`` as a batch of their own."""
    starts = batch.query_start_loc[first : stop + 1]
    tokens = slice(int(starts[0]), int(starts[-1]))
    seq_lens = batch.seq_lens[first:stop]
    return copy_batch(
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
        rswa_prefix_lens=None,
    )


def split_at_prompt_ends(
    batch: CommonAttentionMetadata,
) -> tuple[CommonAttentionMetadata, list[bool]]:
    """Divide requests whose chunks cross the ends of their prompts into two rows each.

    A batch without lengths of prompts, which vLLM makes to warm up, counts as prompts.

    Args:
        batch: ``rswa_prefix_lens`` int32 ``[num_reqs]``, the lengths of prompts, on the CPU.

    Returns:
        The batch, and for each of its rows whether its queries are generated tokens.
    """
    if batch.rswa_prefix_lens is None:
        return batch, [False] * batch.num_reqs
    starts, ends = batch.query_start_loc.numpy(), batch.seq_lens.numpy()
    prompt_lens = batch.rswa_prefix_lens[: batch.num_reqs].numpy()
    is_answer = ends - (starts[1:] - starts[:-1]) >= prompt_lens
    crosses = ~is_answer & (ends > prompt_lens)
    if not crosses.any():
        return batch, is_answer.tolist()
    rows = np.repeat(np.arange(batch.num_reqs), 1 + crosses)
    is_second = np.diff(rows, prepend=-1) == 0
    is_first = crosses[rows] & ~is_second
    new_ends = np.where(is_first, prompt_lens[rows], ends[rows])
    behind = np.where(is_first, ends[rows] - prompt_lens[rows], 0)  # tokens of the second
    new_starts = np.append(starts[:1], starts[rows + 1] - behind).astype(np.int32)
    query_start_loc = torch.from_numpy(new_starts)
    return copy_batch(
        batch,
        query_start_loc=query_start_loc,
        query_start_loc_cpu=query_start_loc,
        seq_lens=torch.from_numpy(new_ends.astype(np.int32)),
        num_reqs=len(rows),
        max_query_len=int(np.diff(new_starts).max()),
        max_seq_len=int(new_ends.max()),
        block_table_tensor=batch.block_table_tensor[torch.from_numpy(rows)],
        rswa_prefix_lens=torch.from_numpy(prompt_lens[rows]),
    ), (is_answer[rows] | is_second).tolist()
