"""Windowed attention on CPUs: vLLM's C++ operators behind window-relative block tables."""

import torch
from vllm.config import VllmConfig
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from swa_vllm.metadata import window_view
from swa_vllm.report import log_layers


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
        log_layers(vllm_config, layer_names)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        # No common window: vLLM put layers of different windows into one group, where the widest
        # decides what is live; each layer's own window still masks.
        if self.window_size >= 1:
            common_attn_metadata = window_view(
                common_attn_metadata, self.window_size, self.block_size
            )
        return super().build(common_prefix_len, common_attn_metadata, fast_build)


class SWACPUBackend(CPUAttentionBackend):
    """Backend of windowed layers on CPUs; they select it themselves. The impl is vLLM's own."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_builder_cls() -> type[SWACPUMetadataBuilder]:
        return SWACPUMetadataBuilder

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return False  # no GPU runs these operators; refuses --attention-backend CUSTOM there
