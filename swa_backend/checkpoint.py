"""A checkpoint's ``config.json`` as far as planning needs it, read without transformers."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from swa_backend.layers import FULL, HYBRID_MODELS, LINEAR, SLIDING
from swa_backend.options import is_count, shown_value

# Text stacks that are a Qwen3, by transformers' model type.
_TEXT_MODELS = (
    "qwen3",
    "qwen3_moe",
    "qwen3_vl_text",
    "qwen3_vl_moe_text",
    "qwen3_omni_moe_text",
    "qwen3_asr_text",
    *HYBRID_MODELS,
)
# Model type of a nested text config that does not name its own, by the type of the whole.
_UNSAID = {
    "qwen3_asr": "qwen3",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}
_REMEDY = "give the config.json of a Qwen3"
_NESTED = ("thinker_config", "text_config")
# Defaults of transformers' Qwen3Config and Qwen3MoeConfig.
_COMMON_DEFAULTS = {
    "num_attention_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {
        **_COMMON_DEFAULTS,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_window_layers": 28,
    },
    "qwen3_moe": {
        **_COMMON_DEFAULTS,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
    },
}
# Defaults of transformers' Qwen3NextConfig, Qwen3_5TextConfig and Qwen3_5MoeTextConfig.
_HYBRID_DEFAULTS: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
_OF_HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": _HYBRID_DEFAULTS,
    "qwen3_5_text": {
        **_HYBRID_DEFAULTS,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_key_value_heads": 4,
    },
    "qwen3_5_moe_text": {**_HYBRID_DEFAULTS, "num_hidden_layers": 40},
}


@dataclass(frozen=True)
class LinearState:
    """The state of a layer with linear attention (a gated delta net), on all devices together.

    Attributes:
        num_key_heads: heads of queries, and of keys.
        num_value_heads: heads of values, each with a matrix of ``value_head_dim x key_head_dim``.
        conv_kernel: taps of the convolution before it, which keeps all but one as inputs.
        dtype: name of the matrices' dtype; None where the checkpoint asks for none.
    """

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int
    dtype: str | None

    @property
    def num_conv_elements(self) -> int:
        """Inputs of the convolution that are kept."""
        num_channels = (
            2 * self.num_key_heads * self.key_head_dim + self.num_value_heads * self.value_head_dim
        )
        return num_channels * (self.conv_kernel - 1)

    @property
    def num_matrix_elements(self) -> int:
        """Elements of all matrices."""
        return self.num_value_heads * self.value_head_dim * self.key_head_dim


@dataclass(frozen=True)
class Checkpoint:
    """What a plan needs to know of a model.

    Attributes:
        architectures: what the checkpoint says that it is; empty where it does not.
        config: the text layers' config, as :func:`swa_backend.layers.resolve_layers` reads it.
        num_layers: number of text layers.
        num_kv_heads: KV heads of a layer, those of all devices together.
        head_dim: elements of a key, and of a value.
        dtype: name of the weights' dtype; None where the config does not say.
        max_positions: ``max_position_embeddings``.
        quantization: how weights and KV cache are quantized, as the tool that did it writes it
            down; empty where nothing is.
        linear: the state of a layer with linear attention; None where there are none.
    """

    architectures: tuple[str, ...]
    config: Any
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str | None
    max_positions: int
    quantization: dict[str, Any]
    linear: LinearState | None = None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's directory or its config.json.

    Raises:
        ValueError: no such file, not JSON, not a Qwen3, or a key that is missing or wrong.
    """
    # Unlike Path.is_dir this does not raise where a directory may not be read: reading does.
    file = path / "config.json" if os.path.isdir(path) else path
    raw = _load_config_json(file)
    text = dict(raw)
    for key in _NESTED:
        if isinstance(text.get(key), dict):
            text = text[key]
    kind = text.get("model_type") or _UNSAID.get(str(raw.get("model_type")))
    if kind not in _TEXT_MODELS:
        raise ValueError(
            f"{file}: model_type {raw.get('model_type')!r} is no Qwen3 that this plugin serves "
            f"with windows; its text layers must be one of {', '.join(_TEXT_MODELS)}. Give the "
            "config.json of one"
        )
    defaults = _DEFAULTS.get(kind, _OF_HYBRIDS.get(kind, {}))
    text = {**defaults, **text, "model_type": kind}
    _check_config_types(file, text)
    heads = _checkpoint_count(file, text, "num_attention_heads")
    if text.get("num_key_value_heads") is None and kind != "qwen3_moe":
        text["num_key_value_heads"] = heads
    if text.get("head_dim") is None and kind != "qwen3":
        text["head_dim"] = (text.get("hidden_size") or 0) // heads
    num_layers = _checkpoint_count(file, text, "num_hidden_layers")
    text |= {
        "rope_parameters": _checkpoint_rope(file, text),
        **_checkpoint_windows(file, text, num_layers),
    }
    keys = ("dtype", "torch_dtype")
    dtype = next((c[key] for c in (raw, text) for key in keys if c.get(key) is not None), None)
    return Checkpoint(
        architectures=_checkpoint_architectures(file, raw),
        config=SimpleNamespace(**text),
        num_layers=num_layers,
        num_kv_heads=_checkpoint_count(file, text, "num_key_value_heads"),
        head_dim=_checkpoint_count(file, text, "head_dim"),
        dtype=None if dtype is None else str(dtype),
        max_positions=_checkpoint_count(file, text, "max_position_embeddings"),
        quantization=_checkpoint_quantization(file, raw),
        linear=_checkpoint_state(file, text) if kind in HYBRID_MODELS else None,
    )


def _checkpoint_state(file: Path, text: dict[str, Any]) -> LinearState:
    dtype = text.get("mamba_ssm_dtype")
    return LinearState(
        num_key_heads=_checkpoint_count(file, text, "linear_num_key_heads"),
        num_value_heads=_checkpoint_count(file, text, "linear_num_value_heads"),
        key_head_dim=_checkpoint_count(file, text, "linear_key_head_dim"),
        value_head_dim=_checkpoint_count(file, text, "linear_value_head_dim"),
        conv_kernel=_checkpoint_count(file, text, "linear_conv_kernel_dim"),
        dtype=None if dtype is None else str(dtype),
    )


def _load_config_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        if os.path.exists(file.with_name("adapter_config.json")):
            raise ValueError(
                f"{file} does not exist, but an adapter_config.json beside it: this is a LoRA "
                "adapter. Give the directory of the model that it was made for, and serve it with "
                f"--enable-lora --lora-modules NAME={file.parent}"
            ) from error
        raise ValueError(
            f"{file} does not exist. Give a local directory with a config.json, or that file; of a "
            "model on the Hugging Face hub it is enough to download config.json (hf download "
            "OWNER/NAME config.json)"
        ) from error
    except OSError as error:
        raise ValueError(
            f"{file} cannot be read: {error.strerror}; give a config.json that this user can read"
        ) from error
    except ValueError as error:  # JSON's and Unicode's errors
        raise ValueError(f"{file} is not JSON: {error}; {_REMEDY}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} holds a JSON {type(raw).__name__}, not an object; {_REMEDY}")
    return raw


def _checkpoint_quantization(file: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Find where a checkpoint says how it is quantized: tools have several places for it."""
    found = raw.get("quantization_config")
    if found is None and os.path.exists(beside := file.with_name("hf_quant_config.json")):
        found = _load_config_json(beside)
    for other in (raw.get("text_config"), {"quantization_config": raw.get("compression_config")}):
        if found is None and isinstance(other, dict):
            found = other.get("quantization_config")
    if found is not None and not isinstance(found, dict):
        raise ValueError(_wrong_checkpoint_key(file, "quantization_config", "an object", found))
    return found or {}


def _checkpoint_architectures(file: Path, raw: dict[str, Any]) -> tuple[str, ...]:
    names = raw.get("architectures") or ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(_wrong_checkpoint_key(file, "architectures", "a list of names", names))
    return tuple(names)


def _check_config_types(file: Path, text: dict[str, Any]) -> None:
    """Raise for a key about layers whose type transformers would refuse."""
    defaults = _DEFAULTS.get(text["model_type"], {})
    for keys, fits, allowed in (
        (("use_sliding_window",), bool, "true or false"),
        (("hidden_size", "max_window_layers", "sliding_window"), int, "an integer"),
        (("layer_types",), list, "a list of names"),
    ):
        for key in keys:
            value = text.get(key)
            if value is None and (key == "sliding_window" or key not in defaults):
                continue
            names = value if isinstance(value, list) else ()
            if (
                not isinstance(value, fits)
                or (fits is int and isinstance(value, bool))
                or not all(isinstance(name, str) for name in names)
            ):
                raise ValueError(_wrong_checkpoint_key(file, key, allowed, value))


def _wrong_checkpoint_key(file: Path, key: str, allowed: str, value: object) -> str:
    return (
        f"{file}: {key} must be {allowed}, got {shown_value(value)}; correct it, or download the "
        "file again"
    )


def _checkpoint_rope(file: Path, text: dict[str, Any]) -> dict[str, Any]:
    """Read the rotary embedding; the older key wins in transformers, unless it is empty."""
    found = {"rope_parameters": text.get("rope_parameters")}
    if text.get("rope_scaling"):
        found["rope_scaling"] = text["rope_scaling"]
    rope: dict[str, Any] = {}
    for key, value in found.items():
        if value is not None and not isinstance(value, dict):
            raise ValueError(_wrong_checkpoint_key(file, key, "an object", value))
        rope = value or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("linear", "dynamic", "yarn") and "factor" not in rope:
        raise ValueError(
            _wrong_checkpoint_key(file, "rope_parameters", "an object with a factor", rope)
        )
    return {**rope, "rope_type": kind}


def _checkpoint_windows(file: Path, text: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Derive what transformers derives, which leaves derived models alone."""
    layer_types = text.get("layer_types")
    if layer_types is not None:  # "attention" is the older name
        if len(layer_types) != num_layers:
            raise ValueError(
                _wrong_checkpoint_key(file, "layer_types", f"{num_layers} names", layer_types)
            )
        layer_types = [FULL if name == "attention" else name for name in layer_types]
    if layer_types is None and text["model_type"] in HYBRID_MODELS:
        every = _checkpoint_count(file, text, "full_attention_interval")
        layer_types = [LINEAR if (i + 1) % every else FULL for i in range(num_layers)]
    if text["model_type"] not in _DEFAULTS:
        return {"layer_types": layer_types}
    window = text["sliding_window"] if text["use_sliding_window"] else None
    if layer_types is None and text["model_type"] == "qwen3":
        first = num_layers if window is None else text["max_window_layers"]
        layer_types = [FULL if index < first else SLIDING for index in range(num_layers)]
    return {"sliding_window": window, "layer_types": layer_types}


def _checkpoint_count(file: Path, text: dict[str, Any], key: str) -> int:
    value = text.get(key)
    if not is_count(value):
        raise ValueError(_wrong_checkpoint_key(file, key, "an integer >= 1 and below 2**31", value))
    return value
