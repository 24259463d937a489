"""Qwen3 where windows cannot be served: stock as long as no window is asked for."""

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from swa_vllm.options import layer_plan
from swa_vllm.registration import untested_reason


def refusing(base: type[nn.Module], reason: str) -> type[nn.Module]:
    """``base``, but loading a model with a window raises RuntimeError with ``reason``."""

    class RefusesWindows(base):  # type: ignore[misc, valid-type]
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            if not prefix and layer_plan(vllm_config).slides:
                raise RuntimeError(f"this model asks for sliding windows: {reason}")
            super().__init__(vllm_config=vllm_config, prefix=prefix)

    return RefusesWindows


UntestedQwen3ForCausalLM = refusing(Qwen3ForCausalLM, untested_reason())
UntestedQwen3MoeForCausalLM = refusing(Qwen3MoeForCausalLM, untested_reason())
