"""Windows for a Qwen3-like model: stock code builds it, then sliding layers get our attention."""

import copy
from functools import partial
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.interfaces import supports_multimodal

from swa_backend.layers import SLIDING
from swa_backend.window import Phase
from swa_vllm.attention.backends import windowed_backend
from swa_vllm.attention.layer import PromptCachedAttention, WindowedAttention
from swa_vllm.attention.layer_table import log_layers
from swa_vllm.config.swa_config import SWAConfig, is_draft, vllm_text_config
from swa_vllm.refusals import check_servable, refuse_windows_in_part

logger = init_logger(f"vllm.{__name__}")


class WindowedModel:
    """Mixin before a stock model: its text layers slide by the checkpoint or the options.

    Without any window the model is exactly what the stock constructor builds.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if prefix and not is_draft(vllm_config.model_config):
            refuse_windows_in_part(vllm_config, prefix)
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
            return
        swa = SWAConfig.from_vllm(vllm_config)
        if swa.slides:
            check_servable(vllm_config, swa)
        for warning in swa.layers.warnings:
            logger.warning("SWA %s", warning)
        # A layer without a window of its own would take this one: full layers must not.
        vllm_config.cache_config.sliding_window = None
        super().__init__(vllm_config=_accepting_mixed_layers(vllm_config), prefix=prefix)  # type: ignore[call-arg]
        if swa.slides:
            text_model: Any = self.get_language_model() if supports_multimodal(self) else self  # type: ignore[attr-defined]
            _set_windows(text_model.model.layers, vllm_config, swa)
        if swa.options.phase is not Phase.BOTH and vllm_config.use_v2_model_runner:
            # Of an instance: without the attribute vLLM chooses by the model's kind.
            is_hybrid = bool(swa.layers.linear)
            self.get_model_state_cls = partial(_prompt_lens_state, is_hybrid=is_hybrid)


def _prompt_lens_state(*, is_hybrid: bool) -> type:
    from swa_vllm.attention import model_state  # of Model Runner V2 alone

    return model_state.HybridPromptLensState if is_hybrid else model_state.PromptLensState


def _set_windows(layers: object, config: VllmConfig, swa: SWAConfig) -> None:
    """Replace the attention of sliding layers, which no weight was loaded into yet.

    With a window in one phase only, full layers are replaced too: by layers like them, of whose
    pages the prefix cache keeps those of prompts.
    """
    backend = windowed_backend(swa.implementation)
    for layer, window in zip(layers, swa.layers.windows, strict=True):  # type: ignore[call-overload]
        # Layers of other pipeline stages are placeholders, and linear attention is called else.
        if not hasattr(layer, "self_attn"):
            continue
        attention = layer.self_attn
        if window is not None:
            attention.attn = WindowedAttention.replacing(
                attention.attn,
                config,
                swa,
                per_layer_sliding_window=window,
                rotary=attention.rotary_emb,
                attn_backend=backend,
            )
        elif swa.options.phase is not Phase.BOTH:
            attention.attn = PromptCachedAttention.replacing(attention.attn, config, swa)
    if backend is None or config.parallel_config.pipeline_parallel_size > 1:
        log_layers(config)  # no builder of ours will, once the KV groups are known


def _accepting_mixed_layers(vllm_config: VllmConfig) -> VllmConfig:
    """The config, or a copy of it that passes the stock model's assertion on mixed layers.

    Stock vLLM takes ``max_window_layers == num_hidden_layers`` for "no layer slides" and then
    lets any ``layer_types`` pass; neither is read after that.
    """
    if SLIDING not in (getattr(vllm_text_config(vllm_config), "layer_types", None) or ()):
        return vllm_config
    vllm_config = copy.copy(vllm_config)
    vllm_config.model_config = copy.copy(vllm_config.model_config)
    vllm_config.model_config.hf_config = copy.deepcopy(vllm_config.model_config.hf_config)
    config = vllm_text_config(vllm_config)
    config.max_window_layers = config.num_hidden_layers
    return vllm_config
