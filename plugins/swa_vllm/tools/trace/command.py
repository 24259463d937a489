"""Pages over time: a map of what each request holds, from vLLM's real scheduler without a model.

Each prompt is a request; all are there at the start. Of the pages of a sliding layer some hold sink
tokens, some the window, and some, beyond both, a prefill chunk or steps in flight. All others were
freed, or never stored. Full attention holds every page: its line is what it would need for the
same requests at the same time.
"""

import argparse
from dataclasses import dataclass, field
from typing import Any

from swa_backend.pages import WindowPages, ceil_div
from swa_vllm.tools.common import plots
from swa_vllm.tools.common.arguments import check_number, check_numbers, numbers_of_tokens
from swa_vllm.tools.plan.pictures import plot_trace
from swa_vllm.tools.trace.text import print_trace

EXAMPLE = "--window 1024 --sink-tokens 4 --prompt 12000,3000,6000 --output 300 --plot pages.png"
_NUMBERS = {
    "window": 1024,
    "block_size": 16,
    "pool_tokens": 32768,
    "max_num_batched_tokens": 2048,
    "steps_in_flight": 2,
    "output": 256,
}


@dataclass
class Row:
    """One request, step by step; a step in which it does not run has zeros.

    Attributes:
        window, sink, prefill: pages that it holds.
        gone: pages that full attention would hold beside them.
    """

    num_prompt: int
    window: list[int] = field(default_factory=list)
    sink: list[int] = field(default_factory=list)
    prefill: list[int] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)

    @property
    def held(self) -> list[int]:
        """Pages in each step."""
        parts = zip(self.window, self.sink, self.prefill, strict=True)
        return [sum(kinds) for kinds in parts]

    @property
    def full(self) -> list[int]:
        """Pages that full attention would hold in each step."""
        return [held + gone for held, gone in zip(self.held, self.gone, strict=True)]


@dataclass(frozen=True)
class Trace:
    """What happened.

    Attributes:
        rows: one request each, in the order of their arrival.
        used: pages of the pool that are held in each step.
        full: those that full attention would hold.
        num_pages: pages of the pool that requests can have.
    """

    rows: tuple[Row, ...]
    used: tuple[int, ...]
    full: tuple[int, ...]
    num_pages: int

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "rows": [vars(row) for row in self.rows]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    for name, default in _NUMBERS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(
            flag, type=int, default=default, metavar="N", help=f"default: {default}"
        )
    parser.add_argument("--sink-tokens", type=int, default=0, metavar="N")
    parser.add_argument(
        "--prompt", default="12000,3000,6000,1000", metavar="N,N,...", help="default: %(default)s"
    )
    plots.add_argument(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the map; returns the figures."""
    plots.check(args.plot)
    check_numbers(args, _NUMBERS)
    check_number("sink_tokens", args.sink_tokens, least=0)
    if args.pool_tokens < 2 * args.block_size:
        raise ValueError(
            f"--pool-tokens {args.pool_tokens} is less than two pages of --block-size "
            f"{args.block_size}; give more, or smaller pages"
        )
    prompts = numbers_of_tokens("--prompt", args.prompt)
    trace = record(args, prompts)
    title = (
        f"W={args.window}, {args.sink_tokens} sink tokens, pages of {args.block_size}, chunks of "
        f"{args.max_num_batched_tokens}, answers of {args.output}, {args.steps_in_flight} step(s) "
        "in flight"
    )
    print_trace(title, trace)
    if args.plot is not None:
        plot_trace(args.plot, title, trace)
    return trace.to_json()


def record(args: argparse.Namespace, prompts: list[int]) -> Trace:
    """Serve the prompts on vLLM's scheduler.

    Raises:
        ValueError: the pool does not hold the longest of them.
    """
    from swa_vllm.tools.common.sizing import Arm
    from swa_vllm.tools.engines.scheduler import Engine, Simulation

    pages = WindowPages(args.window, args.block_size, args.sink_tokens)
    rows = [Row(num_prompt) for num_prompt in prompts]
    used: list[int] = []

    class Recorder(Simulation):
        def note(self, output: Any) -> None:
            for name, row in enumerate(rows):
                held = self.num_pages_of(str(name))
                request = self.scheduler.requests.get(str(name))
                tokens = request.num_computed_tokens if held and request is not None else 0
                window, sink, prefill = pages.kinds(held)
                row.window.append(window)
                row.sink.append(sink)
                row.prefill.append(prefill)
                row.gone.append(ceil_div(tokens, args.block_size) - held if held else 0)
            used.append(sum(row.held[-1] for row in rows))

    engine = Engine(
        window=args.window,
        block_size=args.block_size,
        num_pages=args.pool_tokens // args.block_size,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=max(prompts) + args.output,
        max_num_seqs=min(256, args.max_num_batched_tokens),
        num_steps_in_flight=args.steps_in_flight,
        sink_tokens=args.sink_tokens,
    )
    simulation = Recorder(Arm.SWA, engine)
    if not simulation.starts:
        raise ValueError(
            f"--pool-tokens {args.pool_tokens} is {engine.num_pages} pages, one of which is never "
            f"given out, and the longest request may take {simulation.cap}; give more"
        )
    for name, num_prompt in enumerate(prompts):
        simulation.add(str(name), range(name, name + num_prompt), args.output)
    while simulation.step():
        pass
    full = tuple(map(sum, zip(*(row.full for row in rows), strict=True)))
    return Trace(tuple(rows), tuple(used), full, engine.num_pages - 1)
