"""Dense Qwen3 with a window a layer."""

from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from swa_vllm.models.windowed import WindowedModel


class SWAQwen3ForCausalLM(WindowedModel, Qwen3ForCausalLM):
    """vLLM's Qwen3 whose layers may slide."""
