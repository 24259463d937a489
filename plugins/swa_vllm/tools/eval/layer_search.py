"""Choosing the layers that slide within a budget of bytes, at the least cost in perplexity."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from swa_vllm.tools.common.progress import progress_bar
from swa_vllm.tools.engines.perplexity import Measured

Layers = frozenset[int]
Measure = Callable[[Layers], Measured]


@dataclass(frozen=True)
class Search:
    """The layers that should slide, and how they were found.

    Attributes:
        costs: relative growth of the perplexity where one layer slides alone, by layer.
        order: layers, the cheapest first.
        plan: layers that slide.
    """

    costs: dict[int, float]
    order: tuple[int, ...]
    plan: Layers


@dataclass
class Trials:
    """Measurements of engines in which some layers slide, each made once."""

    measure: Measure
    made: dict[Layers, Measured] = field(default_factory=dict)

    def __call__(self, sliding: Iterable[int]) -> Measured:
        layers = frozenset(sliding)
        if layers not in self.made:
            self.made[layers] = self.measure(layers)
        return self.made[layers]

    def costs(self, sliding: Layers, others: Iterable[int]) -> dict[int, float]:
        """Measure how much the perplexity grows where one more of ``others`` slides, by layer."""
        before = self(sliding).perplexity
        return {
            layer: self(sliding | {layer}).perplexity / before - 1
            for layer in progress_bar(sorted(others), "layers")
        }


def find_sliding_layers(trials: Trials, num_layers: int, budget: float, rounds: int) -> Search:
    """Choose the layers that slide, within a part ``budget`` of full attention's bytes.

    Raises:
        ValueError: a request takes more although all layers slide.
    """
    every = Layers(range(num_layers))
    full, least = trials(Layers()), trials(every)
    limit = budget * full.pool_bytes
    if least.pool_bytes > limit:
        raise ValueError(
            f"with all layers sliding a request takes {least.pool_bytes / full.pool_bytes:.3f} of "
            f"full attention's bytes, more than --budget {budget}: take longer pieces (--length), "
            "a smaller window or smaller pages (--block-size)"
        )
    costs = trials.costs(Layers(), every)
    order = sorted(costs, key=lambda layer: costs[layer])
    # Without padding so many would do; padding only adds.
    saved = (full.pool_bytes - limit) / (full.pool_bytes - least.pool_bytes)
    count = math.ceil(num_layers * saved)
    while trials(order[:count]).pool_bytes > limit:
        count += 1
    plans = Layers(order[:count]), _slide_greedily(trials, costs, count, rounds)
    return Search(costs, tuple(order), min(plans, key=lambda plan: trials(plan).perplexity))


def _slide_greedily(trials: Trials, costs: dict[int, float], count: int, rounds: int) -> Layers:
    sliding = Layers()
    for done in range(1, rounds + 1):
        if sliding:
            costs = trials.costs(sliding, set(costs) - sliding)
        left = sorted(costs, key=lambda layer: costs[layer])
        sliding |= Layers(left[: math.ceil(count * done / rounds) - len(sliding)])
        if len(sliding) == count:
            return sliding
    return sliding


def trials_in_order(trials: Trials, search: Search) -> dict[Layers, Measured]:
    """Pick the trials of the plan, and of layers that slide in the order of their costs."""
    in_order = {Layers(search.order[:count]) for count in range(len(search.order) + 1)}
    return {s: m for s, m in trials.made.items() if s in in_order or s == search.plan}
