"""Prefix cache hits of users' traffic: with memory to spare, all that stock vLLM has.

On the real scheduler, without a model; every sampled token is the same.
"""

from collections.abc import Callable

import pytest

from swa_backend.options import PrefillPages
from swa_vllm.tools.common.arms import Arm
from swa_vllm.tools.engines.scheduler import SAMPLED_TOKEN, Simulation
from swa_vllm.tools.engines.simulated import Engine

Serve = Callable[[list[int], int], list[int]]


def _text(seed: int, num_tokens: int) -> list[int]:
    return [(seed * 7919 + 31 * i * i + i) % 500 for i in range(num_tokens)]


def shared_prefix(serve: Serve) -> None:
    """Questions about one long document, which then differ."""
    document = _text(1, 3000)
    for question in range(2, 7):
        serve(document + _text(question, 400), 8)


def multi_turn(serve: Serve) -> None:
    """A conversation sent again in full with every turn."""
    history: list[int] = []
    for turn in range(5):
        history = serve(history + _text(turn, 700), 60)


def round_robin(serve: Serve) -> None:
    """Several conversations in turns."""
    histories: list[list[int]] = [[] for _ in range(4)]
    for turn in range(4):
        for user, history in enumerate(histories):
            histories[user] = serve(history + _text(10 * user + turn, 500), 40)


def edited_last_turn(serve: Serve) -> None:
    """The user rewrites the last turn and sends again."""
    history = serve(_text(1, 2000), 50)
    for attempt in range(4):
        serve(history + _text(20 + attempt, 300), 50)


def _hits(
    arm: Arm, policy: PrefillPages, traffic: Callable[[Serve], None], retention: int | None
) -> list[int]:
    engine = Engine(
        window=200,
        block_size=16,
        num_pages=6000,
        max_num_batched_tokens=2048,
        max_model_len=8192,
        prefix_caching=True,
        prefill_pages=policy,
        retention_interval=retention,
    )
    simulation, hits = Simulation(arm, engine), list[int]()

    def serve(prompt: list[int], num_output: int) -> list[int]:
        name = str(len(hits))
        simulation.add(name, prompt, num_output)
        while simulation.step():
            pass
        hits.append(simulation.num_cached_tokens[name])
        return prompt + [SAMPLED_TOKEN] * num_output

    traffic(serve)
    return hits


# Without full layers vLLM notices no junction, so by default a shared prefix is not kept.
@pytest.mark.parametrize("retention", [None, 0])
@pytest.mark.parametrize("traffic", [shared_prefix, multi_turn, round_robin, edited_last_turn])
def test_hits_are_stocks_while_memory_is_plentiful(
    traffic: Callable[[Serve], None], retention: int | None
) -> None:
    stock = _hits(Arm.STOCK, PrefillPages.ALL, traffic, retention)
    assert sum(hit > 0 for hit in stock) >= 2 or (traffic, retention) == (shared_prefix, 0)
    assert _hits(Arm.SWA, PrefillPages.AUTO, traffic, retention) == stock


def test_survivors_only_lose_shared_prefixes_and_keep_conversations() -> None:
    def hits(policy: PrefillPages, traffic: Callable[[Serve], None]) -> list[int]:
        return _hits(Arm.SWA, policy, traffic, None)

    assert hits(PrefillPages.SURVIVORS, multi_turn) == hits(PrefillPages.AUTO, multi_turn)
    assert sum(hits(PrefillPages.SURVIVORS, shared_prefix)) < sum(
        hits(PrefillPages.AUTO, shared_prefix)
    )
