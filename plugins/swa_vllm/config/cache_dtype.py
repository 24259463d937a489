"""The dtype of the KV cache, as vLLM resolves it from flag and checkpoint."""

from vllm.config import VllmConfig
from vllm.utils.torch_utils import resolve_kv_cache_dtype_string


def resolved_cache_dtype(vllm_config: VllmConfig) -> str:
    """Name the dtype that vLLM's layers will store; "auto" stands for that of the model alone.

    ``CacheConfig`` still says "auto" for some checkpoints that ask for another dtype: vLLM reads
    them when it builds the first attention layer.
    """
    dtype = str(vllm_config.cache_config.cache_dtype)
    return checkpoints_cache_dtype(vllm_config) if dtype == "auto" else dtype


def checkpoints_cache_dtype(vllm_config: VllmConfig) -> str:
    """Name the dtype that vLLM makes of ``--kv-cache-dtype auto``."""
    model = vllm_config.model_config
    dtype = str(resolve_kv_cache_dtype_string("auto", model))
    if dtype != "auto":
        return dtype
    # Not made yet when the config hook asks.
    quantization = vllm_config.quant_config or VllmConfig.get_quantization_config(
        model, vllm_config.load_config
    )
    return "auto" if getattr(quantization, "kv_cache_scheme", None) is None else "fp8"
