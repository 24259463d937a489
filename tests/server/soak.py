"""Traffic for a server that must lose nothing: what clients ask, when they leave, what they got.

Answers are greedy. Requests come in waves: of any length; with short prompts and long answers,
which outgrow the pool together and preempt one another; and with beginnings that others share.
"""

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import httpx
import psutil

from tests.helpers.metrics import samples, value
from tests.helpers.tiny_models import VOCAB_SIZE

MAX_MODEL_LEN = 512
NUM_CLIENTS = 20
WAVE = 24  # requests
MIN_REQUESTS = 6 * WAVE  # two of each kind, however slow the machine is
SHARED_BEGINNINGS = 12
SCRAPE_S = 1.0
TIMEOUT_S = 300


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        leaves_after: tokens of the stream after which the client disconnects; None if it stays.
        patience_s: how long the client waits for the whole answer; None if it streams.
    """

    prompt: list[int]
    num_tokens: int
    leaves_after: int | None = None
    patience_s: float | None = None

    @property
    def body(self) -> dict[str, Any]:
        """Of the HTTP request."""
        return {
            "model": "tiny",
            "prompt": self.prompt,
            "max_tokens": self.num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": self.patience_s is None,
        }


def make_ask(index: int) -> Ask:
    """The same request for an index, whenever and by whomever it is sent."""
    draw = random.Random(index)
    beginning: list[int] = []
    match index // WAVE % 3:
        case 0:
            num_prompt = draw.choice((1, 39, 40, 41, draw.randint(2, 200), draw.randint(200, 480)))
            num_tokens = draw.randint(1, 80)
        case 1:
            num_prompt, num_tokens = draw.randint(4, 60), draw.randint(100, 300)
        case _:
            number = draw.randrange(SHARED_BEGINNINGS)
            beginning = _tokens(random.Random(-1 - number), 32 + 32 * number)
            num_prompt, num_tokens = draw.randint(1, 60), draw.randint(1, 20)
    num_tokens = min(num_tokens, MAX_MODEL_LEN - num_prompt - len(beginning))
    prompt = beginning + _tokens(draw, num_prompt)
    fate = draw.random()
    if fate < 0.2:
        return Ask(prompt, num_tokens, leaves_after=draw.randint(1, max(1, num_tokens // 2)))
    if fate < 0.3:
        return Ask(prompt, num_tokens, patience_s=draw.uniform(0.01, 0.5))
    return Ask(prompt, num_tokens)


def _tokens(draw: random.Random, number: int) -> list[int]:
    return [draw.randrange(VOCAB_SIZE) for _ in range(number)]


@dataclass(frozen=True)
class Sample:
    """The server at one moment: resident bytes by process name, and its own counts."""

    rss: dict[str, int]
    swa: dict[str, float]
    preemptions: float
    cached_tokens: float


@dataclass
class Soak:
    """What one run did.

    Attributes:
        ends: how many requests ended how.
        finished: answers of the requests whose clients stayed.
        samples: one a second, in order.
    """

    ends: Counter[str] = field(default_factory=Counter)
    finished: list[tuple[Ask, list[int]]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


def run_soak(url: str, server_pid: int, seconds: float) -> Soak:
    """Send requests for ``seconds``, and two waves of each kind at least; wait for all answers.

    Raises:
        httpx.HTTPError: the server refused or dropped a request.
        AssertionError: an answer was short, or a count fell.
    """
    return asyncio.run(_run(url, server_pid, seconds))


async def _run(url: str, server_pid: int, seconds: float) -> Soak:
    soak, end = Soak(), time.monotonic() + seconds
    indices = itertools.takewhile(
        lambda index: index < MIN_REQUESTS or time.monotonic() < end, itertools.count()
    )
    # A connection that rests may be closed by the server just when it is used again.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as http:

        async def client() -> None:
            for index in indices:
                await _send(http, make_ask(index), soak)

        watch = asyncio.create_task(_watch(http, server_pid, soak.samples))
        try:
            await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))
        finally:
            watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
    return soak


async def _send(http: httpx.AsyncClient, ask: Ask, soak: Soak) -> None:
    if ask.patience_s is not None:
        try:
            async with asyncio.timeout(ask.patience_s):
                response = await http.post("/v1/completions", json=ask.body)
        except TimeoutError:
            soak.ends["aborted"] += 1
            return
        response.raise_for_status()
        tokens = response.json()["choices"][0]["token_ids"]
    else:
        tokens = []
        async with contextlib.aclosing(_stream(http, ask)) as stream:
            async for new in stream:
                tokens += new
                if ask.leaves_after is not None and len(tokens) >= ask.leaves_after:
                    soak.ends["disconnected"] += 1
                    return
    assert len(tokens) == ask.num_tokens
    soak.ends["finished"] += 1
    soak.finished.append((ask, tokens))


async def _stream(http: httpx.AsyncClient, ask: Ask) -> AsyncGenerator[list[int], None]:
    """New tokens as they come; closed, it closes the connection."""
    async with http.stream("POST", "/v1/completions", json=ask.body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                yield event["choices"][0]["token_ids"] or []


async def _watch(http: httpx.AsyncClient, server_pid: int, seen: list[Sample]) -> None:
    server = psutil.Process(server_pid)
    while True:
        seen.append(sample((await http.get("/metrics")).text, server))
        if len(seen) > 1:
            before, now = seen[-2].swa, seen[-1].swa
            assert all(now[n] >= before[n] for n in now if n.endswith("_total"))
            assert all(count >= 0 for count in now.values())
        await asyncio.sleep(SCRAPE_S)


def sample(metrics: str, server: psutil.Process) -> Sample:
    """The server now, by its ``/metrics`` and its processes."""
    rss = {"api": server.memory_info().rss, "engine": 0}
    for child in server.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            rss["engine"] += child.memory_info().rss
    return Sample(
        rss,
        samples(metrics),
        value(metrics, "vllm:num_preemptions_total"),
        value(metrics, "vllm:prefix_cache_hits_total"),
    )


def replay(url: str, soak: Soak, number: int) -> list[tuple[Ask, list[int], list[int]]]:
    """Ask about ``number`` of the finished requests once more, one by one and without the cache.

    Returns:
        Of each the request, the tokens it got in the run, and those it got now.
    """
    chosen = soak.finished[:: max(1, len(soak.finished) // number)][:number]
    replayed = []
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:
        for index, (ask, tokens) in enumerate(chosen):
            body = {**ask.body, "stream": False, "cache_salt": f"replay {index}"}
            response = http.post("/v1/completions", json=body)
            response.raise_for_status()
            replayed.append((ask, tokens, response.json()["choices"][0]["token_ids"]))
    return replayed


def memory_curve(soak: Soak) -> dict[str, list[float]]:
    """Median MiB of each quarter of the run, by process."""
    quarters = [
        soak.samples[len(soak.samples) * i // 4 :][: len(soak.samples) // 4] for i in range(4)
    ]
    return {
        name: [round(median(s.rss[name] for s in quarter) / 2**20, 1) for quarter in quarters]
        for name in soak.samples[0].rss
    }
