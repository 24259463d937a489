"""Few cases that meet every pair of values of every two dimensions."""

from collections.abc import Callable, Iterable
from itertools import combinations, product
from typing import Any

Case = tuple[Any, ...]


def pairwise(
    *dimensions: Iterable[Any], allowed: Callable[[Case], bool] = lambda case: True
) -> list[Case]:
    """From the full product, greedily, the case that meets most pairs not met before.

    Args:
        allowed: which cases there may be; pairs that are in none of them are not met.
    """
    pairs = {case: _pairs(case) for case in product(*map(list, dimensions)) if allowed(case)}
    missing = set[tuple[int, Any, int, Any]]().union(*pairs.values())
    chosen = []
    while missing:
        best = max(pairs, key=lambda case: len(pairs[case] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return chosen


def _pairs(case: Case) -> set[tuple[int, Any, int, Any]]:
    return {(a, x, b, y) for (a, x), (b, y) in combinations(enumerate(case), 2)}
