"""What happens once vLLM's config is complete, in the process that starts the engine."""

from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from swa_vllm.ray_nodes import prepare_ray
from swa_vllm.scrape import serve_counts


class ConfigHook(VerifyAndUpdateConfig):
    """vLLM's hook on the config of a Qwen3."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Have the engine's metrics served, and nodes of a Ray cluster checked.

        Raises:
            SWAConfigError: on Ray, what workers would refuse.
        """
        prepare_ray(vllm_config)
        serve_counts(vllm_config)
