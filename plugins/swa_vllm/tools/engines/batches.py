"""Batches of one step, as the model runner gives them to metadata builders."""

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from swa_backend.pages import WindowPages, ceil_div
from swa_backend.window import first_visible

BLOCK_SIZE = 32


def make_batch(
    context_lens: list[int],
    query_lens: list[int],
    pages: WindowPages | None = None,
    spare_tokens: int = 0,
    prompts: list[int] | None = None,
) -> CommonAttentionMetadata:
    """Make the batch of a step as the model runner gives it to metadata builders.

    Args:
        pages: leave the holes that this window allows; None stores every page.
        spare_tokens: slots behind each request's newest token.
        prompts: length of each request's prompt, which a window in one phase only needs.
    """
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    seq_lens = torch.tensor(context_lens, dtype=torch.int32) + starts.diff()
    num_tokens, width = int(starts[-1]), ceil_div(int(seq_lens.max()) + spare_tokens, BLOCK_SIZE)
    table = torch.zeros(len(query_lens), width, dtype=torch.int32)
    next_page, slots = 1, []
    for row, (context, length) in enumerate(zip(context_lens, query_lens, strict=True)):
        num_pages = ceil_div(context + length + spare_tokens, BLOCK_SIZE)
        table[row, :num_pages] = torch.arange(next_page, next_page + num_pages)
        next_page += num_pages
        if pages is not None:
            holes = pages.holes(ceil_div(context, BLOCK_SIZE), context + length)
            table[row, holes.start : holes.stop] = 0
        positions = torch.arange(context, context + length)
        slots.append(
            table[row, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        )
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        num_reqs=len(query_lens),
        num_actual_tokens=num_tokens,
        max_query_len=max(query_lens),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=table,
        slot_mapping=torch.cat(slots),
        rswa_prefix_lens=None if prompts is None else torch.tensor(prompts, dtype=torch.int32),
    )


def make_window_batch(context_len: int, num_reqs: int, window: int) -> CommonAttentionMetadata:
    """Make a step of equal decoding requests that hold the pages of their windows only."""
    batch = make_batch([context_len] * num_reqs, [1] * num_reqs)
    table, last = batch.block_table_tensor, context_len // BLOCK_SIZE
    first = first_visible(context_len, window) // BLOCK_SIZE
    table.zero_()
    table[:, first : last + 1] = 1 + torch.arange(num_reqs * (last + 1 - first)).view(num_reqs, -1)
    batch.slot_mapping = table[:, last].long() * BLOCK_SIZE + context_len % BLOCK_SIZE
    return batch
