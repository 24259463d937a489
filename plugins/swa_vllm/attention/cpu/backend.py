"""Windowed attention on CPUs: vLLM's C++ operators, over scratch pages where they cannot serve."""

import copy
from typing import Any, Self

import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from swa_backend.window import Phase
from swa_vllm.attention.cpu.builder import NO_WINDOW, Part, SWACPUMetadata, SWACPUMetadataBuilder
from swa_vllm.attention.cpu.position_shift import PositionShift, ShiftedScratch


class SWACPUImpl(CPUAttentionBackendImpl):
    """vLLM's CPU attention, with holes in prefill chunks and with sink tokens."""

    def __init__(
        self,
        *args: Any,
        sink_tokens: int = 0,
        shifted_by: Any = None,
        phase: Phase = Phase.BOTH,  # which a step's metadata follows, part by part
        **kwargs: Any,
    ) -> None:
        """Take the arguments of :class:`CPUAttentionBackendImpl`.

        Args:
            sink_tokens: leading tokens that every query sees.
            shifted_by: rotary embedding that gives them cache-relative positions.
            phase: whose queries have the window.
        """
        super().__init__(*args, **kwargs)
        self._unwindowed = self._copy_with_window(NO_WINDOW)
        self.sliding_window += sink_tokens  # of the operators, which see copies of the sinks in it
        self.shift: PositionShift | None = None
        if shifted_by is not None:
            self.shift = PositionShift(shifted_by, self.head_size, sink_tokens)

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
        if attn_metadata.fresh_pages is not None:
            kv_cache[attn_metadata.fresh_pages] = 0
        # Before the parts: a request may hit a page that another one writes in this step.
        self.do_kv_cache_update(layer, key, value, kv_cache, attn_metadata.slot_mapping)
        self._write_ghosts(kv_cache, attn_metadata)
        for part in attn_metadata.parts:
            tokens = part.tokens
            states = query[tokens], key[tokens], value[tokens]
            if part.layout is None:
                self._attend(layer, *states, kv_cache, part, output[tokens])
            else:
                assert attn_metadata.scratch is not None
                self._attend_in_scratch(
                    layer, *states, kv_cache, attn_metadata.scratch, part, output[tokens]
                )
        if attn_metadata.nan_check is not None:
            attn_metadata.nan_check.raise_on_nan(str(getattr(layer, "layer_name", layer)), output)
        return output

    def _write_ghosts(self, kv_cache: torch.Tensor, metadata: SWACPUMetadata) -> None:
        if metadata.ghosts is None:
            return
        if self.shift is None:
            metadata.ghosts.copy(kv_cache, kv_cache)
        else:
            assert metadata.ghost_distances is not None
            self.shift.copy_ghosts(kv_cache, metadata.ghosts, metadata.ghost_distances)

    def _attend(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: torch.Tensor,
        part: Part,
        output: torch.Tensor,
    ) -> None:
        impl = self
        if part.window == NO_WINDOW:
            impl = self._unwindowed
        elif part.window is not None:
            impl = self._copy_with_window(part.window)
        CPUAttentionBackendImpl.forward(
            impl, layer, query, key, value, pages, part.metadata, output
        )

    def _copy_with_window(self, window: int) -> Self:
        impl = copy.copy(self)
        impl.sliding_window = window
        return impl

    def _attend_in_scratch(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        scratch: torch.Tensor,
        part: Part,
        output: torch.Tensor,
    ) -> None:
        layout = part.layout
        assert layout is not None
        if isinstance(part.sinks, ShiftedScratch):
            assert self.shift is not None
            own = self.shift.widen_tokens(key, value, layout, part.sinks, kv_cache)
            self.do_kv_cache_update(layer, own[0], own[1], scratch, own[2])
            wide_query = self.shift.widen_query(query, part.sinks, kv_cache)
            wide_output = torch.empty_like(wide_query)
            self._attend(layer, wide_query, key, value, scratch, part, wide_output)
            output.copy_(wide_output[..., : output.shape[-1]])
            return
        scratch[layout.targets] = kv_cache[layout.sources]
        own_key, own_value = key[layout.tokens], value[layout.tokens]
        self.do_kv_cache_update(layer, own_key, own_value, scratch, layout.slots)
        if part.sinks is not None:
            part.sinks.copy(kv_cache, scratch)
        self._attend(layer, query, key, value, scratch, part, output)


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
