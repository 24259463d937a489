"""The operation that stores keys and values in the slots of a paged cache."""

import torch

from swa_backend import reference
from swa_backend.kernels.device import on_device_of, target_of
from swa_backend.kernels.plans import Target
from swa_backend.ops.checks import (
    check_cache,
    check_integers,
    check_operand_like,
    check_operands_for_kernels,
    check_same_device,
    check_scales,
)
from swa_backend.ops.dispatch import resolve_impl

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
    check_operand_like("value", value, key, "key")
    check_integers("slot_mapping", slot_mapping, torch.int64, (None,))
    if slot_mapping.shape[0] > key.shape[0] or key.shape[1] != kv_cache.shape[1]:
        raise ValueError(
            f"got {slot_mapping.shape[0]} slots for {key.shape[0]} tokens of {key.shape[1]} heads, "
            f"and a cache of {kv_cache.shape[1]}; give at most one slot a token, and equal heads"
        )
    check_scales(k_scale=k_scale, v_scale=v_scale)
    check_same_device(kv_cache, "kv_cache", key=key, value=value, slot_mapping=slot_mapping)
    if resolve_impl(impl, kv_cache.device) == "torch":
        reference.write_pages(key, value, kv_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale)
        return
    check_operands_for_kernels(key.shape[2], key=key, value=value)
    target = target_of(kv_cache.device)
    if slot_mapping.shape[0]:
        with on_device_of(kv_cache):
            WriteBatch(slot_mapping, key, kv_cache, target).write(
                key, value, kv_cache, k_scale=k_scale, v_scale=v_scale
            )


class WriteBatch:
    """The storing of one batch of tokens, prepared once for all layers."""

    def __init__(
        self,
        slot_mapping: torch.Tensor,
        key: torch.Tensor,
        kv_cache: torch.Tensor,
        target: Target,
    ) -> None:
        """Prepare a batch.

        Args:
            slot_mapping: as for :func:`write_pages`, checked.
            key, kv_cache: as there; only shapes and dtypes count.
            target: the device that the kernel runs on.
        """
        from swa_backend.kernels.cache_write import WriteLaunch

        _, num_heads, head_dim = key.shape
        mantissa = _MANTISSA_BITS.get(kv_cache.dtype, 0)
        self._num_slots = slot_mapping.shape[0]
        self._is_fp8 = mantissa > 0
        self._launch = WriteLaunch(
            slot_mapping, num_heads, head_dim, kv_cache.shape[2], mantissa, target
        )

    def write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        *,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> None:
        """Store the keys and values of a layer; launches on the current device.

        The tensors are those of :func:`write_pages`, which the caller has checked. Here only their
        number of tokens is.

        Raises:
            ValueError: there are fewer tokens than slots.
        """
        num_tokens = min(key.shape[0], value.shape[0])
        if num_tokens < self._num_slots:
            raise ValueError(f"got {num_tokens} tokens for {self._num_slots} slots")
        self._launch(
            key,
            value,
            kv_cache.view(torch.uint8) if self._is_fp8 else kv_cache,
            k_scale=k_scale,
            v_scale=v_scale,
        )
