"""Times of GPU work, without the host's part."""

from collections.abc import Callable, Sequence
from typing import Any

import triton.testing


def median_us(calls: Sequence[Callable[[], Any]]) -> float:
    """Microseconds of one call: the median over replays of a CUDA graph that holds all of them.

    Calls that work on different memory, more of it than the L2 cache holds, find it cold.
    """

    def run() -> None:
        for call in calls:
            call()

    return (
        1e3
        * float(triton.testing.do_bench_cudagraph(run, rep=100, return_mode="median"))
        / len(calls)
    )
