"""The choice of an operation's implementation, and the kernels' view of a cache."""

import torch

from swa_backend.kernels.plans import NumberFormat, Target

IMPLEMENTATIONS = ("auto", "triton", "torch")
FORMATS = {
    torch.float32: NumberFormat.FLOAT32,
    torch.float16: NumberFormat.FLOAT16,
    torch.bfloat16: NumberFormat.BFLOAT16,
    torch.float8_e4m3fn: NumberFormat.E4M3,
    torch.float8_e5m2: NumberFormat.E5M2,
}
# An e4m3 element whose bits are shifted to fp16 is 1/256 of its value.
_SHIFTED_E4M3 = 256.0


def resolve_impl(impl: str, device: torch.device, others: tuple[str, ...] = ()) -> str:
    """Resolve ``impl`` to an implementation on ``device``; ``others`` are allowed too.

    Raises:
        ValueError: an unknown name.
    """
    allowed = (*IMPLEMENTATIONS, *others)
    if impl not in allowed:
        raise ValueError(f"impl must be one of {', '.join(allowed)}; got {impl!r}")
    if impl == "auto":
        return "triton" if device.type == "cuda" else "torch"
    return impl


def dispatched_cache_dtype(
    kv_dtype: torch.dtype, target: Target
) -> tuple[torch.dtype | None, float]:
    """Say as what the kernels read a cache: its dtype if not its own, and its elements' factor."""
    if kv_dtype == torch.float8_e4m3fn and not target.reads_e4m3:
        return torch.uint8, _SHIFTED_E4M3
    return None, 1.0
