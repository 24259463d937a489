"""The numbers that vLLM gives KV groups, which workers are not told."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheSpec

_SINCE_0_33, _BEFORE = "vllm.v1.core.kv_cache_planning", "vllm.v1.core.kv_cache_utils"


def number_kv_groups(vllm_config: VllmConfig, specs: dict[str, KVCacheSpec]) -> dict[str, int]:
    """The number of each layer's KV group, as the engine core has divided them.

    Args:
        vllm_config: a worker's, once KV caches are made: groups depend on their layout.
        specs: those of all layers, by name.
    """
    planning: Any = import_module(_SINCE_0_33 if find_spec(_SINCE_0_33) else _BEFORE)
    if hasattr(planning, "get_global_kv_cache_groups"):  # vLLM 0.33
        groups = planning.get_global_kv_cache_groups(vllm_config, [specs])
    else:
        groups = planning.get_kv_cache_groups(vllm_config, dict(specs))
    return {name: number for number, group in enumerate(groups) for name in group.layer_names}
