"""What a trace records: the pages that requests hold, step by step, in vLLM's real scheduler."""

import argparse
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from swa_backend.pages import WindowPages, ceil_div
from swa_backend.window import Phase, num_pinned
from swa_vllm.tools.common.arms import Arm

if TYPE_CHECKING:
    from swa_vllm.tools.engines.simulated import Engine

# What pages are for; a trace has those of sinks or of prompts.
KINDS = ("window", "sink", "prompt", "prefill")


def pinned_kind(phase: Phase) -> str:
    """Kind of the pages that every later query sees."""
    return "prompt" if phase is Phase.DECODE else "sink"


@dataclass
class Row:
    """One request, step by step; a step in which it does not run has zeros.

    Attributes:
        window, sink, prompt, prefill: pages that it holds.
        gone: pages that full attention would hold beside them.
    """

    num_prompt: int
    window: list[int] = field(default_factory=list)
    sink: list[int] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    prefill: list[int] = field(default_factory=list)
    gone: list[int] = field(default_factory=list)

    @property
    def held(self) -> list[int]:
        """Pages that the request holds in each step."""
        return [sum(kinds) for kinds in zip(*(getattr(self, kind) for kind in KINDS), strict=True)]

    @property
    def full(self) -> list[int]:
        """Pages that full attention would hold in each step."""
        return [held + gone for held, gone in zip(self.held, self.gone, strict=True)]

    def add_step(self, pages: WindowPages, pinned: str, held: int, num_computed: int) -> None:
        """Add a step in which the request holds ``held`` pages of ``num_computed`` tokens.

        Args:
            pinned: see :func:`pinned_kind`.
        """
        counts = dict.fromkeys(KINDS, 0)
        counts["window"], counts[pinned], counts["prefill"] = pages.kinds(held)
        for kind, count in counts.items():
            getattr(self, kind).append(count)
        self.gone.append(ceil_div(num_computed, pages.page_size) - held if held else 0)


@dataclass(frozen=True)
class Trace:
    """The pages of all requests and of the pool in each step.

    Attributes:
        rows: one request each, in the order of their arrival.
        used: pages of the pool that are held in each step.
        full: those that full attention would hold.
        num_pages: pages of the pool that requests can have.
        phase: whose tokens have the window.
    """

    rows: tuple[Row, ...]
    used: tuple[int, ...]
    full: tuple[int, ...]
    num_pages: int
    phase: Phase

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of pages that requests of this phase have."""
        return "window", pinned_kind(self.phase), "prefill"

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "rows": [vars(row) for row in self.rows]}


def record_trace(args: argparse.Namespace, prompts: list[int]) -> Trace:
    """Serve the prompts on vLLM's scheduler, all there at the start, and note every step.

    Raises:
        ValueError: the pool does not hold the longest of them.
    """
    from swa_vllm.tools.engines.scheduler import Simulation  # which imports vLLM

    phase = Phase(args.phase)
    rows = {str(index): Row(num_prompt) for index, num_prompt in enumerate(prompts)}
    pages = {
        name: WindowPages(
            args.window,
            args.block_size,
            num_pinned(args.sink_tokens, phase, row.num_prompt),
        )
        for name, row in rows.items()
    }

    class Recorder(Simulation):
        def record_step(self, output: Any) -> None:
            for name, row in rows.items():
                held, num_computed = self.num_pages_of(name), self.num_computed_of(name)
                row.add_step(pages[name], pinned_kind(phase), held, num_computed)

    engine = _traced_engine(args, prompts)
    simulation = Recorder(Arm.SWA, engine)
    if args.pool_tokens is None and not simulation.starts:
        simulation = Recorder(Arm.SWA, replace(engine, num_pages=simulation.cap + 1))
    num_pages = simulation.engine.num_pages
    if not simulation.starts:
        raise ValueError(
            f"--pool-tokens {args.pool_tokens} is {num_pages} pages, one of which is never "
            f"given out, and the longest request may take {simulation.cap}; give more"
        )
    for first, (name, row) in enumerate(rows.items()):
        simulation.add(name, range(first, first + row.num_prompt), args.output)
    while simulation.step():
        pass
    return Trace(
        rows=tuple(rows.values()),
        used=tuple(map(sum, zip(*(row.held for row in rows.values()), strict=True))),
        full=tuple(map(sum, zip(*(row.full for row in rows.values()), strict=True))),
        num_pages=num_pages - 1,
        phase=phase,
    )


def _traced_engine(args: argparse.Namespace, prompts: list[int]) -> "Engine":
    """The engine of the flags; its pool is short of pages for full attention, unless given."""
    from swa_vllm.tools.engines.simulated import Engine

    pool_tokens = args.pool_tokens
    if pool_tokens is None:
        pool_tokens = sum(prompt + args.output for prompt in prompts) // 2
    return Engine(
        window=args.window,
        block_size=args.block_size,
        num_pages=max(2, pool_tokens // args.block_size),
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=max(prompts) + args.output,
        max_num_seqs=min(256, args.max_num_batched_tokens),
        num_steps_in_flight=args.steps_in_flight,
        sink_tokens=args.sink_tokens,
        phase=Phase(args.phase),
    )
