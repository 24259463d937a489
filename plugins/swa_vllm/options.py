"""The plugin's view of vLLM's configuration: the one place that reads it."""

from collections.abc import Mapping

from vllm.config import VllmConfig

from swa_backend.config import SWAOptions
from swa_backend.layers import LayerPlan, resolve_layers


def swa_options(vllm_config: VllmConfig) -> SWAOptions:
    """The ``swa`` section of ``--additional-config``.

    Raises:
        SWAConfigError: unknown keys or wrong values, with the remedy.
    """
    additional = vllm_config.additional_config
    return SWAOptions.from_dict(
        additional.get("swa", {}) if isinstance(additional, Mapping) else {}
    )


def layer_plan(vllm_config: VllmConfig) -> LayerPlan:
    """The window of every layer of the model that ``vllm_config`` describes.

    Raises:
        SWAConfigError: contradictory or ineffective settings, with the remedy.
    """
    model_config = vllm_config.model_config
    overrides = model_config.hf_overrides
    return resolve_layers(
        model_config.hf_config,
        swa_options(vllm_config),
        hf_overrides=overrides if isinstance(overrides, Mapping) else None,
        max_model_len=model_config.max_model_len,
    )
