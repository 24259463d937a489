"""Dense Qwen3 with a window a layer; everything else is vLLM's own model."""

import copy
from functools import partial
from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM, Qwen3Model
from vllm.model_executor.models.utils import PPMissingLayer, extract_layer_index

from swa_backend.config import LayerPlan, SWAConfigError
from swa_vllm.attention import WindowedAttention, windowed_backend
from swa_vllm.options import layer_plan
from swa_vllm.registration import check_backend_slot
from swa_vllm.report import log_layers

logger = init_logger(f"vllm.{__name__}")


class SWAQwen3DecoderLayer(Qwen3DecoderLayer):
    """A stock layer whose attention has a window where the plan says so."""

    def __init__(self, *, plan: LayerPlan, prefix: str, **kwargs: Any) -> None:
        window = plan.windows[extract_layer_index(prefix)]
        super().__init__(prefix=prefix, per_layer_sliding_window=window, **kwargs)
        if window is not None:
            self.self_attn.attn = WindowedAttention.replacing(
                self.self_attn.attn,
                cache_config=kwargs["cache_config"],
                quant_config=kwargs["quant_config"],
            )


class SWAQwen3Model(Qwen3Model):
    """Stock Qwen3 stack over :class:`SWAQwen3DecoderLayer`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", plan: LayerPlan) -> None:
        # The stock constructor reads this attribute; the class attribute knows no plan.
        self.decoder_layer_type = partial(SWAQwen3DecoderLayer, plan=plan)
        super().__init__(vllm_config=_accepting_mixed_layers(vllm_config), prefix=prefix)


class SWAQwen3ForCausalLM(Qwen3ForCausalLM):
    """Qwen3 whose layers slide by the checkpoint's config or the ``swa`` options.

    A model without any window is built by the stock constructor and is exactly stock.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        # Inside another model (prefix), Qwen3 is a part whose owner decides its attention.
        if prefix:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            return
        plan = layer_plan(vllm_config)
        # A layer without a window of its own would take this one: full layers must not.
        vllm_config.cache_config.sliding_window = None
        if not plan.slides:
            super().__init__(vllm_config=_accepting_mixed_layers(vllm_config))
            return
        _check_servable(vllm_config)
        for warning in plan.warnings:
            logger.warning("SWA %s", warning)

        # The stock constructor's body, which names Qwen3Model directly.
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        self.config = config
        self.vllm_config = vllm_config
        self.quant_config = vllm_config.quant_config
        self.model = SWAQwen3Model(vllm_config=vllm_config, prefix="model", plan=plan)
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=self.quant_config,
                prefix="lm_head",
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        if windowed_backend() is None:
            log_layers(vllm_config)  # no builder of ours will, once the KV groups are known


def _check_servable(vllm_config: VllmConfig) -> None:
    check_backend_slot()
    config = vllm_config.model_config.hf_config
    if not getattr(config, "is_causal", True):
        raise SWAConfigError(
            "is_causal=false (bidirectional attention) cannot have a window; remove the window "
            "or is_causal=false"
        )
    if getattr(config, "dual_chunk_attention_config", None):
        raise SWAConfigError(
            "dual_chunk_attention_config cannot be combined with a window; remove either"
        )


def _accepting_mixed_layers(vllm_config: VllmConfig) -> VllmConfig:
    """The config, or a copy of it that passes the stock model's assertion on mixed layers.

    Stock vLLM takes ``max_window_layers == num_hidden_layers`` for "no layer slides" and then
    lets any ``layer_types`` pass; neither is read after that.
    """
    if len(set(vllm_config.model_config.hf_config.layer_types)) == 1:
        return vllm_config
    vllm_config = copy.copy(vllm_config)
    vllm_config.model_config = copy.copy(vllm_config.model_config)
    config = copy.copy(vllm_config.model_config.hf_config)
    config.max_window_layers = config.num_hidden_layers
    vllm_config.model_config.hf_config = config
    return vllm_config
