"""The slot ``CUSTOM`` among vLLM's attention backends, which one plugin can hold."""

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

BACKEND_PATH = "swa_vllm.attention.cpu.backend.SWACPUBackend"
LOAD_ONE = "Load only one of the two plugins: set VLLM_PLUGINS to the names of those you want"


def take_backend_slot() -> None:
    """Register this plugin's backend, unless the slot is taken.

    A slot that is taken stays taken: :func:`check_backend_slot` refuses windowed models then.
    """
    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)


def check_backend_slot() -> None:
    """Raise RuntimeError if another plugin holds the attention backend slot ``CUSTOM``."""
    path = AttentionBackendEnum.CUSTOM.get_path()
    if path != BACKEND_PATH:
        raise RuntimeError(
            f"attention backend slot CUSTOM is taken by {path}, and windowed layers need it for "
            f"{BACKEND_PATH}. {LOAD_ONE}"
        )
