"""What is registered with vLLM, and what happens where it cannot be.

Nothing here raises: vLLM does not catch a plugin's exceptions, so one would stop every vLLM
command on the machine. Where windows cannot be served, a guard class is registered instead that
refuses windowed models, and only those, when they are loaded. An untested vLLM is touched through
its model registry only.
"""

from vllm import ModelRegistry
from vllm.logger import init_logger

from swa_vllm.compat import versions
from swa_vllm.compat.architectures import (
    GUARDS,
    MODELS,
    PLAIN,
    UNPROVEN,
    WINDOWED,
    has_windows,
    registered_class,
)

logger = init_logger(f"vllm.{__name__}")
# How a class that guards another plugin's model is called.
_GUARDED = "swa_vllm.models.guard:refusing_windows."


def register_all() -> None:
    """Register with the vLLM of this process; calling it again changes nothing."""
    allowed = versions.is_allowed_version(versions.vllm_version())
    if allowed:
        from swa_vllm.compat.backend_slot import take_backend_slot

        _register_specs()
        take_backend_slot()
    for architecture, path in (MODELS if allowed else GUARDS).items():
        owner = registered_class(architecture)
        if owner is None:
            continue  # this vLLM does not have the model
        if owner.startswith(_GUARDED):
            continue  # another plugin's
        if owner.startswith(("vllm.", "swa_vllm.")):
            ModelRegistry.register_model(architecture, path)
            if allowed and architecture not in UNPROVEN:
                _register_config_hook(architecture)
        elif architecture not in UNPROVEN:
            _guard_foreign_model(architecture, owner)
    if allowed:
        _refuse_windows_of_others()


def _register_specs() -> None:
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from swa_vllm.kv_cache.manager import SWAManager
    from swa_vllm.kv_cache.prompt_cache import PromptCacheManager, PromptCacheSpec
    from swa_vllm.kv_cache.prompt_window import PromptWindowManager, PromptWindowSpec
    from swa_vllm.kv_cache.spec import SWASpec

    # The registry fills in vLLM's own specs only while it is empty: let it do that first.
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    managers: dict[type, type] = {
        SWASpec: SWAManager,
        PromptCacheSpec: PromptCacheManager,
        PromptWindowSpec: PromptWindowManager,
    }
    for spec, manager in managers.items():
        KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)


def _register_config_hook(architecture: str) -> None:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from swa_vllm.config_hook import ConfigHook, hook_after

    stock = MODELS_CONFIG_MAP.get(architecture)
    if stock is None:
        MODELS_CONFIG_MAP[architecture] = ConfigHook
    elif stock.__module__.startswith("vllm."):  # another plugin's stays
        MODELS_CONFIG_MAP[architecture] = hook_after(stock)


def _refuse_windows_of_others() -> None:
    """Have options of windows refused for every architecture that this plugin does not window.

    These are the ones that vLLM and the plugins before this one registered.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    from swa_vllm.config_hook import refusing_hook

    registered = set(ModelRegistry.models)
    for architecture in registered | set(MODELS_CONFIG_MAP):
        # What is not registered is served by another ending of its name.
        if architecture in {*PLAIN, *WINDOWED} or (
            architecture not in registered and has_windows(architecture)
        ):
            continue
        hook = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
        if not hook.__module__.startswith("swa_vllm."):
            MODELS_CONFIG_MAP[architecture] = refusing_hook(hook)


def _guard_foreign_model(architecture: str, owner: str) -> None:
    from swa_vllm.models.guard import refusing_windows
    from swa_vllm.refusals import why_foreign

    reason = why_foreign(architecture, owner)
    try:
        foreign = ModelRegistry.models[architecture].load_model_cls()
        ModelRegistry.register_model(architecture, refusing_windows(foreign, reason))
    except Exception as error:  # the other plugin's import may fail in any way; see the module
        logger.warning("%s (%s could not be loaded to guard it: %s)", reason, owner, error)
