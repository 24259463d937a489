"""The numbers that vLLM gives KV groups, which workers are not told."""

from collections.abc import Sequence

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheSpec

try:
    from vllm.v1.core import kv_cache_planning as planning
except ImportError:  # vLLM 0.32
    from vllm.v1.core import kv_cache_utils as planning

Specs = dict[str, KVCacheSpec]


def number_kv_groups(vllm_config: VllmConfig, specs: Sequence[Specs]) -> dict[str, int]:
    """The number of each layer's KV group, as the engine core will divide them.

    Args:
        specs: by layer name, of each pipeline stage in their order.
    """
    if hasattr(planning, "get_global_kv_cache_groups"):  # vLLM 0.33
        groups = planning.get_global_kv_cache_groups(vllm_config, list(specs))
    else:
        merged = {name: spec for stage in specs for name, spec in stage.items()}
        groups = planning.get_kv_cache_groups(vllm_config, merged)
    return {name: number for number, group in enumerate(groups) for name in group.layer_names}
