"""What ``--hf-overrides`` changes of the text layers' config."""

import copy
from collections.abc import Mapping
from typing import Any

from vllm.config import ModelConfig
from vllm.transformers_utils.config import get_config

from swa_backend.options import USE_OPTIONS, SWAConfigError, is_section


def checkpoint_config(model_config: ModelConfig) -> Any:
    """Hugging Face's config of the whole checkpoint, without any override."""
    return get_config(
        model_config.hf_config_path or model_config.model,
        model_config.trust_remote_code,
        model_config.revision,
        model_config.code_revision,
        model_config.config_format,
    )


def text_overrides(model_config: ModelConfig) -> Mapping[str, Any]:
    """The overrides as a mapping: of a function, what it changes of the checkpoint's config.

    Raises:
        SWAConfigError: options of windows are among them, where nothing reads them.
    """
    given: Any = model_config.hf_overrides
    overrides = given if isinstance(given, Mapping) else _changes_by(given, model_config)
    if misplaced := [key for key in overrides if is_section(key)]:
        raise SWAConfigError(
            f"--hf-overrides has {misplaced[0]!r}, where nothing reads options of windows; leave "
            f"the override out and use {USE_OPTIONS}"
        )
    return overrides


def _changes_by(function: Any, model_config: ModelConfig) -> dict[str, Any]:
    config = checkpoint_config(model_config)
    before = copy.deepcopy(vars(config.get_text_config()))
    after = vars(function(config).get_text_config())
    return {key: after[key] for key in after if key not in before or after[key] != before[key]}
