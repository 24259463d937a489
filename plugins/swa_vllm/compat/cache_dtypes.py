"""What vLLM's choices of ``--kv-cache-dtype`` mean for windowed layers."""

# Those that store what the model computes. All others are quantized, also those that a later vLLM
# adds: ``vllm.v1.kv_cache_interface.is_quantized_kv_cache`` does not know all of them.
UNQUANTIZED = ("auto", "bfloat16", "float16")
# Quantized, and known to the attention of windowed layers.
FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2")


def sinks_refused_on_cpus(cache_dtype: str, sink_tokens: str, unquantized: str) -> str:
    """Say that sinks were not tested with a quantized KV cache on CPUs, and what to do.

    Args:
        cache_dtype: the cache as the user or the checkpoint asks for it.
        sink_tokens: the option that asks for sinks.
        unquantized: the flags of another cache.
    """
    return (
        f"{sink_tokens} cannot be had with {cache_dtype}: not tested on CPUs; remove "
        f"{sink_tokens.removeprefix('swa.')}, or use {unquantized}"
    )
