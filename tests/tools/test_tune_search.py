"""The search of `swa tune`, without engines: bytes are the real pool's, losses made up or real."""

import math
import time
from collections.abc import Mapping, Sequence
from functools import cache

import pytest
import torch
from transformers import Qwen3ForCausalLM

from swa_vllm.tools.common.pools import Model
from swa_vllm.tools.common.queueing import Workload
from swa_vllm.tools.common.sizing import Device, Limits
from swa_vllm.tools.tune.candidates import FULL, Candidate, Layout, Objective
from swa_vllm.tools.tune.layouts import layouts_to_try
from swa_vllm.tools.tune.paired import Rise, rise_of_loss
from swa_vllm.tools.tune.requests import Request, split_requests
from swa_vllm.tools.tune.search import (
    Clock,
    Found,
    Goal,
    Masses,
    candidates_by_mass,
    find_window,
    rank_candidates,
)
from swa_vllm.tools.tune.sizes import Shape, Sizer
from tests.helpers.trained_models import NUM_LAYERS as TRAINED_LAYERS
from tests.helpers.trained_models import SLIDING, TRAINED_WINDOW, text_tokens

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
    windows = enumerate(candidate.windows(NUM_LAYERS))
    mean = sum(COSTS[layer] * 128 / window for layer, window in windows if window)
    return Rise(mean, 0.002 / math.sqrt(num_requests), num_requests)


def search(
    objective: Objective,
    *,
    budget: float = 0.6,
    tolerance: float = 0.5,
    seconds: float = 1e6,
    asked: list[tuple[Candidate, int]] | None = None,
    mass: Sequence[float] = MASS,
) -> Found:
    sizer = sizer_of()
    limit = int(budget * sizer.gain(FULL).num_bytes)
    layouts = layouts_to_try(sizer, (0,), 767, limit, by_loss=objective is Objective.LOSS)

    def measure(candidate: Candidate, num_requests: int) -> Rise:
        if asked is not None:
            asked.append((candidate, num_requests))
        return rise_of(candidate, num_requests)

    masses = {layout.view: mass for layout in layouts}
    goal = Goal(objective, tolerance, NUM_REQUESTS, limit)
    clock = Clock(time.monotonic() + seconds, start_s=4, request_s=1)
    return find_window(layouts, masses, sizer, NUM_REQUESTS, measure, goal, clock)


def test_layers_that_lose_most_attention_stay_full() -> None:
    more, fewer = candidates_by_mass(
        [Layout(128, 0, 2), Layout(128, 0, 3)], {Layout(128, 0, 0).view: MASS}
    )
    assert (more.full_layers, fewer.full_layers) == ((1, 3, 7), (3, 7))


def test_loss_corrects_what_attention_mass_says() -> None:
    """By mass layer 7 comes first, and it is not needed."""
    found = search(Objective.LOSS)
    best = found.order[0]
    assert {0, 3} <= {*best.full_layers}
    mean = found.rises[best].mean
    layout = Layout(best.window or 0, 0, len(best.full_layers))
    by_mass = candidates_by_mass([layout], {layout.view: MASS})
    assert mean < rise_of(by_mass[0], 8).mean
    assert mean == min(rise.mean for rise in found.rises.values())


@pytest.mark.parametrize("budget", [0.2, 0.25, 0.3])
def test_two_windows_are_found_where_layers_need_unlike_much(budget: float) -> None:
    """Layers 0 and 3 cost most: the wider window of the two is theirs, within the same bytes."""
    sizer = sizer_of()
    found = search(Objective.LOSS, budget=budget, mass=(0.4, *MASS[1:]))
    pairs = [candidate for candidate in found.rises if candidate.by_layer]
    assert pairs
    limit = budget * sizer.gain(FULL).num_bytes
    assert all(sizer.num_bytes(pair) <= limit for pair in pairs)
    best = found.order[0]
    assert best in pairs
    windows = best.windows(NUM_LAYERS)
    assert all(windows[layer] in (best.window, None) for layer in (0, 3))
    one = min(found.rises[c].mean for c in found.rises if not c.by_layer)
    assert found.rises[best].mean < one


def test_two_windows_gain_where_bytes_are_what_is_asked_for() -> None:
    sizer = sizer_of()
    found = search(Objective.MEMORY, budget=0.999, tolerance=0.03)
    pairs = [candidate for candidate in found.rises if candidate.by_layer]
    assert pairs
    ones = [c for c in found.order if not c.by_layer]
    least = min(sizer.num_bytes(one) for one in ones)
    assert any(sizer.num_bytes(pair) < least for pair in pairs)


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
    ranked = rank_candidates(rises, sizer_of(), Goal(Objective.MEMORY, 0.02, 8, 0))
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


# Requests to the checkpoint whose layers were all trained with a window of 64 tokens. In its full
# layers attention is what it never learned, so each of them costs, at whatever budget.
PROMPT, ANSWER, NUM_TEXTS = 192, 128, 12
TEXT_LEN = PROMPT + ANSWER


def trained_requests() -> list[Request]:
    tokens = text_tokens()
    return [
        Request(line, tuple(tokens[first : first + PROMPT]), tuple(tokens[first + PROMPT : end]))
        for line in range(NUM_TEXTS)
        for first, end in [(line * TEXT_LEN, (line + 1) * TEXT_LEN)]
    ]


def trained_model(candidate: Candidate) -> Qwen3ForCausalLM:
    full = range(TRAINED_LAYERS) if candidate.window is None else candidate.full_layers
    kinds = {True: "full_attention", False: "sliding_attention"}
    return Qwen3ForCausalLM.from_pretrained(
        SLIDING,
        dtype=torch.float32,
        attn_implementation="eager",
        layer_types=[kinds[layer in full] for layer in range(TRAINED_LAYERS)],
        sliding_window=candidate.window or TEXT_LEN,
    ).eval()


@cache
@torch.inference_mode()
def trained_losses(candidate: Candidate) -> list[float]:
    """Losses of all answers, by Hugging Face."""
    tokens = torch.tensor([request.tokens for request in trained_requests()])
    logits = trained_model(candidate)(tokens, use_cache=False).logits[:, PROMPT - 1 : -1]
    losses = logits.log_softmax(-1).gather(2, tokens[:, PROMPT:, None])
    return [-float(each) for each in losses.double().sum((1, 2))]


@cache
@torch.inference_mode()
def trained_masses(windows: Sequence[int]) -> Masses:
    tokens = torch.tensor([request.tokens for request in trained_requests()[:2]])
    weights = trained_model(FULL)(tokens, output_attentions=True).attentions
    back = torch.arange(TEXT_LEN)[:, None] - torch.arange(TEXT_LEN)
    return {
        Layout(w, 0, 0).view: [float((layer * (back >= w)).mean()) for layer in weights]
        for w in windows
    }


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("budget", [0.4, 0.6, 0.7, 0.9])
def test_window_of_training_is_found_at_every_budget_that_it_fits(budget: float, seed: int) -> None:
    """Within one step of the grid of windows: 48, 64, 96; also where layers could stay full."""
    model = Model((None,) * TRAINED_LAYERS, 0, kv_heads=2, head_dim=64, number_bytes=4)
    limits = Limits(32, TEXT_LEN, 8192, 256, 1)
    sizer = Sizer(model, Shape(1, 4), limits, Workload(PROMPT, ANSWER), Device.CPU)
    limit = int(budget * sizer.gain(FULL).num_bytes)
    assert sizer.num_bytes(Candidate(TRAINED_WINDOW)) <= limit
    layouts = layouts_to_try(sizer, (0,), TEXT_LEN, limit, by_loss=True)
    assert any(layout.num_full for layout in layouts)
    split = split_requests(trained_requests(), seed)

    def measure(candidate: Candidate, num_requests: int) -> Rise:
        lines = [request.line for request in split.choosing[:num_requests]]
        ours, full = ([trained_losses(each)[line] for line in lines] for each in (candidate, FULL))
        return rise_of_loss(ours, full, [ANSWER] * num_requests)

    found = find_window(
        layouts,
        trained_masses(tuple(sorted({layout.window for layout in layouts}))),
        sizer,
        len(split.choosing),
        measure,
        Goal(Objective.LOSS, 0.02, len(split.held_out), limit),
        Clock(time.monotonic() + 1e6, start_s=0, request_s=0),
    )
    best = found.order[0]
    assert best.window in (48, 64, 96)
    assert best.full_layers == ()
    assert found.rises[best].high < 0
