"""What computes attention in windowed layers here, and whether it needs all pages of a chunk."""

from enum import Enum

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from swa_backend.options import Impl, SWAOptions
from swa_vllm.compat.cache_dtypes import FP8

# What pages hold that are bytes to vLLM, by its names of KV cache dtypes.
FP8_DTYPES = {
    name: torch.float8_e5m2 if name.endswith("e5m2") else torch.float8_e4m3fn for name in FP8
}


class Implementation(Enum):
    """What computes attention in windowed layers."""

    KERNELS = "this project's Triton kernels"
    CPU_OPERATORS = "vLLM's CPU operators"
    STOCK = "the backend that vLLM chooses"


def implementation_of(options: SWAOptions) -> Implementation:
    """Choose the implementation for this platform."""
    if current_platform.is_cuda_alike() or options.impl is Impl.TRITON:
        return Implementation.KERNELS
    if current_platform.is_cpu():
        return Implementation.CPU_OPERATORS
    return Implementation.STOCK


def obstacle_to_survivors(implementation: Implementation, vllm_config: VllmConfig) -> str | None:
    """Say why every page of a prefill chunk has to be stored; None where survivors are enough."""
    if implementation is Implementation.STOCK:
        return "this platform's attention backend reads a chunk's keys from pages"
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        return "--disable-hybrid-kv-cache-manager leaves pages to vLLM"
    return None
