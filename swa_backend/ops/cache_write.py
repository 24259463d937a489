"""The operation that stores keys and values in the slots of a paged cache."""

import torch

from swa_backend import reference
from swa_backend.kernels.device import on_device_of
from swa_backend.ops.checks import (
    check_cache,
    check_for_kernels,
    check_integers,
    check_like,
    check_same_device,
    check_scales,
)
from swa_backend.ops.dispatch import readable, resolve

_MANTISSA_BITS = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}


def write_pages(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    impl: str = "auto",
) -> None:
    """Store a step's keys and values in their slots.

    Args:
        key, value: fp32, fp16 or bf16 ``[num_tokens, Hkv, D]``.
        kv_cache: the same dtype, or fp8 (e4m3fn, e5m2), ``[num_pages, Hkv, page, 2 * D]``.
        slot_mapping: int64 ``[num_slots]``, ``page_id * page + offset`` of the first tokens;
            tokens with a negative slot are not stored.
        k_scale, v_scale: divisors of what an fp8 cache holds, rounded to nearest, saturated.

    Raises:
        TypeError, ValueError: a dtype, shape or number other than these.
    """
    check_cache(kv_cache, key, "key")
    check_like("value", value, key, "key")
    check_integers("slot_mapping", slot_mapping, torch.int64, (None,))
    if slot_mapping.shape[0] > key.shape[0] or key.shape[1] != kv_cache.shape[1]:
        raise ValueError(
            f"got {slot_mapping.shape[0]} slots for {key.shape[0]} tokens of {key.shape[1]} heads, "
            f"and a cache of {kv_cache.shape[1]}; give at most one slot a token, and equal heads"
        )
    check_scales(k_scale=k_scale, v_scale=v_scale)
    check_same_device(kv_cache, "kv_cache", key=key, value=value, slot_mapping=slot_mapping)
    if resolve(impl, kv_cache.device) == "torch":
        reference.write_pages(key, value, kv_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale)
        return
    check_for_kernels(key.shape[2], key=key, value=value)
    _, _, target = readable(kv_cache)
    if slot_mapping.shape[0] == 0:
        return
    from swa_backend.kernels.cache_write import launch_write

    mantissa = _MANTISSA_BITS.get(kv_cache.dtype, 0)
    with on_device_of(kv_cache):
        launch_write(
            key,
            value,
            kv_cache.view(torch.uint8) if mantissa else kv_cache,
            slot_mapping,
            k_scale=k_scale,
            v_scale=v_scale,
            mantissa=mantissa,
            target=target,
        )
