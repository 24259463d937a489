"""Scratch pages: copies of what a prefill chunk sees, where the KV cache cannot serve it on CPUs.

vLLM's C++ attention reads keys from pages only, and its mask is one unbroken run of keys up to the
query. Two kinds of chunks are therefore laid out once a layer in scratch pages that all layers
share: those whose tables have holes, because the KV cache gets the survivors only; and those with
sink tokens, whose visible keys are two runs.

The layout of a chunk with sinks: its queries are cut into groups of at most ``W``, each a
pseudo-request with the keys ``[older | sinks | the group's own]`` and the window ``W + S``. Any
query of the group sees all keys behind the sinks up to itself, the sinks, and as many of the older
keys as its window has left. The first queries, below position ``W + S``, see everything: they form
a group in natural order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from swa_backend.pages import ceil_div
from swa_backend.window import first_visible, last_unshifted
from swa_vllm.attention.cpu.batches import copy_batch


@dataclass(frozen=True)
class QueryGroup:
    """Neighbouring queries of a chunk that one pseudo-request serves.

    Attributes:
        queries: their positions.
        first_key: position of the oldest key in the layout.
        has_sinks: whether copies of the sinks lie before the group's own keys.
    """

    queries: range
    first_key: int
    has_sinks: bool


def query_groups(chunk: range, window: int, sink_tokens: int, block_size: int) -> list[QueryGroup]:
    """Cut the positions ``chunk`` into groups; one where there are no sinks.

    Keys from before the chunk are copied by whole pages, so a first key that is one of them lies at
    a page's start.
    """

    def first_key(query: int, window: int) -> int:
        key = first_visible(query, window)
        return key // block_size * block_size if key < chunk.start else key

    if sink_tokens == 0:
        return [QueryGroup(chunk, first_key(chunk.start, window), has_sinks=False)]
    groups = []
    natural = range(chunk.start, min(chunk.stop, last_unshifted(window, sink_tokens) + 1))
    if natural:
        groups.append(QueryGroup(natural, first_key(0, window), has_sinks=False))
    for start in range(chunk.start + len(natural), chunk.stop, window):
        queries = range(start, min(chunk.stop, start + window))
        groups.append(QueryGroup(queries, first_key(start, window), has_sinks=True))
    return groups


@dataclass(frozen=True)
class ScratchLayout:
    """Where the rows of a batch lie in scratch pages.

    Attributes:
        batch: one pseudo-request a query group, with block tables that name scratch pages.
        num_pages: scratch pages in use.
        sources: int64 ``[n]``, pages of the KV cache that the rows see before their chunks.
        targets: int64 ``[n]``, their copies.
        tokens: int64 ``[m]``, tokens of the batch whose own keys are written; without sinks a slice
            of them all.
        slots: int64 ``[m]``, where to.
        sink_sources: int64 ``[k]``, slots of the KV cache that hold sinks.
        sink_targets: int64 ``[k]``, slots of their copies.
        sink_numbers: int64 ``[k]``, which sink each of them is.
    """

    batch: CommonAttentionMetadata
    num_pages: int
    sources: torch.Tensor
    targets: torch.Tensor
    tokens: torch.Tensor | slice
    slots: torch.Tensor
    sink_sources: torch.Tensor
    sink_targets: torch.Tensor
    sink_numbers: torch.Tensor


def lay_out_chunk_pages(
    rows: CommonAttentionMetadata, window: int, block_size: int, sink_tokens: int = 0
) -> ScratchLayout:
    """Lay out ``rows`` one after the other.

    Args:
        rows: ``block_table_tensor`` int32 ``[num_reqs, max_pages]``, ``seq_lens`` int32
            ``[num_reqs]`` and ``query_start_loc`` int32 ``[num_reqs + 1]``, all on the CPU.
        window: tokens a query sees, itself included.
        block_size: tokens a page.
    """
    table = rows.block_table_tensor.numpy()
    sinks = np.arange(sink_tokens)
    query_lens, seq_lens, first_pages = [], [], []
    sources, targets, tokens, slots, sink_sources, sink_targets = [], [], [], [], [], []
    num_pages = 0
    for row, chunk, first_token in _chunks_of_rows(rows):
        for group in query_groups(chunk, window, sink_tokens, block_size):
            first_slot = num_pages * block_size - group.first_key  # of position 0, had it a slot
            num_sinks = sink_tokens if group.has_sinks else 0
            before = np.arange(group.first_key, chunk.start, block_size) // block_size
            sources.append(table[row, before])
            targets.append(np.arange(num_pages, num_pages + len(before)))
            own = np.arange(max(group.first_key, chunk.start), group.queries.stop)
            tokens.append(own - chunk.start + first_token)
            slots.append(first_slot + own + np.where(own < group.queries.start, 0, num_sinks))
            if num_sinks:
                sink_sources.append(
                    table[row, sinks // block_size] * block_size + sinks % block_size
                )
                sink_targets.append(first_slot + group.queries.start + sinks)
            query_lens.append(len(group.queries))
            seq_lens.append(group.queries.stop - group.first_key + num_sinks)
            first_pages.append(num_pages)
            num_pages += ceil_div(seq_lens[-1], block_size)
    return ScratchLayout(
        batch=_pseudo_requests(rows, query_lens, seq_lens, first_pages, block_size),
        num_pages=num_pages,
        sources=_join_scratch_indices(sources),
        targets=_join_scratch_indices(targets),
        tokens=_join_scratch_indices(tokens) if sink_tokens else slice(None),
        slots=_join_scratch_indices(slots),
        sink_sources=_join_scratch_indices(sink_sources),
        sink_targets=_join_scratch_indices(sink_targets),
        sink_numbers=torch.arange(sink_tokens).repeat(len(sink_sources)),
    )


def _chunks_of_rows(rows: CommonAttentionMetadata) -> Iterator[tuple[int, range, int]]:
    """Yield each request's row, the positions of its queries, and its first token in the batch."""
    starts, ends = rows.query_start_loc.tolist(), rows.seq_lens.tolist()
    for row, end in enumerate(ends):
        yield row, range(end - (starts[row + 1] - starts[row]), end), starts[row]


def _pseudo_requests(
    rows: CommonAttentionMetadata,
    query_lens: list[int],
    seq_lens: list[int],
    first_pages: list[int],
    block_size: int,
) -> CommonAttentionMetadata:
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    columns = torch.arange(ceil_div(max(seq_lens), block_size), dtype=torch.int32)
    return copy_batch(
        rows,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=len(query_lens),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        block_table_tensor=torch.tensor(first_pages, dtype=torch.int32)[:, None] + columns,
    )


def _join_scratch_indices(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64))
