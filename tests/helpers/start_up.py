"""How vLLM groups layers and sizes their KV cache at start-up, in each vLLM's own place."""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

try:
    from vllm.v1.core import kv_cache_planning as planning
except ImportError:  # vLLM 0.32
    from vllm.v1.core import kv_cache_utils as planning

Specs = dict[str, KVCacheSpec]


def plan_kv_caches(
    config: VllmConfig, specs: list[Specs], memory: list[int]
) -> list[KVCacheConfig]:
    """The KV cache of each worker, whose layers have these specs and who has these bytes for it."""
    groups: list[Any] = []
    if hasattr(planning, "get_global_kv_cache_groups"):  # vLLM 0.33
        groups = [planning.get_global_kv_cache_groups(config, specs)]
    return list(planning.get_kv_cache_configs(config, specs, memory, *groups))


def unify_page_sizes(specs: Specs) -> Specs:
    """The specs with pages of one size, padded where they have to be."""
    return dict(planning.unify_kv_cache_spec_page_size(specs))
