"""Few cases that meet every pair of values of every two dimensions."""

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any


def pairwise(*dimensions: Iterable[Any]) -> list[tuple[Any, ...]]:
    """From the full product, greedily, the case that meets most pairs not met before."""
    cases = list(product(*map(list, dimensions)))
    missing = set[tuple[int, Any, int, Any]]().union(*map(_pairs, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(_pairs(case) & missing))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _pairs(case: tuple[Any, ...]) -> set[tuple[int, Any, int, Any]]:
    return {(a, x, b, y) for (a, x), (b, y) in combinations(enumerate(case), 2)}
