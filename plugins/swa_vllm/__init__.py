"""vLLM plugin: an unmodified engine serves Qwen3 with sliding window attention.

vLLM finds :func:`register` through the ``vllm.general_plugins`` entry point and calls it in every
process it starts, and :func:`ray_cpu_platform` through ``vllm.platform_plugins``. Importing this
package does no work.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.v1.engine.async_llm import AsyncLLM

    from swa_backend.metrics import PageCounts


def register() -> None:
    """Tell vLLM about the windowed model, KV cache spec and attention backend; idempotent.

    Raises:
        ImportError: vLLM is not installed.
    """
    try:
        import vllm  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ImportError(
            "swa_vllm needs vLLM, which is not installed. On a machine with a GPU: "
            "pip install 'swa-backend[gpu]'; without one: bash examples/setup_env.sh"
        ) from error
    from swa_vllm.registration import register_all

    register_all()


def ray_cpu_platform() -> str | None:
    """Path of the platform that lets a CPU build of vLLM use Ray, where that was asked for.

    Returns:
        None, which leaves the platform to vLLM, unless the environment has ``SWA_RAY_ON_CPU=1`` and
        this vLLM is built for CPUs.
    """
    from swa_vllm.compat import envs

    if not envs.is_variable_on(envs.RAY_ON_CPU):
        return None
    from vllm.platforms import cpu_platform_plugin

    return "swa_vllm.distributed.cpu_platform.RayCpuPlatform" if cpu_platform_plugin() else None


def stats(llm: "LLM | AsyncLLM") -> "dict[tuple[int, int], PageCounts]":
    """Return what the page managers of an engine of this process hold and did.

    Returns:
        Counts by data parallel rank and KV group: what a server shows on ``/metrics``. Empty
        without windows, and with ``--disable-hybrid-kv-cache-manager``.

    Raises:
        RuntimeError: the engine's counts cannot be read here.
    """
    from swa_vllm.metrics.scrape import engine_stats

    return engine_stats(llm)
