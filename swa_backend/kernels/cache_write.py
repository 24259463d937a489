"""A kernel that stores keys and values in their pages."""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from swa_backend.kernels.launch import Launcher, kernel_launcher
from swa_backend.kernels.plans import Target


@triton.jit
def to_fp8_bits(x, MANTISSA: tl.constexpr):
    """Bytes of fp32 ``x`` as e4m3 (``MANTISSA`` 3) or e5m2 (2): nearest even, saturating, NaN kept.

    Multiplied by the difference of the exponent biases, a number has its fp8 exponent in the low
    bits of its fp32 exponent, subnormal numbers too; what is left is to round and to shift.
    Integers only, because Triton has no e4m3 for devices below 8.9.
    """
    LARGEST: tl.constexpr = 448.0 if MANTISSA == 3 else 57344.0
    # 2 ** (7 - 127) and 2 ** (15 - 127).
    REBIAS: tl.constexpr = 7.52316384526264e-37 if MANTISSA == 3 else 1.925929944387236e-34
    SHIFT: tl.constexpr = 23 - MANTISSA
    magnitude = tl.minimum(tl.abs(x), LARGEST) * REBIAS
    bits = magnitude.to(tl.uint32, bitcast=True)
    rounded = (bits + ((1 << (SHIFT - 1)) - 1) + ((bits >> SHIFT) & 1)) >> SHIFT
    sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
    return (tl.where(x == x, rounded, 0x7F) | sign).to(tl.uint8)


@triton.jit(do_not_specialize_on_alignment=["slot_mapping_ptr"])
def write_kernel(
    key_ptr,
    value_ptr,
    kv_ptr,
    slot_mapping_ptr,
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    stride_kv_page,
    stride_kv_head,
    stride_kv_slot,
    stride_kv_dim,
    key_factor,
    value_factor,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    MANTISSA: tl.constexpr,
):
    """Store one token's keys and values, all heads; ``MANTISSA`` 0 stores elements as they are."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    if slot < 0:
        return
    heads = tl.arange(0, HEADS)[:, None]
    dims = tl.arange(0, HEAD_DIM)[None, :]
    is_head = heads < NUM_HEADS
    key_offset = token * stride_key_token + heads * stride_key_head + dims
    value_offset = token * stride_value_token + heads * stride_value_head + dims
    key = tl.load(key_ptr + key_offset, mask=is_head, other=0.0)
    value = tl.load(value_ptr + value_offset, mask=is_head, other=0.0)
    if MANTISSA:
        key = to_fp8_bits(key.to(tl.float32) * key_factor, MANTISSA)
        value = to_fp8_bits(value.to(tl.float32) * value_factor, MANTISSA)
    kv_offset = (slot // PAGE) * stride_kv_page + (slot % PAGE) * stride_kv_slot
    kv_offset += heads.to(tl.int64) * stride_kv_head + dims * stride_kv_dim
    tl.store(kv_ptr + kv_offset, key, mask=is_head)
    tl.store(kv_ptr + kv_offset + HEAD_DIM * stride_kv_dim, value, mask=is_head)


@lru_cache(maxsize=1024)
def _write_kernel_launcher(
    num_heads: int, head_dim: int, page: int, mantissa: int, target: Target
) -> Launcher:
    constants = {
        "NUM_HEADS": num_heads,
        "HEADS": triton.next_power_of_2(num_heads),
        "HEAD_DIM": head_dim,
        "PAGE": page,
        "MANTISSA": mantissa,
    }
    return kernel_launcher(write_kernel, constants, target.options(), target)


class WriteLaunch:
    """The kernel for the slots of a batch, for any layer."""

    def __init__(
        self,
        slot_mapping: torch.Tensor,
        num_heads: int,
        head_dim: int,
        page: int,
        mantissa: int,
        target: Target,
    ) -> None:
        """Prepare all but the tensors of a layer; an fp8 cache has ``mantissa`` bits, others 0."""
        self._slots = slot_mapping
        self._launch = _write_kernel_launcher(num_heads, head_dim, page, mantissa, target)

    def __call__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        *,
        k_scale: float,
        v_scale: float,
    ) -> None:
        """Launch for the tensors of a layer; an fp8 cache comes as bytes."""
        self._launch(
            (self._slots.shape[0], 1, 1),
            (key, value, kv_cache),
            (self._slots,),
            (*key.stride()[:2], *value.stride()[:2], *kv_cache.stride()),
            (1.0 / k_scale, 1.0 / v_scale),
        )
