"""The plugin's view of vLLM's configuration: the one place that reads it."""

from collections.abc import Mapping
from typing import Any

from vllm.config import VllmConfig

from swa_backend.config import SWAOptions
from swa_backend.layers import LayerPlan, resolve_layers


def swa_options(vllm_config: VllmConfig) -> SWAOptions:
    """The ``swa`` section of ``--additional-config``.

    Raises:
        SWAConfigError: unknown keys or wrong values, with the remedy.
    """
    return SWAOptions.from_additional_config(vllm_config.additional_config)


def layer_plan(vllm_config: VllmConfig) -> LayerPlan:
    """The window of every text layer of the model that ``vllm_config`` describes.

    Raises:
        SWAConfigError: contradictory or ineffective settings, with the remedy.
    """
    model_config = vllm_config.model_config
    overrides = model_config.hf_overrides
    return resolve_layers(
        text_config(vllm_config),
        swa_options(vllm_config),
        hf_overrides=overrides if isinstance(overrides, Mapping) else None,
        max_model_len=model_config.max_model_len,
    )


def wants_windows_decided(vllm_config: VllmConfig) -> bool:
    """Whether the options or the checkpoint say anything that stock vLLM might get wrong.

    Beside a window this is full attention, asked for by the options, of a checkpoint that slides.

    Raises:
        SWAConfigError: as :func:`layer_plan`.
    """
    stock_slides = getattr(text_config(vllm_config), "sliding_window", None) is not None
    return layer_plan(vllm_config).slides or stock_slides


def text_config(vllm_config: VllmConfig) -> Any:
    """Hugging Face's config of the text layers; a multimodal model's is nested in its own."""
    return vllm_config.model_config.hf_config.get_text_config()
