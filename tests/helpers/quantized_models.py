"""Tiny checkpoints in the quantized formats that vLLM's CPU build can run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import _custom_ops  # noqa: F401 (defines vLLM's operators)

GROUP_SIZE = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output channel of each nibble, the lowest first
Tensors = dict[str, torch.Tensor]


def save_quantized(directory: Path, plain: Path, kind: str) -> Path:
    """Write the checkpoint ``plain`` with its linear layers quantized as ``kind``.

    Args:
        directory: where to; made if missing.
        plain: directory of a tiny Qwen3.
        kind: a key of :data:`FORMATS`.
    """
    quantize, description = FORMATS[kind]
    directory.mkdir(parents=True, exist_ok=True)
    tensors: Tensors = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{key}": t for key, t in quantize(weight).items()}
        else:
            tensors[name] = weight.bfloat16()
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, directory / "model.safetensors"
    )
    config = json.loads((plain / "config.json").read_text())
    config |= {"quantization_config": description, "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _w8a8(weight: torch.Tensor) -> Tensors:
    """Eight bits, one scale an output channel; activations are quantized at run time."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    values = (weight / scale).round().to(torch.int8)
    return {"weight": values, "weight_scale": scale.bfloat16()}


def _four_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values 0..15 around 8, ``[in, out]``, and scales, ``[in / GROUP_SIZE, out]``."""
    groups = weight.T.reshape(-1, GROUP_SIZE, weight.shape[0])
    scales = groups.abs().amax(1) / 7
    values = (groups / scales[:, None]).round() + 8
    return values.reshape(weight.shape[::-1]).to(torch.int64), scales.bfloat16()


def _packed(values: torch.Tensor) -> torch.Tensor:
    """Eight nibbles of the last dimension in one int32, the first the lowest."""
    shifts = torch.arange(0, 32, 4)
    packed = (values.reshape(*values.shape[:-1], -1, 8) << shifts).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def _gptq(weight: torch.Tensor) -> Tensors:
    values, scales = _four_bits(weight)
    zeros = torch.full(scales.shape, 7)  # one less than the zero point, by the format
    return {
        "qweight": _packed(values.T).T,
        "qzeros": _packed(zeros),
        "scales": scales,
        "g_idx": (torch.arange(len(values)) // GROUP_SIZE).to(torch.int32),
    }


def _awq(weight: torch.Tensor) -> Tensors:
    values, scales = _four_bits(weight)

    def ordered(t: torch.Tensor) -> torch.Tensor:
        return _packed(t.reshape(len(t), -1, 8)[..., AWQ_ORDER].reshape(t.shape))

    zeros = torch.full(scales.shape, 8)
    return {"qweight": ordered(values), "qzeros": ordered(zeros), "scales": scales}


_EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}
_W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_EIGHT_BITS, "strategy": "channel", "dynamic": False},
            "input_activations": {**_EIGHT_BITS, "strategy": "token", "dynamic": True},
        }
    },
}
_SCHEME = {"type": "float", "num_bits": 8, "dynamic": False, "symmetric": True}
# What checkpoints say that ask for an fp8 KV cache, by the tool that made them.
FP8_CACHE: dict[str, dict[str, Any]] = {
    "compressed-tensors": {**_W8A8, "kv_cache_scheme": {**_SCHEME, "strategy": "tensor"}},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
}
FORMATS: dict[str, tuple[Callable[[torch.Tensor], Tensors], dict[str, Any]]] = {
    "w8a8": (_w8a8, _W8A8),
    # Without scales of the cache, which are 1 then.
    "w8a8 and an fp8 cache": (_w8a8, FP8_CACHE["compressed-tensors"]),
    "gptq": (
        _gptq,
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP_SIZE,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
        },
    ),
    "awq": (
        _awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP_SIZE,
            "zero_point": True,
            "version": "gemm",
        },
    ),
}
# vLLM's CPU build has operators for four bits and fp8 where the processor has AVX-512.
RUNNABLE = tuple(FORMATS) if hasattr(torch.ops._C, "cpu_gemm_wna16") else ("w8a8",)
needs_fp8_kernels = pytest.mark.skipif(
    not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()),
    reason="vLLM has fp8 KV cache kernels for CPUs with AVX-512 or AMX only",
)
