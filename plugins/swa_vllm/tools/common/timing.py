"""Times of alternatives, taken in turns so that a noisy machine is noisy for all of them."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from swa_vllm.tools.common.spread import Spread


def time_in_turns(
    alternatives: Mapping[str, Callable[[], Any]], num_rounds: int, num_warm_up: int = 2
) -> dict[str, Spread]:
    """Call every alternative once a round, ``num_rounds`` times, and time each call.

    Returns:
        Seconds of a call by alternative: the median, and the middle half of all calls.
    """
    taken: dict[str, list[float]] = {name: [] for name in alternatives}
    for index in range(num_warm_up + num_rounds):
        for name, call in alternatives.items():
            start = time.perf_counter()
            call()
            if index >= num_warm_up:
                taken[name].append(time.perf_counter() - start)
    return {name: Spread.of_middle_half(seconds) for name, seconds in taken.items()}


def at_least_two_rounds(rounds: int) -> int:
    """Check a number of rounds, as a spread needs two.

    Raises:
        ValueError: it is less than two.
    """
    if rounds < 2:
        raise ValueError(f"--rounds must be at least 2, got {rounds}")
    return rounds
