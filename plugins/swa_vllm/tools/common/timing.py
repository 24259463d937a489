"""Times of alternatives, taken in turns so that a noisy machine is noisy for all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Times:
    """Seconds a call took: median, and the middle half of all calls."""

    median: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return dict(vars(self))


def interleave(
    alternatives: Mapping[str, Callable[[], Any]], num_rounds: int, num_warm_up: int = 2
) -> dict[str, Times]:
    """Call every alternative once a round, ``num_rounds`` times, and time each call."""
    taken: dict[str, list[float]] = {name: [] for name in alternatives}
    for index in range(num_warm_up + num_rounds):
        for name, call in alternatives.items():
            start = time.perf_counter()
            call()
            if index >= num_warm_up:
                taken[name].append(time.perf_counter() - start)
    return {name: _times(seconds) for name, seconds in taken.items()}


def _times(seconds: list[float]) -> Times:
    low, median, high = statistics.quantiles(seconds, n=4)
    return Times(median, low, high)


def milliseconds(times: Times) -> str:
    """Median, and the middle half in brackets."""
    return f"{1e3 * times.median:.2f} ({1e3 * times.low:.2f} - {1e3 * times.high:.2f})"


def at_least_two_rounds(rounds: int) -> int:
    """``rounds``, checked: a spread needs two."""
    if rounds < 2:
        raise ValueError(f"--rounds must be at least 2, got {rounds}")
    return rounds
