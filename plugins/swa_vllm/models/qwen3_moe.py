"""Qwen3-MoE with a window a layer."""

from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from swa_vllm.models.windowed import WindowedModel


class SWAQwen3MoeForCausalLM(WindowedModel, Qwen3MoeForCausalLM):
    """vLLM's Qwen3-MoE whose layers may slide."""
