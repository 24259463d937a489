"""Rounds of a served workload: arms are checked, then timed in turns, beside a lower bound."""

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from swa_backend.window import Phase
from swa_vllm.tools.bench.serving.arms import HF_FULL, SERVING_ARMS, ServingArm
from swa_vllm.tools.bench.serving.bound import EngineSpeed
from swa_vllm.tools.bench.serving.checkpoints import vocabulary_of_arms
from swa_vllm.tools.bench.serving.launcher import Launcher
from swa_vllm.tools.bench.serving.process import ArmProcess
from swa_vllm.tools.bench.serving.records import ServedWorkload
from swa_vllm.tools.bench.serving.workload import Ask, make_workload_prompts
from swa_vllm.tools.common.progress import say, token_bar
from swa_vllm.tools.common.spread import Spread

_EXACT = "float32"
_CHECKED_TOKENS = 16


@dataclass(frozen=True)
class Rounds:
    """The requests that each round serves, and how many rounds there are.

    Attributes:
        once: names of the arms that serve them in the first round only.
        seed: of the prompts; each round has its own, so that no cache knows them.
    """

    asks: Sequence[Ask]
    window: int
    count: int
    once: frozenset[str]
    seed: int


def measure_rounds(
    launcher: Launcher, arms: Mapping[str, ServingArm], rounds: Rounds
) -> dict[str, Any]:
    """Check the arms, then time them.

    Raises:
        RuntimeError: they do not do the same, or have different pools.
    """
    if launcher.dtype != _EXACT:
        checked = _check_same_answers(replace(launcher, dtype=_EXACT), arms, rounds, {})
    with ExitStack() as stack:
        processes = {}
        for name, arm in arms.items():
            say(f"starting {arm.name}")
            processes[name] = stack.enter_context(launcher.start(arm))
        pool_bytes = _pool_bytes_of_all_arms(processes)
        if launcher.dtype == _EXACT:
            checked = _check_same_answers(launcher, arms, rounds, processes)
        vocab = vocabulary_of_arms(launcher.models[True])
        _warm_up_arms(processes, rounds, vocab)
        speed = EngineSpeed.measure(
            processes["here"],
            rounds.asks,
            rounds.window,
            launcher.engine["block_size"],
            arms["here"].phase,
        )
        served = _serve_in_turns(processes, rounds, vocab)
    figures = {
        SERVING_ARMS[name].name: _summarize_rounds_of_arm(workloads)
        for name, workloads in served.items()
    }
    here = figures[SERVING_ARMS["here"].name]
    return {
        "pool_bytes": pool_bytes,
        "checked": checked,
        "same_tokens": _share_of_same_tokens(served, arms),
        "peers": figures,
        "ratios": {
            SERVING_ARMS[name].name: _ratio_of_rounds(served["here"], workloads)
            for name, workloads in served.items()
        },
        "bound": speed.to_json(rounds.asks, here["seconds"]["median"]),
    }


def _warm_up_arms(processes: Mapping[str, ArmProcess], rounds: Rounds, vocab: int) -> None:
    """Have each arm compile and allocate what it does once."""
    first = rounds.asks[0]
    asks = [replace(first, arrival=0.0, output_tokens=min(8, first.output_tokens))] * 2
    for process in processes.values():
        _serve_round(process, asks, vocab, seed=-1)


def _serve_in_turns(
    processes: Mapping[str, ArmProcess], rounds: Rounds, vocab: int
) -> dict[str, list[ServedWorkload]]:
    served: dict[str, list[ServedWorkload]] = {name: [] for name in processes}
    for index in range(rounds.count):
        order = list(processes.items())[:: -1 if index % 2 else 1]  # nobody always goes first
        for name, process in order:
            if index and name in rounds.once:
                continue
            say(f"round {index + 1} of {rounds.count}, {process.name}")
            result = _serve_round(process, rounds.asks, vocab, rounds.seed + index)
            served[name].append(result)
            rate = result.summary()["output"]
            say(f"  {result.seconds:.1f} s, {rate:.1f} tokens/s", is_result=True)
    return served


def _serve_round(process: ArmProcess, asks: Sequence[Ask], vocab: int, seed: int) -> ServedWorkload:
    with token_bar(sum(ask.output_tokens for ask in asks)) as progress:
        answer = process.ask(
            "serve",
            progress,
            prompts=make_workload_prompts([ask.prompt_tokens for ask in asks], vocab, seed),
            outputs=[ask.output_tokens for ask in asks],
            arrivals=[ask.arrival for ask in asks],
        )
    served = ServedWorkload.from_json(answer)
    got = [len(request.tokens) for request in served.requests]
    if got != [ask.output_tokens for ask in asks]:
        raise RuntimeError(f"{process.name} gave {got} tokens instead of those asked for")
    return served


def _check_same_answers(
    launcher: Launcher,
    arms: Mapping[str, ServingArm],
    rounds: Rounds,
    running: Mapping[str, ArmProcess],
) -> dict[str, Any]:
    """Compare greedy tokens of all arms that slide, and of all that do not.

    Where an arm has a window in one phase only, its answers have other tokens than those of other
    arms from the second on: then the first ones are compared. These are predicted by the prompt,
    which with a window in generated tokens only is full attention's.

    Raises:
        RuntimeError: they differ.
    """
    has_phase = any(arm.phase is not Phase.BOTH for arm in arms.values())
    num_checked = 1 if has_phase else _CHECKED_TOKENS
    room = max(ask.num_tokens for ask in rounds.asks) - num_checked
    wanted = (rounds.window // 2, rounds.window + 1, 3 * rounds.window + 5)
    lengths = [max(1, min(room, n)) for n in wanted]
    asks = [Ask(0.0, length, num_checked) for length in lengths]
    vocab = vocabulary_of_arms(launcher.models[True])
    both = {"hf_full": HF_FULL} if {"full", "hf"} <= set(arms) else {}
    groups: dict[bool, dict[str, list[list[int]]]] = {True: {}, False: {}}
    for name, arm in {**arms, **both}.items():
        say(f"checking {arm.name}")
        with ExitStack() as stack:
            process = running.get(name) or stack.enter_context(launcher.start(arm))
            answers = [request.tokens for request in _serve_round(process, asks, vocab, 0).requests]
        slides = arm.windowed and arm.phase is not Phase.DECODE
        groups[slides][arm.name] = answers
    for group in groups.values():
        for name, answers in group.items():
            first = next(iter(group))
            if answers != group[first]:
                raise RuntimeError(
                    f"{first} and {name} give other tokens in fp32, so nothing is timed"
                )
    return {
        "prompts": lengths,
        "tokens": num_checked,
        "equal": [list(group) for group in groups.values() if group],
    }


def _pool_bytes_of_all_arms(processes: Mapping[str, ArmProcess]) -> int:
    sizes = {p.name: p.facts["pool_bytes"] for p in processes.values() if "pool_bytes" in p.facts}
    if len(set(sizes.values())) != 1:
        raise RuntimeError(f"the pools are not of the same bytes: {sizes}")
    return int(next(iter(sizes.values())))


def _summarize_rounds_of_arm(rounds: Sequence[ServedWorkload]) -> dict[str, Any]:
    summaries = [served.summary() for served in rounds]
    return {
        **{
            key: Spread.of_all([summary[key] for summary in summaries]).to_json()
            for key in summaries[0]
        },
        "rounds": len(rounds),
        "curve": rounds[0].curve(),
    }


def _ratio_of_rounds(here: Sequence[ServedWorkload], other: Sequence[ServedWorkload]) -> float:
    """Divide the other's time by this plugin's: the median of the rounds that both served."""
    return statistics.median(b.seconds / a.seconds for a, b in zip(here, other, strict=False))


def _share_of_same_tokens(
    served: Mapping[str, Sequence[ServedWorkload]], arms: Mapping[str, ServingArm]
) -> dict[str, float]:
    """Share of the first round's tokens before an answer parts from this plugin's, by arm.

    Arms with another window have no share.
    """
    here = [request.tokens for request in served["here"][0].requests]
    shares = {}
    for name, rounds in served.items():
        if arms[name].windowed and arms[name].phase is arms["here"].phase:
            theirs = [request.tokens for request in rounds[0].requests]
            shares[SERVING_ARMS[name].name] = sum(map(_num_same_tokens, here, theirs)) / sum(
                map(len, here)
            )
    return shares


def _num_same_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=True))
    return next((index for index, (a, b) in pairs if a != b), len(first))
