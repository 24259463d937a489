"""Records of a served workload: its steps, its requests, and their summary."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from swa_backend.pages import ceil_div


@dataclass
class Step:
    """One forward pass.

    Attributes:
        prefill, decode: tokens that it computed; what a preemption lost and is computed again
            counts as prefill.
        requests: how many requests it served.
        pages: pages of the pool that were held; 0 where there is no pool.
        preempted: how many requests lost their pages before it.
        answered: tokens that requests got from it.
    """

    prefill: int
    decode: int
    requests: int
    pages: int = 0
    preempted: int = 0
    answered: int = 0
    seconds: float = 0.0


@dataclass
class Timed:
    """A request's tokens, and the seconds from its arrival to the first and to the last."""

    first: float = 0.0
    last: float = 0.0
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class ServedWorkload:
    """A workload that was served to its end in ``seconds``; requests by their arrival."""

    seconds: float
    steps: Sequence[Step]
    requests: Sequence[Timed]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ServedWorkload":
        """Read what an arm's process answers."""
        return cls(
            values["seconds"],
            [Step(**step) for step in values["steps"]],
            [Timed(**request) for request in values["requests"]],
        )

    def summary(self) -> dict[str, float]:
        """Sum up in figures by name: tokens are tokens a second, latencies milliseconds.

        ``prefill`` is the rate of steps that prefill, which may decode for others too, ``decode``
        that of all other steps.
        """
        mixed = [step for step in self.steps if step.prefill]
        alone = [step for step in self.steps if not step.prefill]
        first = [request.first for request in self.requests]
        each = [
            (request.last - request.first) / (len(request.tokens) - 1)
            for request in self.requests
            if len(request.tokens) > 1
        ]
        running = [step.requests for step in self.steps]
        return {
            "seconds": self.seconds,
            "output": sum(len(r.tokens) for r in self.requests) / self.seconds,
            "prefill": _token_rate((s.prefill, s.seconds) for s in mixed),
            "decode": _token_rate((s.decode, s.seconds) for s in alone),
            **{f"ttft_p{p}_ms": 1e3 * percentile(first, p) for p in (50, 99)},
            **{f"tpot_p{p}_ms": 1e3 * percentile(each, p) for p in (50, 99)},
            "running": sum(running) / len(running),
            "peak_running": max(running),
            "peak_pages": max(step.pages for step in self.steps),
            "preemptions": sum(step.preempted for step in self.steps),
        }

    def curve(self, num_points: int = 60) -> list[tuple[float, int]]:
        """Count the tokens answered after so many seconds of work, at some ``num_points`` times."""
        now, tokens, points = 0.0, 0, [(0.0, 0)]
        for step in self.steps:
            now, tokens = now + step.seconds, tokens + step.answered
            points.append((round(now, 2), tokens))
        stride = ceil_div(len(points), num_points)
        return [*points[:-1:stride], points[-1]]


def percentile(values: Sequence[float], percent: int) -> float:
    """Interpolate a percentile linearly between neighbours; 0 of no values."""
    if len(values) < 2:
        return sum(values)
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _token_rate(parts: Iterable[tuple[int, float]]) -> float:
    pairs = list(parts)
    seconds = sum(s for _, s in pairs)
    return sum(n for n, _ in pairs) / seconds if seconds else 0.0
