"""Measurement of GPU time without the host's part."""

from collections.abc import Callable, Sequence
from typing import Any

import triton.testing


def median_us(calls: Sequence[Callable[[], Any]]) -> float:
    """Measure a call in microseconds: the median over replays of a CUDA graph that holds all calls.

    Calls that work on different memory, more of it than the L2 cache holds, find that cache cold.
    """

    def run() -> None:
        for call in calls:
            call()

    return (
        1e3
        * float(triton.testing.do_bench_cudagraph(run, rep=100, return_mode="median"))
        / len(calls)
    )
