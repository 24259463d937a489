"""Rounds of a served workload: peers checked, then timed in turns, and what an ideal would take."""

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from swa_backend.pages import WindowPages, ceil_div
from swa_vllm.tools.bench.serving import bound
from swa_vllm.tools.bench.serving.checkpoints import vocabulary
from swa_vllm.tools.bench.serving.launcher import HF_FULL, KINDS, Kind, Launcher
from swa_vllm.tools.bench.serving.process import Peer
from swa_vllm.tools.bench.serving.records import Served, spread
from swa_vllm.tools.bench.serving.workload import Ask, make_prompts
from swa_vllm.tools.common.progress import say, token_bar

_EXACT = "float32"
_CHECKED_TOKENS = 16
_CURVE_STEPS = 40  # more than a page, at whose end some pools have room for another request


@dataclass(frozen=True)
class Rounds:
    """What is served, and how often.

    Attributes:
        once: names of the peers that serve it in the first round only.
        seed: of the prompts; each round has its own, so that no cache knows them.
    """

    asks: Sequence[Ask]
    window: int
    count: int
    once: frozenset[str]
    seed: int


def measure(launcher: Launcher, kinds: Mapping[str, Kind], rounds: Rounds) -> dict[str, Any]:
    """Check the peers, then time them.

    Raises:
        RuntimeError: they do not do the same, or have different pools.
    """
    vocab = vocabulary(launcher.models[True])
    served: dict[str, list[Served]] = {name: [] for name in kinds}
    if launcher.dtype != _EXACT:
        checked = _check(replace(launcher, dtype=_EXACT), kinds, rounds, {})
    with ExitStack() as stack:
        peers = {}
        for name, kind in kinds.items():
            say(f"starting {kind.name}")
            peers[name] = stack.enter_context(launcher.start(kind))
        pool_bytes = _pool_bytes(peers)
        if launcher.dtype == _EXACT:
            checked = _check(launcher, kinds, rounds, peers)
        first = rounds.asks[0]
        warm_up = [replace(first, arrival=0.0, output_tokens=min(8, first.output_tokens))] * 2
        for peer in peers.values():  # what is compiled or allocated once
            _serve(peer, warm_up, vocab, seed=-1)
        limit = _Limit.of(launcher, rounds, peers["here"])
        for index in range(rounds.count):
            order = list(peers.items())[:: -1 if index % 2 else 1]  # nobody always goes first
            for name, peer in order:
                if index and name in rounds.once:
                    continue
                say(f"round {index + 1} of {rounds.count}, {peer.name}")
                result = _serve(peer, rounds.asks, vocab, rounds.seed + index)
                served[name].append(result)
                rate = result.summary()["output"]
                say(f"  {result.seconds:.1f} s, {rate:.1f} tokens/s", is_result=True)
    figures = {KINDS[name].name: _figures(of_peer) for name, of_peer in served.items()}
    here = figures[KINDS["here"].name]
    return {
        "pool_bytes": pool_bytes,
        "checked": checked,
        "same_tokens": _agreement(served),
        "peers": figures,
        "ratios": {
            KINDS[name].name: _ratio(served["here"], of_peer) for name, of_peer in served.items()
        },
        "bound": limit.to_json(rounds.asks, here["seconds"]["median"]),
    }


def _serve(peer: Peer, asks: Sequence[Ask], vocab: int, seed: int) -> Served:
    with token_bar(sum(ask.output_tokens for ask in asks)) as progress:
        answer = peer.ask(
            "serve",
            progress,
            prompts=make_prompts([ask.prompt_tokens for ask in asks], vocab, seed),
            outputs=[ask.output_tokens for ask in asks],
            arrivals=[ask.arrival for ask in asks],
        )
    served = Served.from_json(answer)
    got = [len(request.tokens) for request in served.requests]
    if got != [ask.output_tokens for ask in asks]:
        raise RuntimeError(f"{peer.name} gave {got} tokens instead of those asked for")
    return served


def _check(
    launcher: Launcher, kinds: Mapping[str, Kind], rounds: Rounds, running: Mapping[str, Peer]
) -> dict[str, Any]:
    """Compare greedy tokens of all peers that slide, and of all that do not.

    Raises:
        RuntimeError: they differ.
    """
    room = max(ask.num_tokens for ask in rounds.asks) - _CHECKED_TOKENS
    wanted = (rounds.window // 2, rounds.window + 1, 3 * rounds.window + 5)
    lengths = [max(1, min(room, n)) for n in wanted]
    asks = [Ask(0.0, length, _CHECKED_TOKENS) for length in lengths]
    vocab = vocabulary(launcher.models[True])
    both = {"hf_full": HF_FULL} if {"full", "hf"} <= set(kinds) else {}
    groups: dict[bool, dict[str, list[list[int]]]] = {True: {}, False: {}}
    for name, kind in {**kinds, **both}.items():
        say(f"checking {kind.name}")
        with ExitStack() as stack:
            peer = running.get(name) or stack.enter_context(launcher.start(kind))
            answers = [request.tokens for request in _serve(peer, asks, vocab, 0).requests]
        groups[kind.windowed][kind.name] = answers
    for group in groups.values():
        for name, answers in group.items():
            first = next(iter(group))
            if answers != group[first]:
                raise RuntimeError(
                    f"{first} and {name} give other tokens in fp32, so nothing is timed"
                )
    return {
        "prompts": lengths,
        "tokens": _CHECKED_TOKENS,
        "equal": [list(group) for group in groups.values() if group],
    }


def _pool_bytes(peers: Mapping[str, Peer]) -> int:
    sizes = {p.name: p.facts["pool_bytes"] for p in peers.values() if "pool_bytes" in p.facts}
    if len(set(sizes.values())) != 1:
        raise RuntimeError(f"the pools are not of the same bytes: {sizes}")
    return int(next(iter(sizes.values())))


@dataclass(frozen=True)
class _Limit:
    """Speed of this plugin's engine, apart from any queue.

    Attributes:
        concurrency: requests whose windows the pool holds.
    """

    concurrency: int
    prefill_s: float
    step_s: Mapping[int, float]

    @classmethod
    def of(cls, launcher: Launcher, rounds: Rounds, peer: Peer) -> "_Limit":
        block_size = launcher.engine["block_size"]
        longest = max(rounds.asks, key=lambda ask: ask.num_tokens)
        pages = min(
            WindowPages(rounds.window, block_size).max_survivors,
            ceil_div(longest.num_tokens, block_size),
        )
        concurrency = max(1, min(len(rounds.asks), (peer.facts["num_pages"] - 1) // pages))
        num_steps = min(_CURVE_STEPS, longest.num_tokens - 2)
        prompt = max(1, min(longest.prompt_tokens, longest.num_tokens - num_steps - 1))
        sizes = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < concurrency] + [concurrency]
        say(f"measuring steps of {', '.join(map(str, sizes))} requests")
        measured = [
            peer.ask("decode", batch=n, num_prompt=prompt, num_steps=num_steps, seed=n)
            for n in sizes
        ]
        steps = {values["batch"]: values["decode_s"] for values in measured}
        return cls(concurrency, measured[-1]["prefill_s"], steps)

    def to_json(self, asks: Sequence[Ask], seconds: float) -> dict[str, Any]:
        least = bound.makespan(asks, self.concurrency, self.prefill_s, self.step_s)
        return {**vars(self), "seconds": least, "reached": least / seconds}


def _figures(rounds: Sequence[Served]) -> dict[str, Any]:
    summaries = [served.summary() for served in rounds]
    return {
        **{key: spread([summary[key] for summary in summaries]) for key in summaries[0]},
        "rounds": len(rounds),
        "curve": rounds[0].curve(),
    }


def _ratio(here: Sequence[Served], peer: Sequence[Served]) -> float:
    """How often as fast as it, in the median of the rounds in which both served."""
    return statistics.median(b.seconds / a.seconds for a, b in zip(here, peer, strict=False))


def _agreement(served: Mapping[str, Sequence[Served]]) -> dict[str, float]:
    """Share of the first round's tokens before an answer parts from this plugin's, by peer."""
    here = [request.tokens for request in served["here"][0].requests]
    shares = {}
    for name, rounds in served.items():
        if KINDS[name].windowed:
            theirs = [request.tokens for request in rounds[0].requests]
            shares[KINDS[name].name] = sum(map(_num_shared, here, theirs)) / sum(map(len, here))
    return shares


def _num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=True))
    return next((index for index, (a, b) in pairs if a != b), len(first))
