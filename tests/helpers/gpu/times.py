"""A step: times of attention beside vLLM's two backends, each case recorded as it is measured.

``python -m tests.helpers.gpu.times [--dry-run]``
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from swa_backend.verify.aot import triton_modules
from swa_vllm.tools.bench.attention.arms import KERNEL_ARMS, OURS, Call
from swa_vllm.tools.bench.attention.stock_kernel import real_triton_for_stock_kernel
from swa_vllm.tools.bench.attention.times import (
    AttentionCase,
    Clock,
    copy_bandwidth,
    make_kernel_batch,
    time_kernel_arms,
)
from tests.helpers.gpu.lines import end_not_run, record

# FlashInfer and xformers are left out: they may compile for minutes.
_RIVALS = ("FLASH_ATTN", "TRITON_ATTN")
_DECODE = AttentionCase(1024, 8192, 1, torch.bfloat16)
_CHUNK = replace(_DECODE, num_queries=8192)
_CASES = (
    _DECODE,
    replace(_DECODE, seq_len=131072),
    _CHUNK,
    replace(_CHUNK, seq_len=16384),
    replace(_DECODE, batch=64),
    replace(_DECODE, kv_dtype=torch.float8_e4m3fn),
    replace(_DECODE, batch=64, kv_dtype=torch.float8_e4m3fn),
    replace(_DECODE, seq_len=131072, window=4096),
)
_TINY = AttentionCase(64, 150, 2, torch.float16, num_kv_heads=1, group=2, dtype=torch.float16)


def measure_cases(
    cases: Sequence[AttentionCase], device: torch.device, clock: Clock, num_bytes: int
) -> list[str]:
    """Record microseconds of each case, after its output was compared with the oracle's.

    Returns:
        Why a rival was not timed, without those that have no such cache.
    """
    record(copy_gb_per_s=copy_bandwidth(device, clock, num_bytes))
    arms = {name: KERNEL_ARMS[name] for name in (OURS, *_RIVALS)}
    refused = set[str]()
    for case in cases:
        result = time_kernel_arms(case, make_kernel_batch(case, device, num_bytes), arms, clock)
        record(
            case={k: str(v) if "dtype" in k else v for k, v in vars(case).items()},
            us=result.times,
            not_timed=result.refused,
        )
        if case.kv_dtype == case.dtype:
            refused |= {f"{name} not timed: {why}" for name, why in result.refused.items()}
    return sorted(refused)


def _stopped(calls: Sequence[Call]) -> float:
    """Call each and measure nothing."""
    for call in calls:
        call()
    return 1.0


def main(arguments: list[str]) -> None:
    """Measure on the GPU, or run tiny cases in Triton's interpreter."""
    if "--dry-run" in arguments:
        tiny = (_TINY, replace(_TINY, num_queries=70))
        with real_triton_for_stock_kernel(triton_modules()):
            refused = measure_cases(tiny, torch.device("cpu"), _stopped, 1 << 16)
        print(*refused, sep="\n")
        return
    from swa_backend.verify.timing import median_us

    refused = measure_cases(_CASES, torch.device("cuda"), median_us, 512 << 20)
    if refused:
        end_not_run("; ".join(refused))


if __name__ == "__main__":
    main(sys.argv[1:])
