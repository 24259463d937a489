"""The least time in which an engine of measured speed can serve a workload in a pool."""

from collections.abc import Mapping, Sequence

from swa_vllm.tools.bench.serving.workload import Ask


def makespan(
    asks: Sequence[Ask], concurrency: int, prefill_s: float, step_s: Mapping[int, float]
) -> float:
    """Seconds from the start until the last token, with nothing lost in between.

    Requests start in the order of their arrival as soon as one of ``concurrency`` places is free;
    a prompt takes all of the engine's time, a step gives a token to each request that runs.

    Args:
        prefill_s: of a prompt token.
        step_s: of a decoding step, by the requests in it; straight lines lie between.
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
            now += step_time(step_s, len(left))
            left = [n - 1 for n in left if n > 1]
    return now


def step_time(step_s: Mapping[int, float], batch: int) -> float:
    """Of a step with so many requests, from those that were measured."""
    sizes = sorted(step_s)
    above = next((size for size in sizes if size >= batch), sizes[-1])
    below = max((size for size in sizes if size <= batch), default=above)
    if above == below:
        return step_s[above]
    share = (batch - below) / (above - below)
    return (1 - share) * step_s[below] + share * step_s[above]
