"""Windowed attention on CPUs: vLLM's C++ operators behind window-relative block tables."""

from dataclasses import dataclass
from itertools import groupby

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from swa_vllm.attention import windowed_layers
from swa_vllm.kv_spec import SWASpec
from swa_vllm.metadata import rows_with_holes, select_rows, window_view
from swa_vllm.poison import NaNCheck, PoisonedPages
from swa_vllm.report import log_layers
from swa_vllm.scratch import ScratchLayout, scratch_layout


@dataclass(frozen=True)
class Part:
    """Neighbouring requests of a batch that one operator call serves.

    Attributes:
        tokens: their tokens in the batch.
        metadata: of these requests alone.
        layout: where their keys lie in scratch pages; None where the KV cache has all of them.
    """

    tokens: slice
    metadata: CPUAttentionMetadata
    layout: ScratchLayout | None = None


@dataclass(frozen=True)
class SWACPUMetadata:
    """A step's batch for the layers of one group.

    Attributes:
        slot_mapping: int64 ``[num_tokens]``; -1 for a token that the KV cache need not keep.
        parts: the batch, split where prefill chunks have holes.
        scratch: ``[num_pages, num_kv_heads, block_size, 2 * head_size]`` for such chunks.
        nan_check: what to check each layer's output with, if pages are poisoned.
    """

    slot_mapping: torch.Tensor
    parts: tuple[Part, ...]
    scratch: torch.Tensor | None = None
    nan_check: NaNCheck | None = None


class SWACPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds CPU attention metadata over the live pages of each request only."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        windowed = windowed_layers(vllm_config)
        self._layer = get_layers_from_vllm_config(vllm_config, Attention)[layer_names[0]]
        self._scratch: torch.Tensor | None = None
        self._poison_key = kv_cache_spec.poison_key if isinstance(kv_cache_spec, SWASpec) else None
        self._poisoned: PoisonedPages | None = None
        if self._poison_key is not None and next(iter(windowed)) in layer_names:
            self._poisoned = PoisonedPages(self._poison_key)  # one builder does it for all
        log_layers(vllm_config, layer_names)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SWACPUMetadata:
        batch = common_attn_metadata
        nan_check = self._poison(batch)
        # No common window: vLLM put layers of different windows into one group, where the widest
        # decides what is live; each layer's own window still masks.
        view = batch
        if self.window_size >= 1:
            view = window_view(batch, self.window_size, self.block_size)
        holes = rows_with_holes(view, self.block_size)
        if not any(holes):
            whole = super().build(common_prefix_len, view, fast_build)
            part = Part(slice(0, batch.num_actual_tokens), whole)
            return SWACPUMetadata(batch.slot_mapping, (part,), nan_check=nan_check)

        parts = self._split(view, holes)
        scratch = self._scratch_pages(max(p.layout.num_pages for p in parts if p.layout))
        # Slots of the null page, which stands for the holes.
        slots = batch.slot_mapping.masked_fill(batch.slot_mapping < self.block_size, -1)
        return SWACPUMetadata(slots, parts, scratch, nan_check)

    def _split(self, view: CommonAttentionMetadata, holes: list[bool]) -> tuple[Part, ...]:
        parts = []
        starts = view.query_start_loc.tolist()
        for has_holes, run in groupby(range(view.num_reqs), key=holes.__getitem__):
            indices = list(run)
            first, stop = indices[0], indices[-1] + 1
            rows = select_rows(view, first, stop)
            layout = scratch_layout(rows, self.block_size) if has_holes else None
            metadata = super().build(0, layout.batch if layout else rows)
            parts.append(Part(slice(starts[first], starts[stop]), metadata, layout))
        return tuple(parts)

    def _scratch_pages(self, num_pages: int) -> torch.Tensor:
        """Scratch pages like those of the KV cache; kept, and zero where never written.

        The operators multiply what they mask by zero, which a NaN would survive.
        """
        if self._scratch is None or len(self._scratch) < num_pages:
            like = self._layer.kv_cache
            self._scratch = like.new_zeros((num_pages, *like.shape[1:]))
        return self._scratch

    def _poison(self, batch: CommonAttentionMetadata) -> NaNCheck | None:
        if self._poison_key is None:
            return None
        if self._poisoned is not None:
            layers = get_layers_from_vllm_config(self.vllm_config, Attention)
            self._poisoned.update([layer.kv_cache for layer in layers.values()])
        return NaNCheck(self._poison_key, batch, self.block_size)


class SWACPUImpl(CPUAttentionBackendImpl):
    """vLLM's CPU attention, over scratch pages where a prefill chunk has holes."""

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SWACPUMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:  # warming up
            return output
        # Before the parts: a request may hit a page that another one writes in this step.
        self.do_kv_cache_update(layer, key, value, kv_cache, attn_metadata.slot_mapping)
        for part in attn_metadata.parts:
            tokens, layout, cache = part.tokens, part.layout, kv_cache
            if layout is not None:
                assert attn_metadata.scratch is not None
                cache = attn_metadata.scratch
                cache[layout.targets] = kv_cache[layout.sources]
                self.do_kv_cache_update(layer, key[tokens], value[tokens], cache, layout.slots)
            super().forward(
                layer,
                query[tokens],
                key[tokens],
                value[tokens],
                cache,
                part.metadata,
                output[tokens],
                output_scale,
                output_block_scale,
            )
        if attn_metadata.nan_check is not None:
            attn_metadata.nan_check.check(str(getattr(layer, "layer_name", layer)), output)
        return output


class SWACPUBackend(CPUAttentionBackend):
    """Backend of windowed layers on CPUs; they select it themselves."""

    # A step's metadata says which tokens the cache keeps.
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[SWACPUImpl]:
        return SWACPUImpl

    @staticmethod
    def get_builder_cls() -> type[SWACPUMetadataBuilder]:
        return SWACPUMetadataBuilder

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return False  # no GPU runs these operators; refuses --attention-backend CUSTOM there
