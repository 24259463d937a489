"""The attention layer of windowed layers."""

from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from swa_backend.config import Impl, PrefillPages, SWAConfigError
from swa_vllm.config.options import swa_options
from swa_vllm.kv_cache.spec import SWASpec


class WindowedAttention(Attention):
    """vLLM's attention layer with a window, its own backend and its own KV cache spec.

    Attributes:
        sink_tokens: leading tokens that every query sees.
        scratch_pages: by shape and dtype; those of a worker's first windowed layer serve all.
        kv_group_layers: layers in this layer's KV group; None until the group is known.
    """

    kv_group_layers: int | None = None

    def __init__(
        self,
        *args: Any,
        per_layer_sliding_window: int,
        sink_tokens: int = 0,
        shifted_by: Any = None,
        **kwargs: Any,
    ) -> None:
        """Take the arguments of :class:`Attention`; the window is required.

        Args:
            shifted_by: rotary embedding that gives sinks cache-relative positions.
        """
        if sink_tokens:  # our own backends take them
            kwargs.update(sink_tokens=sink_tokens, shifted_by=shifted_by)
        super().__init__(
            *args,
            per_layer_sliding_window=per_layer_sliding_window,
            attn_backend=windowed_backend(get_current_vllm_config()),
            **kwargs,
        )
        self.sink_tokens = sink_tokens
        self.scratch_pages: dict[tuple[tuple[int, ...], torch.dtype], torch.Tensor] = {}

    @classmethod
    def replacing(
        cls, stock: Attention, window: int, rotary: Any, vllm_config: VllmConfig
    ) -> "WindowedAttention":
        """A layer with a window in the place of ``stock``, which has not been used yet.

        Args:
            stock: a decoder self-attention layer.
            rotary: the rotary embedding of its queries and keys.
            window: tokens a query sees, itself included.
            vllm_config: the config that ``stock`` was made with.
        """
        options = swa_options(vllm_config)
        # The layer registered itself under its name; only one may.
        del vllm_config.compilation_config.static_forward_context[stock.layer_name]
        return cls(
            stock.num_heads,
            stock.head_size,
            stock.impl.scale,
            num_kv_heads=stock.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            per_layer_sliding_window=window,
            prefix=stock.layer_name,
            attn_type=stock.attn_type,
            sink_tokens=options.sink_tokens,
            shifted_by=rotary if options.position_shift else None,
        )

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        spec = super().get_kv_cache_spec(vllm_config)
        assert isinstance(spec, SlidingWindowSpec)
        if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
            return spec  # vLLM rebuilds it as its own full attention spec, if the model is mixed
        options = swa_options(vllm_config)
        return SWASpec.from_stock(
            spec,
            vllm_config,
            prefill_pages(vllm_config),
            sink_tokens=self.sink_tokens,
            # The CPU backend writes copies of the sinks behind the newest token.
            spare_tokens=0 if uses_kernels(vllm_config) else self.sink_tokens,
            debug_poison=options.debug_poison,
        )


def windowed_layers(vllm_config: VllmConfig) -> dict[str, WindowedAttention]:
    """The windowed layers of this worker, by name."""
    layers = get_layers_from_vllm_config(vllm_config, WindowedAttention)
    return dict(layers)


def prefill_pages(vllm_config: VllmConfig) -> PrefillPages:
    """Which pages of a prefill chunk are stored on this platform.

    Raises:
        SWAConfigError: survivors only are asked for where every page is needed.
    """
    wanted = swa_options(vllm_config).prefill_pages
    obstacle = None
    if windowed_backend(vllm_config) is None:
        obstacle = "this platform's attention backend reads a chunk's keys from pages"
    elif vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        obstacle = "--disable-hybrid-kv-cache-manager leaves pages to vLLM"
    if obstacle is None:
        return wanted
    if wanted is PrefillPages.SURVIVORS:
        raise SWAConfigError(
            f'swa.prefill_pages="survivors" cannot be had: {obstacle}. '
            'Use "auto" or "all", or remove what is named here'
        )
    return PrefillPages.ALL


def uses_kernels(vllm_config: VllmConfig) -> bool:
    """Whether windowed layers run on this project's kernels."""
    return current_platform.is_cuda_alike() or swa_options(vllm_config).impl is Impl.TRITON


def windowed_backend(vllm_config: VllmConfig) -> type[AttentionBackend] | None:
    """Backend of windowed layers on this platform; None leaves the choice to vLLM."""
    if uses_kernels(vllm_config):
        from swa_vllm.attention.triton.backend import SWATritonBackend

        return SWATritonBackend
    if current_platform.is_cpu():
        from swa_vllm.attention.cpu.backend import SWACPUBackend

        return SWACPUBackend
    return None
