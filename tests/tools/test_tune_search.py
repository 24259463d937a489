"""The search of `swa tune`, without engines: losses are made up, bytes are the real pool's."""

import math
import time
from collections.abc import Mapping

import pytest

from swa_vllm.tools.common.pools import Model
from swa_vllm.tools.common.queueing import Workload
from swa_vllm.tools.common.sizing import Device, Limits
from swa_vllm.tools.tune.candidates import (
    FULL,
    Candidate,
    Objective,
    Shape,
    Sizer,
    layouts_to_try,
)
from swa_vllm.tools.tune.paired import Rise
from swa_vllm.tools.tune.search import (
    Clock,
    Found,
    Goal,
    candidates_by_mass,
    find_window,
    rank_candidates,
)

NUM_LAYERS, NUM_REQUESTS = 8, 8
# What a layer costs when it slides, and the mass that a window hides of it: layer 7 looks back far
# for nothing, layer 0 needs the little that it looks at.
COSTS = (0.05, 0.001, 0.001, 0.03, 0.001, 0.001, 0.001, 0.001)
MASS = (0.04, 0.05, 0.05, 0.4, 0.05, 0.05, 0.05, 0.5)
LIMITS = Limits(32, 800, 8192, 256, 1)


def sizer_of() -> Sizer:
    model = Model((None,) * NUM_LAYERS, 0, kv_heads=3, head_dim=128, number_bytes=4)
    return Sizer(model, Shape(3_000_000, 9), LIMITS, Workload(512, 255), Device.CPU)


def rise_of(candidate: Candidate, num_requests: int) -> Rise:
    """Layers add up; a window of 128 costs what the table says, one of 512 a quarter."""
    assert candidate.window is not None
    sliding = set(range(NUM_LAYERS)) - set(candidate.full_layers)
    mean = sum(COSTS[layer] for layer in sliding) * 128 / candidate.window
    return Rise(mean, 0.002 / math.sqrt(num_requests), num_requests)


def search(
    objective: Objective,
    *,
    budget: float = 0.6,
    tolerance: float = 0.5,
    seconds: float = 1e6,
    asked: list[tuple[Candidate, int]] | None = None,
) -> Found:
    sizer = sizer_of()
    limit = int(budget * sizer.gain(FULL).num_bytes)
    layouts = layouts_to_try(sizer, (0,), 767, limit, by_loss=objective is Objective.LOSS)

    def measure(candidate: Candidate, num_requests: int) -> Rise:
        if asked is not None:
            asked.append((candidate, num_requests))
        return rise_of(candidate, num_requests)

    masses = {layout[:2]: MASS for layout in layouts}
    goal = Goal(objective, tolerance, NUM_REQUESTS)
    clock = Clock(time.monotonic() + seconds, start_s=4, request_s=1)
    return find_window(layouts, masses, sizer, NUM_REQUESTS, measure, goal, clock)


def test_layers_that_lose_most_attention_stay_full() -> None:
    more, fewer = candidates_by_mass([(128, 0, 2), (128, 0, 3)], {(128, 0): MASS})
    assert (more.full_layers, fewer.full_layers) == ((1, 3, 7), (3, 7))


def test_loss_corrects_what_attention_mass_says() -> None:
    """By mass layer 7 comes first, and it is not needed."""
    found = search(Objective.LOSS)
    best = found.order[0]
    assert {0, 3} <= {*best.full_layers}
    mean = found.rises[best].mean
    by_mass = candidates_by_mass(
        [(best.window or 0, 0, len(best.full_layers))], {(best.window or 0, 0): MASS}
    )
    assert mean < rise_of(by_mass[0], 8).mean
    assert mean == min(rise.mean for rise in found.rises.values())


def test_all_finalists_are_measured_on_all_requests() -> None:
    asked = list[tuple[Candidate, int]]()
    found = search(Objective.LOSS, asked=asked)
    assert {(candidate, NUM_REQUESTS) for candidate in found.rises} <= {*asked}
    assert all(rise.num_requests == NUM_REQUESTS for rise in found.rises.values())


def test_objective_chooses_among_the_tolerable() -> None:
    sizer = sizer_of()
    for objective in (Objective.MEMORY, Objective.THROUGHPUT, Objective.TTFT):
        found = search(objective, budget=0.999, tolerance=0.02)
        costs = [sizer.gain(candidate).cost(objective) for candidate in found.order]
        if objective is Objective.THROUGHPUT:
            costs = [-(sizer.running(candidate) or 0.0) for candidate in found.order]
        assert costs == sorted(costs)
        highs = [found.rises[candidate].expected_high(NUM_REQUESTS) for candidate in found.order]
        assert found.order
        assert max(highs) <= 0.02
    loose = search(Objective.MEMORY, budget=0.999, tolerance=0.1)
    tight = search(Objective.MEMORY, budget=0.999, tolerance=0.02)
    gains = [sizer.gain(each.order[0]).num_bytes for each in (loose, tight)]
    assert gains[0] < gains[1]


def test_nothing_tolerable_is_nothing_found() -> None:
    assert search(Objective.MEMORY, tolerance=0.0).order == ()


def test_safe_candidates_stay_beside_cheap_ones() -> None:
    rises: Mapping[Candidate, Rise] = {
        Candidate(window): Rise(mean, 0.01, 2)
        for window, mean in ((32, 0.019), (64, 0.018), (128, 0.015), (256, 0.001))
    }
    ranked = rank_candidates(rises, sizer_of(), Goal(Objective.MEMORY, 0.02, 8))
    assert {candidate.window for candidate in ranked[:2]} == {32, 256}
    assert {*ranked} == {*rises}


def test_little_time_is_spent_on_what_loses_least_mass() -> None:
    """The clock of this test stands still while a candidate is measured."""
    asked: dict[int, list[tuple[Candidate, int]]] = {seconds: [] for seconds in (30, 10**6)}
    for seconds in asked:
        search(Objective.LOSS, seconds=seconds, asked=asked[seconds])
    few, all_of_them = (dict.fromkeys(c for c, _ in each) for each in asked.values())
    assert list(few) == list(all_of_them)[: len(few)]
    assert len(few) == 2  # of 12 s each


def test_no_time_for_a_candidate_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"leaves 10 s to choose in, and one candidate takes 12 s"):
        search(Objective.LOSS, seconds=10.5)
