"""Successive halving: many candidates on few requests, few candidates on all of them."""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import TypeVar

Candidate = TypeVar("Candidate")
Score = TypeVar("Score")
FIRST_REQUESTS = 2  # the fewest whose differences say anything
FEWEST_LEFT = 4  # candidates on all requests


def rungs_of_halving(num_candidates: int, num_requests: int) -> list[tuple[int, int]]:
    """Plan the rungs: how many candidates are measured, and on how many requests.

    Twice as many requests a rung, half of the candidates; a few are measured on all at once.
    """
    rungs, seen = list[tuple[int, int]](), min(FIRST_REQUESTS, num_requests)
    while True:
        if num_candidates <= FEWEST_LEFT:
            seen = num_requests
        rungs.append((num_candidates, seen))
        if seen == num_requests:
            return rungs
        num_candidates = min(num_candidates, max(ceil(num_candidates / 2), FEWEST_LEFT))
        seen = min(2 * seen, num_requests)


def successive_halving(
    candidates: Sequence[Candidate],
    num_requests: int,
    measure: Callable[[Candidate, int], Score],
    rank: Callable[[Mapping[Candidate, Score]], Sequence[Candidate]],
) -> dict[Candidate, Score]:
    """Find the best candidates (Karnin, Koren and Somekh, 2013).

    Args:
        measure: scores a candidate on so many of the requests, always the first ones.
        rank: orders all candidates of a rung, the best first.

    Returns:
        Scores on all requests of those that were left, the best first.
    """
    left = list(candidates)
    scores = dict[Candidate, Score]()
    for num_left, seen in rungs_of_halving(len(left), num_requests):
        left = left[:num_left]
        scores = {candidate: measure(candidate, seen) for candidate in left}
        left = list(rank(scores))
    return {candidate: scores[candidate] for candidate in left}
