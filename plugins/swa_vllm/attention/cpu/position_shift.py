"""Cache-relative positions of sink tokens on CPUs: sinks seem to lie just before the window.

For a query at ``p >= S + W`` that is a rotation of the sinks' scores by ``p - (S + W - 1)``
positions (StreamingLLM, https://arxiv.org/abs/2309.17453); keys in the KV cache stay as they are.

* Decoding: the ghost tail's copies are rotated onwards by that distance.
* In scratch pages each query has a distance of its own, and one copy of a sink serves many. Heads
  are therefore made wider by two elements for each sink: copy ``j`` of the sinks has a key of zeros
  but for ones in its two places, and a query has there its score with sink ``j``, rotated back by
  its distance: the score in the model's dtype and what is left of it. All other keys have zeros in
  these places.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import one_hot, pad
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from swa_backend.options import SWAConfigError
from swa_backend.window import last_unshifted
from swa_vllm.attention.cpu.ghost_tail import SinkCopies
from swa_vllm.attention.cpu.page_layout import PageLayout
from swa_vllm.attention.cpu.scratch import ScratchLayout
from swa_vllm.attention.rotation import Rotation


def wide_head_size(head_size: int, sink_tokens: int) -> int:
    """Head size of scratch pages that has two places for each sink.

    Raises:
        SWAConfigError: vLLM's operators have no heads that wide.
    """
    # Other sizes may change the layout of pages.
    sizes = [size for size in CPUAttentionBackend.get_supported_head_sizes() if size % 32 == 0]
    for size in sizes:
        if size >= head_size + 2 * sink_tokens:
            return size
    raise SWAConfigError(
        f"swa.position_shift on CPUs allows at most {(max(sizes) - head_size) // 2} sink_tokens "
        f"with a head size of {head_size}, got {sink_tokens}; give fewer, or remove position_shift"
    )


@dataclass(frozen=True)
class ShiftedScratch:
    """What the queries of a part need of the sinks, found once per step.

    Attributes:
        pages: how to read the KV cache.
        distances: int64 ``[num_tokens]``, how far each query is beyond
            :func:`~swa_backend.window.last_unshifted`.
        requests: for each request its tokens in the part, and the slots of its sinks in the KV
            cache, int64 ``[sink_tokens]``.
        read_slots: int64 ``[n]``, slots of the KV cache whose tokens are copied: first those of
            the sinks, then those that the chunks see before them.
        write_slots: int64 ``[n]``, where to.
    """

    pages: PageLayout
    distances: torch.Tensor
    requests: tuple[tuple[slice, torch.Tensor], ...]
    read_slots: torch.Tensor
    write_slots: torch.Tensor


class PositionShift:
    """Rotates sinks for the layers of one head size and RoPE."""

    def __init__(self, rotary: Any, head_size: int, sink_tokens: int) -> None:
        """Take the model's rotary embedding, whose table has cosines and sines of each position.

        Raises:
            SWAConfigError: too many sinks for vLLM's operators, or a RoPE without a table.
        """
        self.rotate = Rotation(rotary)
        self._head_size = head_size
        self._sink_tokens = sink_tokens
        self.wide_head_size = wide_head_size(head_size, sink_tokens)

    def copy_ghosts(
        self, kv_cache: torch.Tensor, ghosts: SinkCopies, distances: torch.Tensor
    ) -> None:
        """Write ghost tails, each key ``distances`` positions further on."""
        key, value = ghosts.layout.read(kv_cache, ghosts.sources)
        ghosts.layout.write(kv_cache, ghosts.targets, self.rotate(key, distances), value)

    def widen_query(
        self, query: torch.Tensor, sinks: ShiftedScratch, kv_cache: torch.Tensor
    ) -> torch.Tensor:
        """Append to each query its scores of the sinks.

        Args:
            query: ``[num_tokens, num_heads, head_size]``.
            kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``.

        Returns:
            ``[num_tokens, num_heads, wide_head_size]``.
        """
        wide = pad(query, (0, self.wide_head_size - self._head_size))
        turned = self.rotate(query, -sinks.distances)
        # Requests that prefill in one step are few.
        for tokens, slots in sinks.requests:
            key, _ = sinks.pages.read_tokens(kv_cache, slots)  # [S, Hkv, D]
            num_kv_heads = key.shape[1]
            own = turned[tokens].view(len(turned[tokens]), num_kv_heads, -1, self._head_size)
            scores = torch.einsum("nhgd,shd->nhgs", own.float(), key.float()).flatten(1, 2)
            rounded = scores.to(wide.dtype)
            rest = (scores - rounded.float()).to(wide.dtype)
            places = slice(self._head_size, self._head_size + 2 * self._sink_tokens)
            wide[tokens, :, places] = torch.cat((rounded, rest), dim=-1)
        return wide

    def widen_tokens(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: ScratchLayout,
        sinks: ShiftedScratch,
        kv_cache: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values and slots of everything that scratch pages hold.

        Args:
            key, value: the part's own, ``[num_tokens, num_kv_heads, head_size]``.

        Returns:
            Keys and values ``[n, num_kv_heads, wide_head_size]``, slots int64 ``[n]``.
        """
        copied_key, copied_value = sinks.pages.read_tokens(kv_cache, sinks.read_slots)
        num_sinks = len(layout.sink_numbers)
        copied_key[:num_sinks] = 0
        margin = (0, self.wide_head_size - self._head_size)
        wide_key = pad(torch.cat((copied_key, key[layout.tokens])), margin)
        marks = one_hot(layout.sink_numbers, self._sink_tokens).to(key.dtype).repeat(1, 2)
        places = slice(self._head_size, self._head_size + 2 * self._sink_tokens)
        wide_key[:num_sinks, :, places] = marks[:, None]
        wide_value = pad(torch.cat((copied_value, value[layout.tokens])), margin)
        return wide_key, wide_value, torch.cat((sinks.write_slots, layout.slots))


def shifted_scratch(
    layout: ScratchLayout,
    rows: CommonAttentionMetadata,
    pages: PageLayout,
    window: int,
    block_size: int,
    sink_tokens: int,
) -> ShiftedScratch:
    """Find what the requests of ``rows``, laid out by ``layout``, need of their sinks."""
    starts = rows.query_start_loc.tolist()
    last = last_unshifted(window, sink_tokens)
    sinks, within = torch.arange(sink_tokens), torch.arange(block_size)
    distances, requests = [], []
    for row, end in enumerate(rows.seq_lens.tolist()):
        tokens = slice(starts[row], starts[row + 1])
        positions = torch.arange(end - (tokens.stop - tokens.start), end)
        distances.append((positions - last).clamp(min=0))
        if end > last + 1:
            own = rows.block_table_tensor[row, sinks // block_size].long()
            requests.append((tokens, own * block_size + sinks % block_size))
    before, copies = (
        (blocks[:, None] * block_size + within).flatten()
        for blocks in (layout.sources, layout.targets)
    )
    # The last of these pages goes on with what is written here anyway.
    is_older = ~torch.isin(copies, torch.cat((layout.sink_targets, layout.slots)))
    return ShiftedScratch(
        pages=pages,
        distances=torch.cat(distances),
        requests=tuple(requests),
        read_slots=torch.cat((layout.sink_sources, before[is_older])),
        write_slots=torch.cat((layout.sink_targets, copies[is_older])),
    )
