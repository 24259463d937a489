"""The ghost tail: copies of sink tokens behind the newest token, for decoding on CPUs.

vLLM's C++ attention sees one unbroken run of keys up to the query, and a window that left its sinks
behind is two. A step that computes one token therefore writes copies of the ``S`` sinks into the
slots behind it, which the next step overwrites, and attends from there with the window ``W + S``:
softmax does not care for the order of keys. While the text is not longer than ``W + S`` everything
is visible and nothing is done.
"""

from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from swa_backend.window import last_unshifted
from swa_vllm.attention.cpu.batches import copy_batch
from swa_vllm.attention.cpu.page_layout import Located, PageLayout


@dataclass(frozen=True)
class SinkCopies:
    """Copies of sink tokens that every layer makes in a step.

    Attributes:
        layout: of the KV cache and of the pages that are copied to.
        sources: tokens of the KV cache.
        targets: places for them in the pages that are copied to.
    """

    layout: PageLayout
    sources: Located
    targets: Located

    @classmethod
    def between(
        cls, layout: PageLayout, sources: torch.Tensor, targets: torch.Tensor
    ) -> "SinkCopies | None":
        """Copies from slots to slots, int64 ``[n]``; None for none."""
        if len(sources) == 0:
            return None
        return cls(layout, layout.locate(sources), layout.locate(targets))

    def copy(self, kv_cache: torch.Tensor, pages: torch.Tensor) -> None:
        """Copy from the KV cache to ``pages``, which may be the cache itself."""
        self.layout.write(pages, self.targets, *self.layout.read(kv_cache, self.sources))


@dataclass(frozen=True)
class GhostTail:
    """Where a step's sinks and their copies are.

    Attributes:
        batch: the step's batch, with requests longer by the copies behind them.
        sources: int64 ``[n]``, slots of sinks.
        targets: int64 ``[n]``, slots of their copies.
        distances: int64 ``[n]``, how far the request's query is beyond
            :func:`~swa_backend.window.last_unshifted`.
    """

    batch: CommonAttentionMetadata
    sources: torch.Tensor
    targets: torch.Tensor
    distances: torch.Tensor


def ghost_tail(
    batch: CommonAttentionMetadata, window: int, sink_tokens: int, block_size: int
) -> GhostTail:
    """Lay out ghost tails for requests that decode one token and have left their sinks behind.

    Args:
        batch: ``block_table_tensor`` int32 ``[num_reqs, max_pages]`` with ``sink_tokens`` slots
            behind each request's last token, ``seq_lens`` int32 ``[num_reqs]`` and
            ``query_start_loc`` int32 ``[num_reqs + 1]``, all on the CPU.
    """
    starts, ends = batch.query_start_loc.numpy(), batch.seq_lens.numpy()
    beyond = ends - 1 - last_unshifted(window, sink_tokens)
    has_tail = (starts[1:] - starts[:-1] == 1) & (beyond > 0)
    rows = has_tail.nonzero()[0]
    table, sinks = batch.block_table_tensor.numpy(), np.arange(sink_tokens)

    def slots(positions: np.ndarray) -> torch.Tensor:
        pages = table[rows[:, None], positions // block_size].astype(np.int64)
        return torch.from_numpy((pages * block_size + positions % block_size).ravel())

    longer = torch.from_numpy(ends + has_tail * np.int32(sink_tokens))
    return GhostTail(
        batch=copy_batch(batch, seq_lens=longer, max_seq_len=int(longer.max())),
        sources=slots(sinks[None, :]),
        targets=slots(ends[rows, None] + sinks),
        distances=torch.from_numpy(beyond[rows].repeat(sink_tokens)).long(),
    )
