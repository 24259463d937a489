"""Which layers can slide, so that a request takes a part of full attention's pool bytes.

Bytes are those that a request holds which decodes behind a piece of --length tokens, with vLLM's KV
groups and their padding: how layers are grouped depends on how many slide, so some counts waste
more than others. The first --pieces of the text choose the layers, the rest is held out. Each
layer is slid alone first; then, in --rounds, those that cost least slide, and what is left is tried
again beside them. Every trial is an engine of its own.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swa_vllm.tools.common import plots
from swa_vllm.tools.common.arguments import check_numbers
from swa_vllm.tools.common.table import format_table
from swa_vllm.tools.engines.scoring import (
    FULL_ATTENTION,
    NUM_EXTRA_TOKENS,
    Served,
    add_setup_arguments,
    check_options,
    setup_of,
    text_config,
)
from swa_vllm.tools.eval.ppl import Measured, measure
from swa_vllm.tools.eval.texts import cut, progress, tokens_of

EXAMPLE = "Qwen/Qwen3-0.6B --text book.txt --budget 0.5 --window 1024 --sinks 4"
Layers = frozenset[int]
Measure = Callable[[Layers], Measured]


@dataclass(frozen=True)
class Search:
    """What was found.

    Attributes:
        costs: of sliding each layer alone: relative growth of the perplexity.
        order: layers, the cheapest first.
        plan: layers that slide.
    """

    costs: dict[int, float]
    order: tuple[int, ...]
    plan: Layers


@dataclass
class Trials:
    """Measurements, each made once."""

    measure: Measure
    made: dict[Layers, Measured] = field(default_factory=dict)

    def __call__(self, sliding: Iterable[int]) -> Measured:
        layers = frozenset(sliding)
        if layers not in self.made:
            self.made[layers] = self.measure(layers)
        return self.made[layers]

    def costs(self, sliding: Layers, others: Iterable[int]) -> dict[int, float]:
        """Growth of the perplexity where one more layer slides, for each of the others."""
        before = self(sliding).perplexity
        return {
            layer: self(sliding | {layer}).perplexity / before - 1
            for layer in progress(sorted(others), "layers")
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add_setup_arguments(parser)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8")
    parser.add_argument("--budget", type=float, default=0.5, help="part of the bytes (0.5)")
    parser.add_argument("--window", type=int, default=1024, help="default: 1024")
    parser.add_argument("--sinks", type=int, default=4, help="default: 4")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a piece (4096)")
    parser.add_argument("--pieces", type=int, default=1, help="that choose layers (1)")
    parser.add_argument("--rounds", type=int, default=2, help="of choosing (2)")
    plots.add_argument(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print tables and the option to use; returns the figures."""
    plots.check(args.plot)
    hf_config = text_config(args.model)
    _check(args, hf_config)
    setup = setup_of(args, hf_config, args.length + NUM_EXTRA_TOKENS)
    chosen_on, checked = _texts(args)
    num_layers, on_held_out = hf_config.num_hidden_layers, dict[Layers, Measured]()

    def serve(sliding: Layers) -> Measured:
        full = num_layers - len(sliding)
        print(f"{len(sliding)} layers slide, {full} full ...", file=sys.stderr, flush=True)
        with Served.start(setup, options_of(args, sliding, num_layers)) as served:
            if len(sliding) in (0, num_layers):
                on_held_out[sliding] = measure(served, checked)
            return measure(served, chosen_on)

    trials = Trials(serve)
    search = find_plan(trials, num_layers, args.budget, 1 if args.quick else args.rounds)
    for quarter in () if args.quick else (1, 2, 3):
        trials(search.order[: num_layers * quarter // 4])
    options = options_of(args, search.plan, num_layers)
    if search.plan not in on_held_out:
        with Served.start(setup, options) as served:
            on_held_out[search.plan] = measure(served, checked)
    plans = {"full": Layers(), "plan": search.plan, "all slide": Layers(range(num_layers))}
    results = {name: on_held_out[plan] for name, plan in plans.items()}
    curve = curve_of(trials, search)
    _print(args, search, curve, results, {"swa": options})
    if args.plot:
        _plot(args.plot, curve, search.plan)
    return {
        "model": args.model,
        "budget": args.budget,
        "length": args.length,
        "costs": search.costs,
        "curve": [{"sliding": sorted(s), **vars(m)} for s, m in curve.items()],
        "held_out": {name: vars(measured) for name, measured in results.items()},
        "additional_config": {"swa": options},
    }


def _check(args: argparse.Namespace, hf_config: Any) -> None:
    if not 0 < args.budget < 1:
        raise ValueError(
            f"--budget is a part of full attention's pool bytes, between 0 and 1; got {args.budget}"
        )
    check_numbers(args, ("pieces", "rounds"))
    if args.window + args.sinks >= args.length:
        raise ValueError(
            f"a window of {args.window} with {args.sinks} sinks is not below --length "
            f"{args.length}: nothing would slide. Give longer pieces, or a smaller window"
        )
    check_options(hf_config, options_of(args, Layers({0}), hf_config.num_hidden_layers))


def _texts(args: argparse.Namespace) -> tuple[list[list[int]], list[list[int]]]:
    """Pieces that choose layers, and those that are held out."""
    pieces = cut(tokens_of(args.model, args.text), args.length)
    if len(pieces) <= args.pieces:
        raise ValueError(
            f"the text has {len(pieces)} pieces of {args.length} tokens and --pieces takes "
            f"{args.pieces}: none is left to be held out. Give more text or shorter pieces"
        )
    held_out = pieces[args.pieces :]
    return pieces[: args.pieces], held_out[:1] if args.quick else held_out


def options_of(args: argparse.Namespace, sliding: Layers, num_layers: int) -> dict[str, Any]:
    """The ``swa`` options with which these layers slide."""
    if not sliding:
        return dict(FULL_ATTENTION)
    options: dict[str, Any] = {"window": args.window}
    if args.sinks:
        options["sink_tokens"] = args.sinks
    full = sorted(set(range(num_layers)) - sliding)
    options["full_attention_layers"] = full or "none"
    return options


def find_plan(trials: Trials, num_layers: int, budget: float, rounds: int) -> Search:
    """The layers that slide within a part ``budget`` of full attention's bytes.

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
    plans = Layers(order[:count]), _greedy(trials, costs, count, rounds)
    return Search(costs, tuple(order), min(plans, key=lambda plan: trials(plan).perplexity))


def _greedy(trials: Trials, costs: dict[int, float], count: int, rounds: int) -> Layers:
    sliding = Layers()
    for done in range(1, rounds + 1):
        if sliding:
            costs = trials.costs(sliding, set(costs) - sliding)
        left = sorted(costs, key=lambda layer: costs[layer])
        sliding |= Layers(left[: math.ceil(count * done / rounds) - len(sliding)])
        if len(sliding) == count:
            return sliding
    return sliding


def curve_of(trials: Trials, search: Search) -> dict[Layers, Measured]:
    """The plan, and what was measured of layers that slide in the order of their costs."""
    in_order = {Layers(search.order[:count]) for count in range(len(search.order) + 1)}
    return {s: m for s, m in trials.made.items() if s in in_order or s == search.plan}


def _print(
    args: argparse.Namespace,
    search: Search,
    curve: dict[Layers, Measured],
    results: dict[str, Measured],
    additional_config: dict[str, Any],
) -> None:
    cheapest_first = sorted(search.costs.items(), key=lambda item: item[1])
    print("growth of the perplexity where one layer alone slides, cheapest first")
    print(", ".join(f"{layer}: {100 * cost:+.2f} %" for layer, cost in cheapest_first))
    full = curve[Layers()]
    rows = [
        [len(s), m.num_groups, m.pool_bytes / full.pool_bytes, m.perplexity / full.perplexity]
        for s, m in sorted(curve.items(), key=lambda item: len(item[0]))
    ]
    print("\non the text that chose the layers, as parts of full attention's")
    print(format_table(("layers that slide", "KV groups", "bytes", "perplexity"), _rounded(rows)))
    reference = results["full"]
    last = [
        [n, m.perplexity, m.perplexity / reference.perplexity, m.pool_bytes / reference.pool_bytes]
        for n, m in results.items()
    ]
    print("\non held-out text")
    print(format_table(("", "perplexity", "to full", "bytes"), _rounded(last)))
    print(
        f"\nfor a budget of {args.budget}:\n--additional-config '{json.dumps(additional_config)}'"
    )


def _rounded(rows: Iterable[Sequence[object]]) -> list[list[object]]:
    return [[f"{x:.3f}" if isinstance(x, float) else x for x in row] for row in rows]


def _plot(path: Path, curve: dict[Layers, Measured], plan: Layers) -> None:
    full = curve[Layers()]
    points = {
        sliding: (m.pool_bytes / full.pool_bytes, m.perplexity / full.perplexity)
        for sliding, m in curve.items()
    }
    plots.lines(
        path,
        {"cheapest layers slide": list(points.values()), "plan": [points[plan]]},
        "pool bytes of a request, part of full attention's",
        "perplexity, relative to full attention's",
    )
