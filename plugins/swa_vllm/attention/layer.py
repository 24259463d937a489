"""The attention layer with a window."""

from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from swa_vllm.config.swa_config import SWAConfig
from swa_vllm.kv_cache.spec import SWASpec


class WindowedAttention(Attention):
    """vLLM's attention layer with a window, its own backend and its own KV cache spec.

    Attributes:
        swa: what was decided about windows.
        sink_tokens: leading tokens that every query sees.
        scratch_pages: by shape and dtype; those of a worker's first windowed layer serve all.
        kv_group_layers: layers in this layer's KV group; None until the group is known.
    """

    kv_group_layers: int | None = None

    def __init__(
        self,
        *args: Any,
        per_layer_sliding_window: int,
        swa: SWAConfig,
        rotary: Any,
        **kwargs: Any,
    ) -> None:
        """Take the arguments of :class:`Attention`; the window is required.

        Args:
            swa: what was decided about windows.
            rotary: the rotary embedding of the layer's queries and keys.
        """
        options = swa.options
        if options.sink_tokens:  # our own backends take them
            shifted_by = rotary if options.position_shift else None
            kwargs.update(sink_tokens=options.sink_tokens, shifted_by=shifted_by)
        super().__init__(*args, per_layer_sliding_window=per_layer_sliding_window, **kwargs)
        self.swa = swa
        self.sink_tokens = options.sink_tokens
        self.scratch_pages: dict[tuple[tuple[int, ...], torch.dtype], torch.Tensor] = {}

    @classmethod
    def replacing(
        cls,
        stock: Attention,
        window: int,
        rotary: Any,
        vllm_config: VllmConfig,
        swa: SWAConfig,
        backend: type[AttentionBackend] | None,
    ) -> "WindowedAttention":
        """A layer with a window in the place of ``stock``, which has not been used yet.

        Args:
            stock: a decoder self-attention layer.
            window: tokens a query sees, itself included.
            rotary: the rotary embedding of its queries and keys.
            vllm_config: the config that ``stock`` was made with.
            swa: what was decided about windows.
            backend: the attention backend; None leaves the choice to vLLM.
        """
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
            attn_backend=backend,
            swa=swa,
            rotary=rotary,
        )

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        spec = super().get_kv_cache_spec(vllm_config)
        assert isinstance(spec, SlidingWindowSpec)
        if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
            return spec  # vLLM rebuilds it as its own full attention spec, if the model is mixed
        return SWASpec.from_stock(
            spec,
            vllm_config,
            self.swa.storage,
            debug_poison=self.swa.options.debug_poison,
        )


def windowed_layers(vllm_config: VllmConfig) -> dict[str, WindowedAttention]:
    """The windowed layers of this worker, by name."""
    layers = get_layers_from_vllm_config(vllm_config, WindowedAttention)
    return dict(layers)
