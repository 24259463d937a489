"""vLLM's Triton decode kernel as it is: what it reads and launches, and what it compiles to.

After ``vllm/v1/attention/ops/triton_unified_attention.py`` and ``backends/triton_attn.py``.
"""

import sys
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest.mock import patch

from vllm.triton_utils import HAS_TRITON
from vllm.v1.attention.backends.triton_attn import (
    MIN_LAUNCH_GRID_SIZE_2D,
    NUM_PAR_SOFTMAX_SEGMENTS,
)
from vllm.v1.attention.ops.triton_unified_attention import _get_tile_size

from swa_backend.kernels.plans import Target
from swa_backend.pages import ceil_div
from swa_backend.window import first_visible

_OPS = "vllm.v1.attention.ops"
_MODULES = ("triton_attention_helpers", "triton_unified_attention")
_ROWS = 16


@dataclass(frozen=True)
class StockWork:
    """What vLLM launches for a batch of decoding requests of equal length.

    Attributes:
        num_keys: keys that a request reads for each KV head.
        launched: programs.
        useful: programs that read a key.
    """

    num_keys: int
    launched: int
    useful: int


def stock_work(
    batch: int, seq_len: int, window: int, num_kv_heads: int, group: int, head_dim: int
) -> StockWork:
    """By the arithmetic of vLLM's launcher and kernel, for 16-bit queries."""
    is_split = batch <= MIN_LAUNCH_GRID_SIZE_2D // num_kv_heads
    num_segments = NUM_PAR_SOFTMAX_SEGMENTS if is_split else 1
    tile = _get_tile_size(head_dim, window, 2, is_prefill=not is_split)
    first_tile = first_visible(seq_len - 1, window) // tile
    span = ceil_div(seq_len, num_segments * tile)
    last_tile = ceil_div(seq_len, tile) - 1
    return StockWork(
        num_keys=seq_len - first_tile * tile,
        launched=(batch // (_ROWS // group) + batch) * num_kv_heads * num_segments,
        useful=batch * num_kv_heads * (last_tile // span - first_tile // span + 1),
    )


def compile_stock(target: Target, window: int, num_kv_heads: int, group: int, head_dim: int) -> Any:
    """Facts (:class:`swa_backend.kernels.aot.Facts`) of the split kernel, bfloat16, pages of 16."""
    from swa_backend.kernels import aot

    kernel = _kernel(aot.triton_modules())
    arguments = _arguments(kernel.arg_names, window, num_kv_heads, group, head_dim)
    # vLLM leaves them to Triton, whose defaults on NVIDIA these are.
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    return aot.read_facts(aot.compile_kernel(kernel, target, arguments, options), target)


def _kernel(triton_modules: dict[str, Any]) -> Any:
    """The kernel as a Triton function, also where vLLM has put a placeholder for Triton."""
    name = f"{_OPS}.triton_unified_attention"
    if HAS_TRITON:
        return import_module(name).kernel_unified_attention
    stand_in = ModuleType("vllm.triton_utils")
    vars(stand_in).update(triton_modules, HAS_TRITON=True)
    with patch.dict(sys.modules, {"vllm.triton_utils": stand_in}):
        for module in _MODULES:
            sys.modules.pop(f"{_OPS}.{module}", None)
        return import_module(name).kernel_unified_attention


def _arguments(
    names: list[str], window: int, num_kv_heads: int, group: int, head_dim: int
) -> dict[str, Any]:
    """As ``unified_attention`` passes them for decoding Qwen3 in bfloat16."""
    from swa_backend.kernels.aot import Argument

    pointers = {
        "output_ptr": "*bf16",
        "query_ptr": "*bf16",
        "key_cache_ptr": "*bf16",
        "value_cache_ptr": "*bf16",
        "block_tables_ptr": "*i32",
        "seq_lens_ptr": "*i32",
        "rswa_prefix_lens_ptr": "*i32",
        "query_start_len_ptr": "*i32",
        "segm_output_ptr": "*fp32",
        "segm_max_ptr": "*fp32",
        "segm_expsum_ptr": "*fp32",
    }
    strides = [name for name in names if "stride_" in name or name.endswith("_stride")]
    # Flags that are off, and pointers of what is not used.
    arguments: dict[str, Any] = {name: 0 if name.isupper() else None for name in names}
    return arguments | {
        **dict.fromkeys(strides, Argument("i64", aligned=True)),
        **dict.fromkeys((n for n in strides if n[7:10] in ("ks_", "vs_")), None),
        **{name: Argument(kind, aligned=True) for name, kind in pointers.items()},
        **dict.fromkeys(("scale", "out_scale", "softcap"), Argument("fp32")),
        "num_seqs": Argument("i32"),
        "qq_bias_stride_0": Argument("i64", aligned=True),
        "stride_k_cache_3": 1,
        "stride_v_cache_3": 1,
        "num_query_heads": num_kv_heads * group,
        "num_queries_per_kv": group,
        "BLOCK_SIZE": 16,
        "TILE_SIZE": _get_tile_size(head_dim, window, 2, is_prefill=False),
        "HEAD_SIZE": head_dim,
        "HEAD_SIZE_PADDED": head_dim,
        "SLIDING_WINDOW": window,
        "USE_CAUSAL": True,
        "BLOCK_Q": _ROWS // group,
        "BLOCK_M": _ROWS,
        "NUM_SEGMENTS_PER_SEQ": NUM_PAR_SOFTMAX_SEGMENTS,
        "IS_3D": True,
        "CHUNK_LOOKBACK": -1,
        "CHUNK_SIZE": -1,
        "FP8_MIN": -448.0,
        "FP8_MAX": 448.0,
    }
