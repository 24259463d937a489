"""The numbers that vLLM gives KV groups, which workers are not told."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheSpec

# Where vLLM 0.33 divides layers into groups, and where 0.32 does.
PLANNERS = ("vllm.v1.core.kv_cache_planning", "vllm.v1.core.kv_cache_utils")
DIVIDE = "get_kv_cache_groups"


def number_kv_groups(vllm_config: VllmConfig, specs: dict[str, KVCacheSpec]) -> dict[str, int]:
    """The number of each layer's KV group, as the engine core has divided them.

    Args:
        vllm_config: a worker's, once KV caches are made: groups depend on their layout.
        specs: those of all layers, by name.
    """
    planner: Any = import_module(next(name for name in PLANNERS if find_spec(name)))
    groups = getattr(planner, DIVIDE)(vllm_config, dict(specs))
    return {name: number for number, group in enumerate(groups) for name in group.layer_names}
