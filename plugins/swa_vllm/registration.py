"""What is registered with vLLM, and what happens where it cannot be.

Nothing here raises: vLLM does not catch a plugin's exceptions, so one would stop every vLLM
command on the machine. Where windows cannot be served, a guard class is registered instead that
refuses windowed models, and only those, when they are loaded. An untested vLLM is touched through
its model registry only.
"""

import os
from typing import Any

from packaging.version import InvalidVersion, Version
from vllm import ModelRegistry
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")

TESTED_VERSIONS = ("0.32", "0.33")
ALLOW_UNTESTED = "SWA_ALLOW_UNTESTED_VLLM"
# Architectures, and vLLM's class for each: the text stack is a plain Qwen3, which may slide ...
WINDOWED = {
    "ColQwen3": "ColQwen3Model",
    "OpsColQwen3Model": "ColQwen3Model",
    "Qwen3ASRForConditionalGeneration": "Qwen3ASRForConditionalGeneration",
    "Qwen3ASRForcedAlignerForTokenClassification": "Qwen3ASRForcedAlignerForTokenClassification",
    "Qwen3ASRRealtimeGeneration": "Qwen3ASRRealtimeGeneration",
    "Qwen3OmniMoeForConditionalGeneration": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "Qwen3VLForConditionalGeneration": "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration": "Qwen3VLMoeForConditionalGeneration",
    "Qwen3VLNemotronEmbedModel": "ColQwen3Model",
}
# ... or a Qwen3 that was not tested with windows.
UNPROVEN = {
    "FunASRForConditionalGeneration": "FunASRForConditionalGeneration",
    "InternS1ProForConditionalGeneration": "InternS1ProForConditionalGeneration",
    "JinaEmbeddingsV5Model": "JinaEmbeddingsV5Model",
    "JinaForRanking": "JinaForRanking",
    "MiniCPMV": "MiniCPMV",
    "MossAudioModel": "MossAudioModel",
    "VoyageQwen3BidirectionalEmbedModel": "VoyageQwen3BidirectionalEmbedModel",
}
PLAIN = {
    "Qwen3ForCausalLM": "swa_vllm.models.qwen3:SWAQwen3ForCausalLM",
    "Qwen3MoeForCausalLM": "swa_vllm.models.qwen3_moe:SWAQwen3MoeForCausalLM",
}
MODELS = {
    **PLAIN,
    **{name: f"swa_vllm.models.derived:{stock}" for name, stock in WINDOWED.items()},
    **{name: f"swa_vllm.models.guard:Unproven{stock}" for name, stock in UNPROVEN.items()},
}
GUARDS = {
    name: f"swa_vllm.models.guard:Untested{stock}"
    for name, stock in {**dict(zip(PLAIN, PLAIN, strict=True)), **WINDOWED, **UNPROVEN}.items()
}
BACKEND_PATH = "swa_vllm.attention.cpu.backend.SWACPUBackend"


def register_all() -> None:
    """Register with the vLLM of this process; calling it again changes nothing."""
    tested = is_tested(vllm_version()) or os.environ.get(ALLOW_UNTESTED) == "1"
    if tested:
        _register_spec()
        _register_backend()
    for architecture, path in (MODELS if tested else GUARDS).items():
        owner = registered_class(architecture)
        if owner is None:
            continue  # this vLLM does not have the model
        if owner.startswith(("vllm.", "swa_vllm.")):
            ModelRegistry.register_model(architecture, path)
            if tested and architecture not in UNPROVEN:
                _register_config_hook(architecture)
        elif architecture not in UNPROVEN:
            _guard_foreign_model(architecture, owner)


def vllm_version() -> str:
    """Version of the vLLM in this process."""
    from vllm.version import __version__

    return str(__version__)


def is_tested(version: str) -> bool:
    """Whether the plugin was tested with this version of vLLM."""
    try:
        release = Version(version).release
    except InvalidVersion:
        return False
    return ".".join(map(str, release[:2])) in TESTED_VERSIONS


def untested_reason() -> str:
    """Why an untested vLLM refuses a windowed model, and what to do."""
    return (
        f"swa_vllm was tested with vLLM {' and '.join(TESTED_VERSIONS)}; this is "
        f"{vllm_version()}. Install one of those, or {try_untested()}"
    )


def try_untested() -> str:
    """How to try an untested vLLM all the same."""
    value = os.environ.get(ALLOW_UNTESTED)
    here = "" if value is None else f" (here it is {value!r})"
    return f"set {ALLOW_UNTESTED}=1{here} to try this one"


def registered_class(architecture: str) -> str | None:
    """``module:class`` that vLLM's model registry holds for an architecture, or None."""
    entry: Any = ModelRegistry.models.get(architecture)
    if entry is None:
        return None
    if hasattr(entry, "module_name"):
        return f"{entry.module_name}:{entry.class_name}"
    return f"{entry.model_cls.__module__}:{entry.model_cls.__qualname__}"


def check_backend_slot() -> None:
    """Raise RuntimeError if another plugin holds the attention backend slot ``CUSTOM``."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    path = AttentionBackendEnum.CUSTOM.get_path()
    if path != BACKEND_PATH:
        raise RuntimeError(
            f"attention backend slot CUSTOM is taken by {path}, and windowed layers need it for "
            f"{BACKEND_PATH}. {_LOAD_ONE}"
        )


_LOAD_ONE = "Load only one of the two plugins: set VLLM_PLUGINS to the names of those you want"


def _register_spec() -> None:
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from swa_vllm.kv_cache.manager import SWAManager
    from swa_vllm.kv_cache.spec import SWASpec

    # The registry fills in vLLM's own specs only while it is empty: let it do that first.
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    KVCacheSpecRegistry.register(SWASpec, SWAManager, uniform_type_base_spec=SWASpec)


def _register_backend() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    # A slot that is taken stays taken: check_backend_slot() refuses windowed models then.
    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)


def _register_config_hook(architecture: str) -> None:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from swa_vllm.config_hook import ConfigHook

    # vLLM has none of its own for these; another plugin's stays.
    MODELS_CONFIG_MAP.setdefault(architecture, ConfigHook)


def _guard_foreign_model(architecture: str, owner: str) -> None:
    from swa_vllm.models.guard import refusing

    reason = (
        f"{architecture} is registered by {owner}, and a window needs {MODELS[architecture]}. "
        f"{_LOAD_ONE}"
    )
    try:
        foreign = ModelRegistry.models[architecture].load_model_cls()
        ModelRegistry.register_model(architecture, refusing(foreign, reason))
    except Exception as error:  # the other plugin's import may fail in any way; see the module
        logger.warning("%s (%s could not be loaded to guard it: %s)", reason, owner, error)
