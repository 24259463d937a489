"""Checks of a checkpoint's safetensors files against its config; only their headers are read.

vLLM stacks projections and counts a stack as loaded once one of them was loaded: it serves a
checkpoint that lacks ``q_proj`` of a layer with whatever the memory held before.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_INDEX = "model.safetensors.index.json"
_REMEDY = "download or copy the checkpoint again"
_OF_PEFT = "base_model."
_MODULE = re.compile(r"(?:^|\.)layers\.(\d+)\.((?:self_attn|mlp)\.\w+)\.")
# Some checkpoints stack these projections, as vLLM does.
_STACKS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
_MLP = ("gate_proj", "up_proj", "down_proj")
_FLOATS = ("F64", "F32", "F16", "BF16")

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def check_weights(directory: Path, config: Any) -> None:
    """Refuse weights that are incomplete or do not match the config.

    Without safetensors files there is nothing to check, and vLLM reports what it misses. Names and
    shapes are checked for plain Qwen3 models; for quantized ones only names.

    Args:
        directory: the checkpoint's directory.
        config: the text layers' config.

    Raises:
        ValueError: a file that is missing or cut short, a layer without a weight, a wrong shape.
    """
    tensors: Tensors = {}
    files = _safetensors_files(directory)
    _check_adapter_files(directory, files)
    for file in files:
        tensors |= read_safetensors_header(file)
    if wrapped := next((name for name in tensors if name.startswith(_OF_PEFT)), None):
        raise ValueError(
            f"the weights in {directory} are named as PEFT names them ({wrapped}), and vLLM knows "
            f"no '{_OF_PEFT.rstrip('.')}'; merge the adapter with PEFT's merge_and_unload(), and "
            "save that model"
        )
    if tensors and config.model_type in ("qwen3", "qwen3_moe"):
        _check_weight_names(directory, config, tensors)
        if not getattr(config, "quantization_config", None):
            _check_weight_shapes(directory, config, tensors)


def _check_adapter_files(directory: Path, files: list[Path]) -> None:
    """Refuse a LoRA adapter among the weights: vLLM would load it as a part of the model.

    An index of weights leaves it out.
    """
    adapters = [file for file in files if file.name.startswith("adapter_model")]
    if not adapters:
        return
    serve = "serve it with --enable-lora --lora-modules NAME=DIRECTORY"
    if len(adapters) == len(files):
        raise ValueError(
            f"{directory} has a LoRA adapter ({adapters[0].name}) and no weights of a model; give "
            f"the directory of the model that it was made for, and {serve}"
        )
    raise ValueError(
        f"{directory} has a LoRA adapter ({adapters[0].name}) beside the weights of the model, and "
        "vLLM would load it as one of them; move it and adapter_config.json to a directory of "
        f"their own, and {serve}"
    )


def read_safetensors_header(file: Path) -> Tensors:
    """Read the dtype and shape of every tensor in a safetensors file.

    Raises:
        ValueError: the file is no safetensors file, or shorter than its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{file} is cut short: {size} bytes are less than its header; {_REMEDY}"
            )
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            tensors = {n: (t["dtype"], tuple(t["shape"])) for n, t in header.items()}
            end = max((t["data_offsets"][1] for t in header.values()), default=0)
        except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{file} is no safetensors file ({error}); {_REMEDY}") from error
    if size < 8 + length + end:
        raise ValueError(
            f"{file} is cut short: it has {size} of {8 + length + end} bytes; {_REMEDY}"
        )
    return tensors


def _safetensors_files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if not index.exists():
        return sorted(directory.glob("*.safetensors"))
    try:
        files = sorted(
            {directory / name for name in json.loads(index.read_text())["weight_map"].values()}
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weights ({error!r}); {_REMEDY}") from error
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(
            f"{directory} lacks {', '.join(missing)}, {len(missing)} of {len(files)} files that "
            f"{_INDEX} names; {_REMEDY}"
        )
    return files


def _check_weight_names(directory: Path, config: Any, tensors: Tensors) -> None:
    found = {(int(m[1]), m[2]) for name in tensors if (m := _MODULE.search(name))}
    found |= {(layer, part) for layer, stack in found for part in _STACKS.get(stack, ())}
    wanted = [f"self_attn.{name}" for name in _ATTENTION]
    if config.model_type == "qwen3":
        wanted += [f"mlp.{name}" for name in _MLP]
    num_layers = config.num_hidden_layers
    lacking = [
        f"layers.{layer}.{module}"
        for layer in range(num_layers)
        for module in wanted
        if (layer, module) not in found
    ]
    if extra := sorted({layer for layer, _ in found if layer >= num_layers}):
        raise ValueError(
            f"the weights in {directory} have a layer {extra[0]}, and its config.json says "
            f"num_hidden_layers={num_layers}; {_REMEDY}, or correct the config"
        )
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise ValueError(
            f"the weights in {directory} lack {', '.join(lacking[:3])}{more} of the "
            f"{num_layers} layers that its config.json says; {_REMEDY}, or correct the config"
        )


def _check_weight_shapes(directory: Path, config: Any, tensors: Tensors) -> None:
    for name, wanted in _expected_weight_shapes(config):
        for found, (dtype, shape) in tensors.items():
            if found.endswith(f"{name}.weight") and dtype in _FLOATS and shape != wanted:
                raise ValueError(
                    f"{found} in {directory} has the shape {list(shape)}, and by its config.json "
                    f"it must be {list(wanted)}; {_REMEDY}, or correct the config"
                )


def _expected_weight_shapes(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Give name and shape of the weights whose shapes follow from the config alone."""
    hidden, head_dim = config.hidden_size, config.head_dim
    queries = config.num_attention_heads * head_dim
    keys = config.num_key_value_heads * head_dim
    yield "embed_tokens", (config.vocab_size, hidden)
    yield "self_attn.q_proj", (queries, hidden)
    yield "self_attn.k_proj", (keys, hidden)
    yield "self_attn.v_proj", (keys, hidden)
    yield "self_attn.o_proj", (hidden, queries)
    yield "self_attn.q_norm", (head_dim,)
    yield "self_attn.k_norm", (head_dim,)
    if config.model_type == "qwen3":
        yield "mlp.gate_proj", (config.intermediate_size, hidden)
        yield "mlp.up_proj", (config.intermediate_size, hidden)
        yield "mlp.down_proj", (hidden, config.intermediate_size)
