"""The numbers that vLLM gives KV groups, which workers are not told."""

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheSpec

try:
    from vllm.v1.core import kv_cache_planning as planning
except ImportError:  # vLLM 0.32
    from vllm.v1.core import kv_cache_utils as planning


def number_kv_groups(vllm_config: VllmConfig, specs: dict[str, KVCacheSpec]) -> dict[str, int]:
    """The number of each layer's KV group, as the engine core has divided them.

    Args:
        vllm_config: a worker's, once KV caches are made: groups depend on their layout.
        specs: those of all layers, by name.
    """
    if hasattr(planning, "get_global_kv_cache_groups"):  # vLLM 0.33
        groups = planning.get_global_kv_cache_groups(vllm_config, [specs])
    else:
        groups = planning.get_kv_cache_groups(vllm_config, dict(specs))
    return {name: number for number, group in enumerate(groups) for name in group.layer_names}
