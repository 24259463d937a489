"""Scratch pages: where a prefill chunk with holes is attended to on CPUs.

vLLM's C++ attention reads keys from pages only. A chunk whose table has holes is therefore laid out
once a layer in scratch pages that all layers share: first copies of the pages before the chunk that
its queries still see, then the chunk's own keys and values. The KV cache gets the survivors only.
"""

from dataclasses import dataclass, replace

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata


@dataclass(frozen=True)
class ScratchLayout:
    """Where the rows of a batch lie in scratch pages.

    Attributes:
        batch: the rows, with block tables that name scratch pages.
        num_pages: scratch pages in use.
        sources: int64 ``[n]``, pages of the KV cache that the rows see before their chunks.
        targets: int64 ``[n]``, their copies.
        slots: int64 ``[num_tokens]``, slots of the chunks' own keys.
    """

    batch: CommonAttentionMetadata
    num_pages: int
    sources: torch.Tensor
    targets: torch.Tensor
    slots: torch.Tensor


def scratch_layout(rows: CommonAttentionMetadata, block_size: int) -> ScratchLayout:
    """Lay out ``rows``, of a window view, one after the other.

    Args:
        rows: ``block_table_tensor`` int32 ``[num_reqs, max_pages]``, ``seq_lens`` int32
            ``[num_reqs]`` and ``query_start_loc`` int32 ``[num_reqs + 1]``, on one device.
        block_size: tokens a page.
    """
    query_lens = rows.query_start_loc.diff()
    num_before = rows.seq_lens - query_lens  # tokens in the view before each chunk
    num_pages = (rows.seq_lens + block_size - 1) // block_size
    first_page = num_pages.cumsum(0, dtype=torch.int32) - num_pages

    columns = torch.arange(rows.block_table_tensor.shape[1], dtype=torch.int32)
    table = first_page[:, None] + columns
    before = columns * block_size < num_before[:, None]
    first_slot = first_page.long() * block_size + num_before - rows.query_start_loc[:-1]
    return ScratchLayout(
        batch=replace(rows, block_table_tensor=table),
        num_pages=int(num_pages.sum()),
        sources=rows.block_table_tensor[before].long(),
        targets=table[before].long(),
        slots=first_slot.repeat_interleave(query_lens.long())
        + torch.arange(rows.num_actual_tokens),
    )
