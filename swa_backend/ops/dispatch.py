"""The choice of an operation's implementation, and the kernels' view of a cache."""

import torch

from swa_backend.kernels.device import target_of
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


def resolve(impl: str, device: torch.device, others: tuple[str, ...] = ()) -> str:
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


def readable(kv_cache: torch.Tensor) -> tuple[torch.Tensor, float, Target]:
    """Give the cache as its device's kernels read it, the factor of its elements, and the target.

    Raises:
        ValueError: no kernel runs there.
    """
    target = target_of(kv_cache.device)
    if kv_cache.dtype == torch.float8_e4m3fn and not target.reads_e4m3:
        return kv_cache.view(torch.uint8), _SHIFTED_E4M3, target
    return kv_cache, 1.0, target
