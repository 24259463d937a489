"""The page managers of the live engines of this process, by the name of the engine.

Debugging needs a way from an attention backend to the scheduler's pool, and vLLM has none.
"""

from weakref import WeakValueDictionary

from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

_managers: WeakValueDictionary[tuple[str, int], SingleTypeKVCacheManager] = WeakValueDictionary()


def add_manager(engine: str, manager: SingleTypeKVCacheManager) -> None:
    """Let the attention backends of ``engine`` see the manager's pool and requests."""
    _managers[engine, manager.kv_cache_group_id] = manager


def manager_of_engine(engine: str) -> SingleTypeKVCacheManager | None:
    """A manager of ``engine``; those of one engine share their pool."""
    return next((m for (name, _), m in _managers.items() if name == engine), None)
