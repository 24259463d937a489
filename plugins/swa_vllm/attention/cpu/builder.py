"""The metadata of a step for windowed layers on CPUs."""

from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, CPUAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from swa_backend.window import Phase, last_unshifted
from swa_vllm.attention.cpu.answer_table import answer_tables
from swa_vllm.attention.cpu.batches import rows_with_holes, select_rows, split_at_prompt_ends
from swa_vllm.attention.cpu.fresh_pages import fresh_pages
from swa_vllm.attention.cpu.ghost_tail import SinkCopies, ghost_tail
from swa_vllm.attention.cpu.page_layout import PageLayout
from swa_vllm.attention.cpu.position_shift import ShiftedScratch, shifted_scratch
from swa_vllm.attention.cpu.scratch import ScratchLayout, lay_out_chunk_pages
from swa_vllm.attention.layer import phase_of_layers, windowed_layers
from swa_vllm.attention.layer_table import log_layers
from swa_vllm.attention.poison import NaNCheck, PoisonWatch

NO_WINDOW = -1  # to vLLM's operators


@dataclass(frozen=True)
class Part:
    """Neighbouring requests of a batch that one operator call serves.

    Attributes:
        tokens: their tokens in the batch.
        metadata: of these requests alone.
        window: tokens that a query sees of a run of keys, or NO_WINDOW; None for the layer's own.
        layout: where their keys lie in scratch pages; None where the KV cache serves them.
        sinks: copies of their sinks in scratch pages, plain or with cache-relative positions.
    """

    tokens: slice
    metadata: CPUAttentionMetadata
    layout: ScratchLayout | None = None
    sinks: SinkCopies | ShiftedScratch | None = None
    window: int | None = None


@dataclass(frozen=True)
class SWACPUMetadata:
    """A step's batch for the layers of one group.

    Attributes:
        slot_mapping: int64 ``[num_tokens]``; -1 for a token that the KV cache need not keep.
        parts: the batch, split where requests need scratch pages.
        scratch: ``[num_pages, num_kv_heads, block_size, 2 * head_size]`` for those.
        ghosts: copies of sinks, or of what is left of prompts and windows, in the KV cache, behind
            the newest tokens.
        ghost_distances: int64 ``[n]``, of each from its place under cache-relative positions.
        nan_check: what to check each layer's output with, if pages are poisoned.
        fresh_pages: int64 ``[n]``, pages to clear before anything is written.
    """

    slot_mapping: torch.Tensor
    parts: tuple[Part, ...]
    scratch: torch.Tensor | None = None
    ghosts: SinkCopies | None = None
    ghost_distances: torch.Tensor | None = None
    nan_check: NaNCheck | None = None
    fresh_pages: torch.Tensor | None = None


class SWACPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Splits a batch into what vLLM's operators serve from the KV cache and what needs scratch.

    Attributes:
        page_layout: how the KV cache keeps tokens; None where nothing is copied.
    """

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # A full layer, where --attention-backend CUSTOM asks for them too.
        self._layer = get_layers_from_vllm_config(vllm_config, Attention)[layer_names[0]]
        self._sink_tokens = getattr(self._layer, "sink_tokens", 0)
        # The operators' window is longer by the copies of the sinks.
        self._window = self.window_size - self._sink_tokens
        self._wide_builder = self._make_wide_builder(device)
        self._phase = phase_of_layers(layer_names, vllm_config)
        # Of the step before, by page: see answer_tables.
        self._answer_ends: dict[int, int] = {}
        self._plain_builder = self._make_plain_builder(device)
        copies = self._sink_tokens or self._phase is Phase.DECODE
        self.page_layout = self._learn_page_layout(kv_cache_spec) if copies else None
        # Layers take their turns, so those of all groups share scratch pages; full ones need none.
        windowed = windowed_layers(vllm_config).values()
        self._scratch = next((layer.scratch_pages for layer in windowed), {})
        # vLLM's runner clears those of full attention, and there are none without other states.
        self._clears_pages = vllm_config.model_config.is_hybrid and not isinstance(
            kv_cache_spec, FullAttentionSpec
        )
        self._poison = PoisonWatch(kv_cache_spec, layer_names, vllm_config)
        log_layers(vllm_config, layer_names)

    def _learn_page_layout(self, spec: AttentionSpec) -> PageLayout:
        layer = self._layer
        shape = (spec.num_kv_heads, self.block_size, 2 * spec.head_size)
        return PageLayout(shape, spec.dtype, partial(layer.impl.do_kv_cache_update, layer))

    def _make_wide_builder(self, device: torch.device) -> CPUAttentionMetadataBuilder | None:
        """Make the builder for scratch pages with wider heads, if sinks are shifted."""
        shift = getattr(self._layer.impl, "shift", None)
        if shift is None:
            return None
        builder = self._make_plain_builder(device)
        builder.head_dim = shift.wide_head_size
        return builder

    def _make_plain_builder(self, device: torch.device) -> CPUAttentionMetadataBuilder:
        return CPUAttentionMetadataBuilder(
            self.kv_cache_spec, self.layer_names, self.vllm_config, device
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SWACPUMetadata:
        batch = common_attn_metadata
        nan_check = self._poison.watch_step(batch)
        fresh = (
            fresh_pages(batch, self.block_size, self._sink_tokens) if self._clears_pages else None
        )
        ghosts = distances = scratch = None
        windows: list[int | None] = [None] * batch.num_reqs
        if self._phase is Phase.DECODE:
            batch, needs_scratch, windows, ghosts = self._lay_out_answers(batch)
        else:
            if self._phase is Phase.PREFILL:
                batch, is_answer = split_at_prompt_ends(batch)
                windows = [NO_WINDOW if sees_all else None for sees_all in is_answer]
            needs_scratch = self._rows_for_scratch(batch, windows)
        if self.page_layout is not None and self._phase is Phase.BOTH:
            tail = ghost_tail(batch, self._window, self._sink_tokens, self.block_size)
            ghosts = SinkCopies.between(self.page_layout, tail.sources, tail.targets)
            batch, distances = tail.batch, tail.distances
        slots = batch.slot_mapping
        if not any(needs_scratch) and len(set(windows)) == 1:
            tokens = slice(0, batch.num_actual_tokens)
            parts: tuple[Part, ...] = (self._part_of_pages(tokens, batch, windows[0]),)
        else:
            parts = self._split_batch(batch, needs_scratch, windows)
        if any(needs_scratch):
            scratch = self._scratch_pages(max(p.layout.num_pages for p in parts if p.layout))
            # Slots of the null page, which stands for the holes.
            slots = batch.slot_mapping.masked_fill(batch.slot_mapping < self.block_size, -1)
        return SWACPUMetadata(slots, parts, scratch, ghosts, distances, nan_check, fresh)

    def _lay_out_answers(
        self, batch: CommonAttentionMetadata
    ) -> tuple[CommonAttentionMetadata, list[bool], list[int | None], SinkCopies | None]:
        """Lay out a batch of which generated tokens alone have the window, and see the prompt.

        Returns:
            The batch; for each row whether it needs scratch, and its window there; and copies that
            serve the others from the KV cache, where nothing is hidden from them.
        """
        ends_before, self._answer_ends = self._answer_ends, {}
        batch, is_answer = split_at_prompt_ends(batch)
        windows: list[int | None] = [NO_WINDOW] * batch.num_reqs
        if batch.rswa_prefix_lens is None:
            return batch, [False] * batch.num_reqs, windows, None
        assert self.page_layout is not None
        prompt_lens = batch.rswa_prefix_lens[: batch.num_reqs].numpy()
        pinned = np.maximum(prompt_lens, self._sink_tokens).astype(np.int64)
        hides = np.array(is_answer) & (batch.seq_lens.numpy() - self._window > pinned)
        is_single = np.diff(batch.query_start_loc.numpy()) == 1
        for row in (hides & ~is_single).nonzero()[0]:
            windows[row] = self._window + int(pinned[row])
        ghosts, rows = None, (hides & is_single).nonzero()[0]
        if len(rows):
            batch, sources, targets, self._answer_ends = answer_tables(
                batch, rows, pinned[rows], self._window, self.block_size, ends_before
            )
            ghosts = SinkCopies.between(self.page_layout, sources, targets)
        return batch, (hides & ~is_single).tolist(), windows, ghosts

    def _rows_for_scratch(
        self, batch: CommonAttentionMetadata, windows: list[int | None]
    ) -> list[bool]:
        """Tell which chunks need scratch: those with holes, and those beyond their sinks."""
        sees_all = [window == NO_WINDOW for window in windows]
        # One query with a window in every phase has its sinks in a ghost tail.
        most_in_pages = 1 if self._phase is Phase.BOTH or not self._sink_tokens else 0
        # No common window: vLLM put layers of different windows into one group, with its own spec.
        if batch.max_query_len <= most_in_pages or self.window_size < 1 or all(sees_all):
            return [False] * batch.num_reqs
        rows = rows_with_holes(batch, self._window, self.block_size)
        if self._sink_tokens:
            is_long = batch.seq_lens - 1 > last_unshifted(self._window, self._sink_tokens)
            has_left = is_long & (batch.query_start_loc.diff() > most_in_pages)
            rows = [a or b for a, b in zip(rows, has_left.tolist(), strict=True)]
        return [a and not b for a, b in zip(rows, sees_all, strict=True)]

    def _split_batch(
        self,
        batch: CommonAttentionMetadata,
        needs_scratch: list[bool],
        windows: list[int | None],
    ) -> tuple[Part, ...]:
        parts = []
        starts = batch.query_start_loc.tolist()
        kinds = list(zip(needs_scratch, windows, strict=True))
        for (in_scratch, window), run in groupby(range(batch.num_reqs), key=kinds.__getitem__):
            indices = list(run)
            first, stop = indices[0], indices[-1] + 1
            rows, tokens = select_rows(batch, first, stop), slice(starts[first], starts[stop])
            make_part = self._scratch_part if in_scratch else self._part_of_pages
            parts.append(make_part(tokens, rows, window))
        return tuple(parts)

    def _part_of_pages(
        self, tokens: slice, rows: CommonAttentionMetadata, window: int | None
    ) -> Part:
        return Part(tokens, self._build_plain(rows, window), window=window)

    def _scratch_part(
        self, tokens: slice, rows: CommonAttentionMetadata, window: int | None
    ) -> Part:
        num_sinks = self._sink_tokens if window is None else window - self._window
        sizes = self._window, self.block_size, num_sinks
        layout, pages = lay_out_chunk_pages(rows, *sizes), self.page_layout
        if pages is None:
            return Part(tokens, self._build_plain(layout.batch, window), layout, window=window)
        if self._wide_builder is not None:
            metadata = self._wide_builder.build(0, layout.batch)
            return Part(tokens, metadata, layout, shifted_scratch(layout, rows, pages, *sizes))
        sinks = SinkCopies.between(pages, layout.sink_sources, layout.sink_targets)
        return Part(tokens, self._build_plain(layout.batch, window), layout, sinks, window)

    def _build_plain(
        self, rows: CommonAttentionMetadata, window: int | None
    ) -> CPUAttentionMetadata:
        self._plain_builder.window_size = self.window_size if window is None else window
        return self._plain_builder.build(0, rows)

    def _scratch_pages(self, num_pages: int) -> torch.Tensor:
        """Scratch pages like those of the KV cache; kept, and finite.

        The operators multiply what they mask by zero, which a NaN would survive.
        """
        like = self._layer.kv_cache
        token_size = like.shape[-1]
        if self._wide_builder is not None:
            token_size = 2 * self._wide_builder.head_dim
        shape = (*like.shape[1:-1], token_size)
        pages = self._scratch.get((shape, like.dtype))
        if pages is None or len(pages) < num_pages:
            pages = self._scratch[shape, like.dtype] = like.new_zeros((num_pages, *shape))
        return pages
