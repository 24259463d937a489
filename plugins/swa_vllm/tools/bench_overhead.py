"""Processor time of scheduler, page manager and metadata builder per step, beside stock vLLM's.

Batches of decoding requests, at several context lengths: what a step costs on top of the model.
"""

import argparse
import sys
from typing import Any

from swa_vllm.sizing import Arm
from swa_vllm.tools.arguments import check_numbers
from swa_vllm.tools.layer import BLOCK_SIZE, Layer, make_batch, make_layer
from swa_vllm.tools.simulate import Engine, Simulation
from swa_vllm.tools.table import format_table
from swa_vllm.tools.timing import at_least_two_rounds, interleave

EXAMPLE = "--batch 32"
_SCHEDULER = {c: f"scheduler and manager, prefix caching {'on' if c else 'off'}" for c in (0, 1)}
_BUILDER = "metadata builder"
_HEADER = ("", "context", "stock us", "here us", "ratio")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32, help="decoding requests")
    parser.add_argument("--rounds", type=int, default=100)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print a table; returns the figures."""
    check_numbers(args, ("window", "batch"))
    rounds = at_least_two_rounds(args.rounds)
    contexts = (2000, 8000) if args.quick else (2000, 8000, 32000)
    cases = []
    for context in contexts:
        for caching in (False, True):
            print(f"scheduler, context {context} ...", file=sys.stderr, flush=True)
            name = _SCHEDULER[caching]
            steps = {
                arm.value: _decoding(arm, args, context, caching, rounds).step
                for arm in (Arm.STOCK, Arm.SWA)
            }
            cases.append(_case(name, context, steps, rounds))
    layer = make_layer("Qwen3-0.6B", args.window, 1024, 64)
    cases += [
        _case(_BUILDER, context, _builders(layer, args, context), rounds) for context in contexts
    ]
    cases += [
        _together(cases, context, caching) for context in contexts for caching in (False, True)
    ]
    columns = ("name", "context", "stock_us", "here_us", "ratio")
    rows = [[case[column] for column in columns] for case in cases]
    print(f"\n{args.batch} decoding requests, W={args.window}, page {BLOCK_SIZE}")
    print(format_table(_HEADER, rows))
    return cases


def _decoding(
    arm: Arm, args: argparse.Namespace, context: int, caching: bool, rounds: int
) -> Simulation:
    """A scheduler whose requests all decode at ``context``."""
    longest = context + rounds + 100
    num_pages = args.batch * (longest // BLOCK_SIZE + 2)
    simulation = Simulation(
        arm,
        Engine(args.window, BLOCK_SIZE, num_pages, 8192, longest, prefix_caching=caching),
        count_pages=False,
    )
    for index in range(args.batch):
        simulation.add(str(index), range(index, index + context), rounds + 50)
    while not simulation.all_decode:
        simulation.step()
    return simulation


def _builders(layer: Layer, args: argparse.Namespace, context: int) -> dict[str, Any]:
    batch = make_batch([context] * args.batch, [1] * args.batch)
    return {
        Arm.STOCK.value: lambda: layer.stock_builder.build(0, batch),
        Arm.SWA.value: lambda: layer.builder.build(0, batch),
    }


def _case(name: str, context: int, steps: dict[str, Any], rounds: int) -> dict[str, Any]:
    times = interleave(steps, rounds)
    stock, here = times[Arm.STOCK.value], times[Arm.SWA.value]
    return {
        "name": name,
        "context": context,
        "stock_us": round(1e6 * stock.median),
        "here_us": round(1e6 * here.median),
        "ratio": here.median / stock.median,
        "spread": {arm: t.to_json() for arm, t in times.items()},
    }


def _together(cases: list[dict[str, Any]], context: int, caching: bool) -> dict[str, Any]:
    """A step's sum of scheduler, manager and builder."""
    parts = [
        c for c in cases if c["context"] == context and c["name"] in (_BUILDER, _SCHEDULER[caching])
    ]
    stock, here = (sum(part[key] for part in parts) for key in ("stock_us", "here_us"))
    name = f"together, prefix caching {'on' if caching else 'off'}"
    ratio = here / stock
    return {"name": name, "context": context, "stock_us": stock, "here_us": here, "ratio": ratio}
