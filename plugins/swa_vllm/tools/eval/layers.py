"""``swa eval layers``: which layers can slide, for a part of full attention's bytes."""

import argparse
import json
from pathlib import Path
from typing import Any

from swa_backend.table import format_table
from swa_vllm.tools.common import plots
from swa_vllm.tools.common.arguments import check_number_arguments
from swa_vllm.tools.common.progress import say
from swa_vllm.tools.engines.perplexity import Measured, measure_perplexity
from swa_vllm.tools.engines.scoring import NUM_EXTRA_TOKENS, ScoringEngine
from swa_vllm.tools.engines.setup import (
    FULL_ATTENTION,
    resolve_scoring_options,
    scoring_text_config,
    setup_of,
)
from swa_vllm.tools.engines.texts import cut_evaluated_text, tokens_of
from swa_vllm.tools.eval.layer_search import (
    Layers,
    Search,
    Trials,
    find_sliding_layers,
    trials_in_order,
)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print tables and the option to use; returns the figures."""
    plots.check_plot_path(args.plot)
    hf_config = scoring_text_config(args.model)
    _check_budget(args, hf_config)
    setup = setup_of(args, hf_config, args.length + NUM_EXTRA_TOKENS)
    chosen_on, checked = _cut_texts(args)
    num_layers, on_held_out = hf_config.num_hidden_layers, dict[Layers, Measured]()

    def serve(sliding: Layers) -> Measured:
        full = num_layers - len(sliding)
        say(f"{len(sliding)} layers slide, {full} full")
        with ScoringEngine.start(setup, options_to_slide(args, sliding, num_layers)) as engine:
            if len(sliding) in (0, num_layers):
                on_held_out[sliding] = measure_perplexity(engine, checked)
            return measure_perplexity(engine, chosen_on)

    trials = Trials(serve)
    search = find_sliding_layers(trials, num_layers, args.budget, 1 if args.quick else args.rounds)
    for quarter in () if args.quick else (1, 2, 3):
        trials(search.order[: num_layers * quarter // 4])
    options = options_to_slide(args, search.plan, num_layers)
    if search.plan not in on_held_out:
        with ScoringEngine.start(setup, options) as engine:
            on_held_out[search.plan] = measure_perplexity(engine, checked)
    plans = {"full": Layers(), "plan": search.plan, "all slide": Layers(range(num_layers))}
    results = {name: on_held_out[plan] for name, plan in plans.items()}
    curve = trials_in_order(trials, search)
    _print_layer_search(args, search, curve, results, {"swa": options})
    if args.plot:
        _plot_layer_search(args.plot, curve, search.plan)
    return {
        "model": args.model,
        "budget": args.budget,
        "length": args.length,
        "costs": search.costs,
        "curve": [{"sliding": sorted(s), **vars(m)} for s, m in curve.items()],
        "held_out": {name: vars(measured) for name, measured in results.items()},
        "additional_config": {"swa": options},
    }


def _check_budget(args: argparse.Namespace, hf_config: Any) -> None:
    if not 0 < args.budget < 1:
        raise ValueError(
            f"--budget is a part of full attention's pool bytes, between 0 and 1; got {args.budget}"
        )
    check_number_arguments(args, ("pieces", "rounds"))
    if args.window + args.sink_tokens >= args.length:
        raise ValueError(
            f"a window of {args.window} with {args.sink_tokens} sinks is not below --length "
            f"{args.length}: nothing would slide. Give longer pieces, or a smaller window"
        )
    resolve_scoring_options(
        hf_config, options_to_slide(args, Layers({0}), hf_config.num_hidden_layers)
    )


def _cut_texts(args: argparse.Namespace) -> tuple[list[list[int]], list[list[int]]]:
    """Cut the text into pieces that choose layers and pieces that are held out."""
    pieces = cut_evaluated_text(tokens_of(args.model, args.text), args.length)
    if len(pieces) <= args.pieces:
        raise ValueError(
            f"the text has {len(pieces)} pieces of {args.length} tokens and --pieces takes "
            f"{args.pieces}: none is left to be held out. Give more text, shorter pieces "
            "(--length), or fewer --pieces"
        )
    held_out = pieces[args.pieces :]
    return pieces[: args.pieces], held_out[:1] if args.quick else held_out


def options_to_slide(args: argparse.Namespace, sliding: Layers, num_layers: int) -> dict[str, Any]:
    """Spell the ``swa`` options with which these layers slide."""
    if not sliding:
        return dict(FULL_ATTENTION)
    options: dict[str, Any] = {"window": args.window}
    if args.sink_tokens:
        options["sink_tokens"] = args.sink_tokens
    full = sorted(set(range(num_layers)) - sliding)
    options["full_attention_layers"] = full or "none"
    return options


def _print_layer_search(
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
    print(format_table(("layers that slide", "KV groups", "bytes", "perplexity"), rows, digits=3))
    reference = results["full"]
    last = [
        [n, m.perplexity, m.perplexity / reference.perplexity, m.pool_bytes / reference.pool_bytes]
        for n, m in results.items()
    ]
    print("\non held-out text")
    print(format_table(("", "perplexity", "to full", "bytes"), last, digits=3))
    print(
        f"\nfor a budget of {args.budget}:\n--additional-config '{json.dumps(additional_config)}'"
    )


def _plot_layer_search(path: Path, curve: dict[Layers, Measured], plan: Layers) -> None:
    full = curve[Layers()]
    points = {
        sliding: (m.pool_bytes / full.pool_bytes, m.perplexity / full.perplexity)
        for sliding, m in curve.items()
    }
    plots.draw_lines(
        path,
        {"cheapest layers slide": list(points.values()), "plan": [points[plan]]},
        "pool bytes of a request, part of full attention's",
        "perplexity, relative to full attention's",
    )
