"""The search: attention mass orders layers, halving compares candidates, loss corrects the order.

At the end the best candidate is tried with two windows. The search sees the choosing
requests alone.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from swa_vllm.tools.tune.candidates import Candidate, Layout, Objective, View
from swa_vllm.tools.tune.halving import rungs_of_halving, successive_halving
from swa_vllm.tools.tune.layouts import two_windows_to_try
from swa_vllm.tools.tune.paired import Rise
from swa_vllm.tools.tune.sizes import Sizer

Masses = Mapping[View, Sequence[float]]
_LAYOUTS_BY_LOSS = 2
_REQUESTS_BY_LOSS = 4


@dataclass(frozen=True)
class Goal:
    """What is looked for.

    Attributes:
        tolerance: greatest rise of the loss, in nats a token.
        num_held_out: requests that will report.
        limit: bytes of a request, within which the least loss is looked for.
    """

    objective: Objective
    tolerance: float
    num_held_out: int
    limit: int

    def allows(self, rise: Rise) -> bool:
        """Say whether the requests held out will probably confirm that it is tolerable."""
        return rise.expected_high(self.num_held_out) <= self.tolerance


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        order: candidates to serve, the best first; empty where none is tolerable.
        rises: of every candidate that was measured on all requests.
    """

    order: tuple[Candidate, ...]
    rises: dict[Candidate, Rise]


class Measure(Protocol):
    """Compares a candidate with full attention on the first so many choosing requests."""

    def __call__(self, candidate: Candidate, num_requests: int, /) -> Rise: ...


@dataclass(frozen=True)
class Clock:
    """The time by which to have chosen, and the seconds that measurements take.

    Attributes:
        deadline: of ``time.monotonic``.
    """

    deadline: float
    start_s: float
    request_s: float

    def left_s(self) -> float:
        """Count the seconds that are left."""
        return self.deadline - time.monotonic()

    def cost_s(self, rungs: Iterable[tuple[int, int]]) -> float:
        """Estimate what so many candidates on so many requests take, rung by rung."""
        seen, total = 0, 0.0
        for num_candidates, num_requests in rungs:
            total += num_candidates * (self.start_s + (num_requests - seen) * self.request_s)
            seen = num_requests
        return total


def find_window(
    layouts: Sequence[Layout],
    masses: Masses,
    sizer: Sizer,
    num_requests: int,
    measure: Measure,
    goal: Goal,
    clock: Clock,
) -> Found:
    """Search among the layouts, with the layers full that hold the most mass.

    Raises:
        ValueError: there is time for no candidate.
    """
    candidates = candidates_by_mass(layouts, masses)
    while (
        candidates
        and clock.cost_s(rungs_of_halving(len(candidates), num_requests)) > clock.left_s()
    ):
        candidates = candidates[:-1]
    if not candidates:
        one = clock.cost_s([(1, num_requests)])
        raise ValueError(
            f"--time leaves {max(0, clock.left_s()):.0f} s to choose in, and one candidate takes "
            f"{one:.0f} s: give more time, or fewer or shorter --requests"
        )

    def rank(rises: Mapping[Candidate, Rise]) -> list[Candidate]:
        return rank_candidates(rises, sizer, goal)

    rises = successive_halving(candidates, num_requests, measure, rank)
    by_loss = candidates_by_loss(list(rises), masses, num_requests, measure, clock)
    rises |= {c: measure(c, num_requests) for c in by_loss}
    best = next(iter(_tolerable(rises, sizer, goal)), min(rises, key=lambda c: rises[c].mean))
    pairs = candidates_of_two_windows(best, masses, sizer, goal)
    if pairs and clock.cost_s(rungs_of_halving(len(pairs), num_requests)) < clock.left_s():
        rises |= successive_halving(pairs, num_requests, measure, rank)
    return Found(tuple(_tolerable(rises, sizer, goal)), rises)


def candidates_by_mass(layouts: Sequence[Layout], masses: Masses) -> list[Candidate]:
    """Keep the layers full whose attention a window hides most; least mass hidden first."""
    hidden = dict[Candidate, float]()
    for layout in layouts:
        mass = masses[layout.view]
        order = _most_first(mass)
        left = order[layout.num_full :]
        hidden[layout.with_full_layers(order)] = sum(mass[layer] for layer in left)
    return sorted(hidden, key=lambda candidate: hidden[candidate])


def candidates_of_two_windows(
    best: Candidate, masses: Masses, sizer: Sizer, goal: Goal
) -> list[Candidate]:
    """Propose two windows for the layers that slide: the wider one where more mass is hidden.

    For the least loss the wider one takes what the narrower leaves of the budget; otherwise some
    layers get a narrower window, which gains more.
    """
    limit = goal.limit if goal.objective is Objective.LOSS else None
    longest = sizer.longest(best.phase) - best.sinks
    return two_windows_to_try(sizer, best, _most_first(masses[best.view]), longest, limit)


def _most_first(mass: Sequence[float]) -> list[int]:
    return sorted(range(len(mass)), key=lambda layer: -mass[layer])


def candidates_by_loss(
    found: Sequence[Candidate],
    masses: Masses,
    num_requests: int,
    measure: Measure,
    clock: Clock,
) -> list[Candidate]:
    """Propose other full layers for the best candidates: by what each layer saves alone.

    Mass says what a layer looks at and not what it needs. So with the window of the best candidate
    each layer is kept full alone, which orders layers by loss; and both orders are taken together.
    Nothing is proposed where there is no time for it.
    """
    mixed = [candidate for candidate in found if candidate.full_layers][:_LAYOUTS_BY_LOSS]
    if not mixed:
        return []
    best = mixed[0]
    mass = masses[best.view]
    layers, seen = range(len(mass)), min(_REQUESTS_BY_LOSS, num_requests)
    if clock.cost_s([(len(mass), seen), (2 * len(mixed), num_requests)]) > clock.left_s():
        return []
    alone = {layer: measure(replace(best, full_layers=(layer,)), seen).mean for layer in layers}
    by_loss = sorted(layers, key=lambda layer: alone[layer])
    by_mass = _most_first(mass)
    by_both = sorted(layers, key=lambda layer: by_loss.index(layer) + by_mass.index(layer))
    proposed = [
        Layout(*c.view[:2], len(c.full_layers), c.phase).with_full_layers(order)
        for c in mixed
        for order in (by_loss, by_both)
    ]
    return [candidate for candidate in dict.fromkeys(proposed) if candidate not in found]


def rank_candidates(rises: Mapping[Candidate, Rise], sizer: Sizer, goal: Goal) -> list[Candidate]:
    """Order candidates for the next rung, the best first.

    By gain, those that seem tolerable first, and by loss take turns: few requests make many seem
    tolerable that are not, and the safe ones must be there when more requests show it.
    """
    by_loss = sorted(rises, key=lambda candidate: rises[candidate].mean)
    if goal.objective is Objective.LOSS:
        return by_loss

    def excess_and_cost(candidate: Candidate) -> tuple[float, float]:
        excess = max(0.0, rises[candidate].mean - goal.tolerance)
        return excess, sizer.gain(candidate).cost(goal.objective)

    by_gain = sorted(rises, key=excess_and_cost)
    turns = (c for pair in zip(by_gain, by_loss, strict=True) for c in pair)
    return list(dict.fromkeys(turns))


def _tolerable(rises: Mapping[Candidate, Rise], sizer: Sizer, goal: Goal) -> list[Candidate]:
    by_loss = sorted(rises, key=lambda candidate: rises[candidate].mean)
    if goal.objective is Objective.LOSS:
        return by_loss
    allowed = [candidate for candidate in by_loss if goal.allows(rises[candidate])]
    if goal.objective is Objective.THROUGHPUT:
        return sorted(allowed, key=lambda candidate: -(sizer.running(candidate) or 0.0))
    return sorted(allowed, key=lambda candidate: sizer.gain(candidate).cost(goal.objective))
