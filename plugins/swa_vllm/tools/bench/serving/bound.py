"""The least time in which an engine of measured speed can serve a workload in a pool."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swa_backend.pages import WindowPages, ceil_div
from swa_backend.window import Phase
from swa_vllm.tools.bench.serving.process import ArmProcess
from swa_vllm.tools.bench.serving.workload import Ask
from swa_vllm.tools.common.progress import say

_CURVE_STEPS = 40  # more than a page, at whose end some pools have room for another request


@dataclass(frozen=True)
class EngineSpeed:
    """The measured speed of an engine apart from any queue.

    Attributes:
        concurrency: requests whose pages the pool holds while they decode.
        prefill_s: seconds of a prompt token.
        step_s: seconds of a decoding step, by the requests in it.
    """

    concurrency: int
    prefill_s: float
    step_s: Mapping[int, float]

    @classmethod
    def measure(
        cls, process: ArmProcess, asks: Sequence[Ask], window: int, block_size: int, phase: Phase
    ) -> "EngineSpeed":
        """Time steps of more and more requests, as long as those of ``asks``.

        Args:
            phase: whose tokens have the window, and so whose pages a decoding request holds.
        """
        longest = max(asks, key=lambda ask: ask.num_tokens)
        pages = ceil_div(longest.num_tokens, block_size)
        if phase is Phase.BOTH:
            pages = min(pages, WindowPages(window, block_size).max_survivors)
        elif phase is Phase.DECODE:
            of_answer = WindowPages(window, block_size, longest.prompt_tokens)
            held = of_answer.max_held_without_holes(1, process.facts["spare_tokens"])
            pages = min(pages, held)
        concurrency = max(1, min(len(asks), (process.facts["num_pages"] - 1) // pages))
        num_steps = min(_CURVE_STEPS, longest.num_tokens - 2)
        prompt = max(1, min(longest.prompt_tokens, longest.num_tokens - num_steps - 1))
        sizes = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < concurrency] + [concurrency]
        say(f"measuring steps of {', '.join(map(str, sizes))} requests")
        measured = [
            process.ask("decode", batch=n, num_prompt=prompt, num_steps=num_steps, seed=n)
            for n in sizes
        ]
        steps = {values["batch"]: values["decode_s"] for values in measured}
        return cls(concurrency, measured[-1]["prefill_s"], steps)

    def to_json(self, asks: Sequence[Ask], seconds: float) -> dict[str, Any]:
        """Compute the least time for ``asks``, and its share of the ``seconds`` that they took."""
        least = makespan(asks, self.concurrency, self.prefill_s, self.step_s)
        return {**vars(self), "seconds": least, "reached": least / seconds}


def makespan(
    asks: Sequence[Ask], concurrency: int, prefill_s: float, step_s: Mapping[int, float]
) -> float:
    """Compute the seconds from the start until the last token, with nothing lost in between.

    Requests start in the order of their arrival as soon as one of ``concurrency`` places is free;
    a prompt takes all of the engine's time, a step gives a token to each request that runs.

    Args:
        prefill_s: seconds of a prompt token.
        step_s: seconds of a decoding step, by the requests in it; straight lines lie between.
    """
    now, waiting, left = 0.0, list(asks)[::-1], list[int]()
    while waiting or left:
        if not left:
            now = max(now, waiting[-1].arrival)
        while waiting and len(left) < concurrency and waiting[-1].arrival <= now:
            ask = waiting.pop()
            now += ask.prompt_tokens * prefill_s
            left.append(ask.output_tokens - 1)  # prefill gives the first
        left = [n for n in left if n > 0]
        if left:
            now += interpolate_step_time(step_s, len(left))
            left = [n - 1 for n in left if n > 1]
    return now


def interpolate_step_time(step_s: Mapping[int, float], batch: int) -> float:
    """Interpolate the seconds of a step with so many requests between those measured."""
    sizes = sorted(step_s)
    above = next((size for size in sizes if size >= batch), sizes[-1])
    below = max((size for size in sizes if size <= batch), default=above)
    if above == below:
        return step_s[above]
    share = (batch - below) / (above - below)
    return (1 - share) * step_s[below] + share * step_s[above]
