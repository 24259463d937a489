"""What ``--hf-overrides`` of a model's RoPE takes away from the checkpoint."""

import json
from collections.abc import Mapping
from typing import Any

from vllm.config import ModelConfig

from swa_vllm.config.overrides import checkpoint_config

_KEYS = ("rope_parameters", "rope_scaling")
# What vLLM's layers take where a config has no theta: those of a dense Qwen3, and all others.
_DENSE_TYPES = ("qwen3", "qwen3_vl_text", "qwen3_asr_text")
_DENSE_THETA, _OTHER_THETA = 1_000_000, 10_000


def lost_rope_theta(model_config: ModelConfig) -> str | None:
    """Say which theta of the checkpoint an override loses, and which is served; None if none is.

    An override of ``rope_parameters`` replaces the whole object: a theta that it does not repeat is
    lost, with or without this plugin.
    """
    overrides = model_config.hf_overrides
    if not isinstance(overrides, Mapping) or not _lacks_theta(overrides):
        return None
    checkpoint = checkpoint_config(model_config).get_text_config()
    written = (getattr(checkpoint, "rope_parameters", None) or {}).get("rope_theta")
    text = model_config.hf_config.get_text_config()
    default = _DENSE_THETA if text.model_type in _DENSE_TYPES else _OTHER_THETA
    served = (text.rope_parameters or {}).get("rope_theta", default)
    if written is None or written == served:
        return None
    remedy = json.dumps(_with_theta(overrides, written))
    return (
        "--hf-overrides replaces the checkpoint's RoPE as a whole and names no rope_theta: the "
        f"checkpoint has rope_theta={written:g}, and {served:g} is served. Write --hf-overrides "
        f"'{remedy}'"
    )


def _is_without_theta(key: str, value: object) -> bool:
    return key in _KEYS and isinstance(value, Mapping) and "rope_theta" not in value


def _lacks_theta(overrides: Mapping[str, Any]) -> bool:
    return any(
        _is_without_theta(key, value) or (isinstance(value, Mapping) and _lacks_theta(value))
        for key, value in overrides.items()
    )


def _with_theta(overrides: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """Add ``theta`` to the RoPE of an override, also to that of a nested config."""
    found = {}
    for key, value in overrides.items():
        if _is_without_theta(key, value):
            found[key] = {**value, "rope_theta": theta}
        else:
            found[key] = _with_theta(value, theta) if isinstance(value, Mapping) else value
    return found
