"""What was decided about an engine's windows."""

from dataclasses import dataclass
from typing import Any

from vllm.config import ModelConfig, VllmConfig

from swa_backend.layers import LayerPlan, resolve_layers
from swa_backend.options import PrefillPages, SWAConfigError, SWAOptions
from swa_backend.window import Phase
from swa_vllm.compat.architectures import PLAIN
from swa_vllm.config.additional_config import parse_additional_config
from swa_vllm.config.implementation import (
    Implementation,
    implementation_of,
    obstacle_to_survivors,
)
from swa_vllm.config.overrides import text_overrides
from swa_vllm.config.storage import StoragePolicy


@dataclass(frozen=True)
class SWAConfig:
    """The decisions about an engine's windows, made once from vLLM's config and handed on.

    The config hook makes one to refuse what cannot be served, before anything starts. The model
    makes the one that is served, in each worker, and keeps it on its windowed layers. Their specs
    bring ``storage`` to the engine core; metadata builders, which vLLM constructs, read their
    layers.

    Attributes:
        options: what the user asked for.
        layers: the window of every text layer, and what to warn of.
        implementation: what computes attention in windowed layers.
        storage: what windowed layers store beside the pages of their windows: of a prefill chunk
            all pages where survivors alone cannot be had.
    """

    options: SWAOptions
    layers: LayerPlan
    implementation: Implementation
    storage: StoragePolicy

    @classmethod
    def from_vllm(cls, vllm_config: VllmConfig) -> "SWAConfig":
        """Decide for the model and engine that ``vllm_config`` describes.

        Raises:
            SWAConfigError: contradictory or ineffective settings, with the remedy.
        """
        return cls._of_model(vllm_config, vllm_config.model_config)

    @classmethod
    def of_draft(cls, vllm_config: VllmConfig) -> "SWAConfig | None":
        """Decide for the draft model of an engine; None where no plain Qwen3 drafts.

        Raises:
            SWAConfigError: contradictory or ineffective settings of its checkpoint.
        """
        speculation = vllm_config.speculative_config
        if speculation is None or not speculation.uses_draft_model():
            return None
        if speculation.draft_model_config.architecture not in PLAIN:
            return None
        return cls._of_model(vllm_config, speculation.draft_model_config)

    @classmethod
    def _of_model(cls, vllm_config: VllmConfig, model_config: ModelConfig) -> "SWAConfig":
        options, layers = _decide_options_and_layers(vllm_config, model_config)
        implementation = implementation_of(options)
        needs_all = obstacle_to_survivors(implementation, vllm_config) is not None
        storage = StoragePolicy(
            options.sink_tokens,
            # The CPU backend writes copies of the sinks behind the newest token.
            spare_tokens=0 if implementation is Implementation.KERNELS else options.sink_tokens,
            prefill_pages=PrefillPages.ALL if needs_all else options.prefill_pages,
        )
        return cls(options, layers, implementation, storage)

    @property
    def slides(self) -> bool:
        """Whether any layer has a window."""
        return self.layers.slides

    @property
    def frees_pages(self) -> bool:
        """Whether any layer has a window that generated tokens have too, so that pages leave it."""
        return _frees_pages(self.options, self.layers)

    @property
    def uses_kernels(self) -> bool:
        """Whether windowed layers run on this project's kernels."""
        return self.implementation is Implementation.KERNELS

    @property
    def has_own_backend(self) -> bool:
        """Whether windowed layers have an attention backend of this plugin."""
        return self.implementation is not Implementation.STOCK


def _decide_options_and_layers(
    vllm_config: VllmConfig, model_config: ModelConfig
) -> tuple[SWAOptions, LayerPlan]:
    """Decide what needs nothing but a model's config and the options, in any vLLM."""
    options = parse_additional_config(vllm_config.additional_config)
    if is_draft(model_config):
        return _decide_for_draft(options, model_config)
    layers = resolve_layers(
        text_config_of(model_config),
        options,
        hf_overrides=text_overrides(model_config),
        max_model_len=model_config.max_model_len,
    )
    return options, layers


def _decide_for_draft(
    options: SWAOptions, model_config: ModelConfig
) -> tuple[SWAOptions, LayerPlan]:
    """Decide by a draft's own config: of the options, which are its target's, it has the engine's.

    These say how pages are stored, and what computes attention.
    """
    try:
        layers = resolve_layers(
            text_config_of(model_config),
            SWAOptions(),
            hf_overrides=text_overrides(model_config),
            max_model_len=model_config.max_model_len,
        )
    except SWAConfigError as error:
        raise SWAConfigError(
            f"the draft model {model_config.model} has the windows of its own config.json, and "
            f"none by options: correct them there. {error}"
        ) from error
    storage = options.prefill_pages, options.impl, options.debug_poison
    return SWAOptions(prefill_pages=storage[0], impl=storage[1], debug_poison=storage[2]), layers


def _frees_pages(options: SWAOptions, layers: LayerPlan) -> bool:
    return layers.slides and options.phase is not Phase.PREFILL


def vllm_config_frees_pages(vllm_config: VllmConfig) -> bool:
    """As :attr:`SWAConfig.frees_pages`, of the model or its draft model, in any vLLM.

    Raises:
        SWAConfigError: as :meth:`SWAConfig.from_vllm`.
    """
    if _frees_pages(*_decide_options_and_layers(vllm_config, vllm_config.model_config)):
        return True
    draft = SWAConfig.of_draft(vllm_config)
    return draft is not None and draft.frees_pages


def wants_windows_decided(vllm_config: VllmConfig) -> bool:
    """Whether the options or the checkpoint say anything that stock vLLM might get wrong.

    Beside a window this is full attention, asked for by the options, of a checkpoint that slides.

    Raises:
        SWAConfigError: as :meth:`SWAConfig.from_vllm`.
    """
    stock_slides = getattr(vllm_text_config(vllm_config), "sliding_window", None) is not None
    decided = _decide_options_and_layers(vllm_config, vllm_config.model_config)
    return decided[1].slides or stock_slides


def vllm_text_config(vllm_config: VllmConfig) -> Any:
    """Hugging Face's config of the text layers; a multimodal model's is nested in its own."""
    return text_config_of(vllm_config.model_config)


def text_config_of(model_config: ModelConfig) -> Any:
    """As :func:`vllm_text_config`, of one of an engine's models."""
    return model_config.hf_config.get_text_config()


def is_draft(model_config: ModelConfig) -> bool:
    """Whether a model drafts for another one."""
    return bool(model_config.runner_type == "draft")
