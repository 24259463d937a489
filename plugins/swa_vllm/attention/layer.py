"""The attention layers of a model with windows."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from swa_backend.pages import max_partial_tokens
from swa_backend.window import Phase
from swa_vllm.config.swa_config import SWAConfig
from swa_vllm.kv_cache.prompt_cache import PromptCacheSpec
from swa_vllm.kv_cache.prompt_window import PromptWindowSpec
from swa_vllm.kv_cache.spec import SWASpec


class ReplacedAttention(Attention):
    """vLLM's attention layer, in a model of which some layers have a window.

    Attributes:
        swa: what was decided about windows.
    """

    def __init__(self, *args: Any, swa: SWAConfig, **kwargs: Any) -> None:
        """Take the arguments of :class:`Attention`, and what was decided about windows."""
        super().__init__(*args, **kwargs)
        self.swa = swa

    @classmethod
    def replacing(
        cls, stock: Attention, vllm_config: VllmConfig, swa: SWAConfig, **kwargs: Any
    ) -> Self:
        """A layer in the place of ``stock``, which has not been used yet.

        Args:
            stock: a decoder self-attention layer.
            vllm_config: the config that ``stock`` was made with.
            swa: what was decided about windows.
            kwargs: what the new layer has beyond ``stock``.
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
            prefix=stock.layer_name,
            attn_type=stock.attn_type,
            swa=swa,
            **kwargs,
        )

    def poison_key(self, vllm_config: VllmConfig) -> str | None:
        """Name the engine whose free pages are to be poisoned; None for no poison."""
        return vllm_config.instance_id if self.swa.options.debug_poison else None


class PromptCachedAttention(ReplacedAttention):
    """vLLM's attention layer with full attention, whose prefix cache keeps prompts alone."""

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        spec = super().get_kv_cache_spec(vllm_config)
        return PromptCacheSpec.from_stock(spec, self.poison_key(vllm_config))


class WindowedAttention(ReplacedAttention):
    """vLLM's attention layer with a window, its own backend and its own KV cache spec.

    Attributes:
        sink_tokens: leading tokens that every query sees.
        scratch_pages: by shape and dtype; those of a worker's first windowed layer serve all.
        has_kv_group: whether this layer's KV group has been made.
    """

    has_kv_group = False

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
        if options.phase is not Phase.BOTH:
            kwargs.update(phase=options.phase)
        super().__init__(
            *args, per_layer_sliding_window=per_layer_sliding_window, swa=swa, **kwargs
        )
        self.sink_tokens = options.sink_tokens
        self.scratch_pages: dict[tuple[tuple[int, ...], torch.dtype], torch.Tensor] = {}

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        spec = super().get_kv_cache_spec(vllm_config)
        assert isinstance(spec, SlidingWindowSpec)
        if self.swa.options.phase is Phase.PREFILL:  # generated tokens see every page
            return PromptCacheSpec.from_stock(spec, self.poison_key(vllm_config))
        if self.swa.options.phase is Phase.DECODE:
            return PromptWindowSpec.of_layer(
                spec,
                vllm_config,
                sink_tokens=self.sink_tokens,
                spare_tokens=0 if self.swa.uses_kernels else max_partial_tokens(spec.block_size),
                poison_key=self.poison_key(vllm_config),
            )
        if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
            return spec  # vLLM rebuilds it as its own full attention spec, if the model is mixed
        return SWASpec.from_stock(
            spec, vllm_config, self.swa.storage, poison_key=self.poison_key(vllm_config)
        )


def windowed_layers(vllm_config: VllmConfig) -> dict[str, WindowedAttention]:
    """The windowed layers of this worker, by name."""
    layers = get_layers_from_vllm_config(vllm_config, WindowedAttention)
    return dict(layers)


def phase_of_layers(names: Sequence[str], vllm_config: VllmConfig) -> Phase:
    """Whose queries have the window of the layers ``names``; ``BOTH`` for layers without one.

    Raises:
        RuntimeError: vLLM does not give the lengths of prompts that such a phase needs, or has one
            builder for layers of several phases.
    """
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    phases = {
        layer.swa.options.phase if isinstance(layer, WindowedAttention) else Phase.BOTH
        for layer in map(layers.__getitem__, names)
    }
    if len(phases) > 1:
        raise RuntimeError(
            "vLLM lets full and sliding layers share an attention backend, which swa.phase does "
            "not allow; remove phase, or --attention-backend"
        )
    (phase,) = phases
    if phase is not Phase.BOTH and not (
        vllm_config.use_v2_model_runner or vllm_config.model_config.rswa_window is not None
    ):
        raise RuntimeError(
            f'swa.phase="{phase}" needs the lengths of prompts, which this vLLM does not give to '
            "attention backends; remove phase"
        )
    return phase
