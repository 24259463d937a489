"""The requests of a serving benchmark, of a built-in mix or from a trace."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_KEYS = ("arrival", "prompt_tokens", "output_tokens")


@dataclass(frozen=True)
class Ask:
    """A request: when it comes, and how long it is.

    Attributes:
        arrival: seconds after the start.
        prompt_tokens, output_tokens: both exact; the answer does not end by itself.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int

    @property
    def num_tokens(self) -> int:
        """Prompt and answer together."""
        return self.prompt_tokens + self.output_tokens


def _workload_of_equal_requests(
    num_prompt: int, num_output: int
) -> Callable[[int, int], list[Ask]]:
    return lambda count, seed: [Ask(0.0, num_prompt, num_output)] * count


def _chat_requests(count: int, seed: int) -> list[Ask]:
    """Make one request a second on average; medians of 200 and 120 tokens, with long tails."""
    generator, now, asks = random.Random(seed), 0.0, []  # noqa: S311 (no secret)
    for _ in range(count):
        lengths = (
            max(16, min(1500, round(generator.lognormvariate(mu, 0.9)))) for mu in (5.3, 4.8)
        )
        asks.append(Ask(round(now, 3), *lengths))
        now += generator.expovariate(1.0)
    return asks


MIXES: dict[str, Callable[[int, int], list[Ask]]] = {
    "decode": _workload_of_equal_requests(256, 1024),
    "even": _workload_of_equal_requests(512, 128),
    "prefill": _workload_of_equal_requests(2048, 32),
    "reasoning": _workload_of_equal_requests(256, 4096),
    "long": _workload_of_equal_requests(8000, 32),
    "chat": _chat_requests,
}


def read_trace(path: Path) -> list[Ask]:
    """Read requests from a JSON lines file, in the order of their arrival.

    Raises:
        ValueError: the file cannot be read, or a line is no request.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--trace {path} cannot be read: {error}; give a file of JSON lines"
        ) from error
    asks = [_parse_trace_line(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not asks:
        raise ValueError(f"--trace {path} has no requests; give a file of JSON lines")
    return sorted(asks, key=lambda ask: ask.arrival)


def _parse_trace_line(path: Path, number: int, line: str) -> Ask:
    try:
        values = json.loads(line)
        arrival, *lengths = (values[key] for key in _KEYS)
        if arrival >= 0 and all(isinstance(n, int) and n >= 1 for n in lengths):
            return Ask(float(arrival), *lengths)
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(
        f"--trace {path}, line {number}: each line is an object such as "
        '{"arrival": 0.5, "prompt_tokens": 300, "output_tokens": 64}; seconds from 0 on, tokens '
        f"from 1 on. Got {line[:80]!r}"
    )


def make_workload_prompts(lengths: Sequence[int], vocab_size: int, seed: int) -> list[list[int]]:
    """Make prompts of random tokens, the same for the same seed."""
    generator = random.Random(seed)  # noqa: S311 (no secret)
    return [generator.choices(range(vocab_size), k=length) for length in lengths]
