"""vLLM's CPU platform with what Ray needs: logical devices, and their workers' environment."""

from typing import TYPE_CHECKING, Any

from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from swa_vllm.compat import envs

if TYPE_CHECKING:  # vLLM's config looks the platform up when it is imported
    from vllm.config import VllmConfig

_BACKENDS = (AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.CUSTOM)


class RayCpuPlatform(CpuPlatform):
    """A CPU platform whose workers are placed on Ray's logical GPUs (``ray start --num-gpus``)."""

    ray_device_key = "GPU"

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        """Path of the attention backend; ``--attention-backend`` is obeyed or refused.

        vLLM's CPU platform notes at level INFO that it cannot use a backend, and uses its own.

        Raises:
            ValueError: the backend does not exist on CPUs.
        """
        stock = super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        if selected_backend is None or attn_selector_config.use_mla:
            return str(stock)
        if selected_backend not in _BACKENDS:
            allowed = " and ".join(backend.name for backend in _BACKENDS)
            raise ValueError(
                f"attention backend {selected_backend.name} does not run on CPUs; allowed are "
                f"{allowed}: use one of these, or leave --attention-backend out"
            )
        return str(selected_backend.get_path())

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Do as vLLM does, and give Ray's workers the variables that they read first."""
        super().check_and_update_config(vllm_config)
        parallel = vllm_config.parallel_config
        if not parallel.use_ray:
            return
        from ray.runtime_env import RuntimeEnv

        given = dict(parallel.ray_runtime_env or {})
        variables = {**envs.variables_read_early(), **given.get("env_vars", {})}
        parallel.ray_runtime_env = RuntimeEnv(**{**given, "env_vars": variables})
        # Data parallel engines are Ray's too, and get none of that.
        envs.copy_variable_to_ray(envs.RAY_ON_CPU)
