"""Prefill and decode on servers of their own, over NIXL: the tokens of one server.

Both engines run in processes of their own on this machine. The first fills its free pages with NaN,
the second the null page, which stands for all that it does not hold.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from swa_backend.pages import ceil_div
from tests.helpers.dense_qwen3 import DenseQwen3, Sight
from tests.helpers.engines import ModelFactory
from tests.helpers.exactness import check_exact
from tests.helpers.tiny_models import FULL, NUM_LAYERS, PAGE_SIZE, WINDOW, random_prompts
from tests.helpers.transfer import (
    CONSUMER,
    FOR_ANOTHER,
    PRODUCER,
    Server,
    server,
    transfer_config,
)

pytestmark = pytest.mark.alone

NUM_TOKENS = 12
# The last one starts a page with what its last token sees first: vLLM's own sliding layers lack it.
LENGTHS = (1, PAGE_SIZE, WINDOW, WINDOW + 1, 270, 430, 8 * PAGE_SIZE + WINDOW - 1)
PAGE_BYTES = 2 * 2 * PAGE_SIZE * 32 * 4  # keys and values of two heads, in fp32
# Options, layers that are full, and arguments of both engines.
CASES: dict[str, tuple[dict[str, Any], set[int], dict[str, Any]]] = {
    "all slide": ({}, set(), {}),
    "every other layer slides, all pages stored, two workers": (
        {"prefill_pages": "all", "debug_poison": False},
        {1, 3},
        {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    ),
    "survivors alone": ({"prefill_pages": "survivors"}, set(), {}),
}


@contextmanager
def _pair(
    model: Path, logs: Path, swa: dict[str, Any], kv_lease: int = 30, **arguments: Any
) -> Iterator[tuple[Server, Server]]:
    """A server that fills pages, and keeps them for ``kv_lease`` seconds, and one that answers."""
    arguments["additional_config"] = {"swa": {"window": WINDOW, **swa}}
    leases = {"kv_transfer_config": transfer_config(PRODUCER, kv_lease_duration=kv_lease)}
    with (
        server(model, PRODUCER, logs / "fills", **leases, **arguments) as fills,
        server(model, CONSUMER, logs / "answers", **arguments) as answers,
    ):
        yield fills, answers


def _num_bytes(length: int, full: set[int]) -> int:
    """Bytes of the pages that the last token of a prompt sees."""
    num_pages = ceil_div(length, PAGE_SIZE)
    in_window = num_pages - max(0, length - WINDOW) // PAGE_SIZE
    return PAGE_BYTES * sum(num_pages if i in full else in_window for i in range(NUM_LAYERS))


@pytest.mark.parametrize("name", CASES)
def test_two_servers_have_the_tokens_of_one(
    name: str, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    swa, full, arguments = CASES[name]
    model = tiny_model(**FULL)
    swa = {**swa, "full_attention_layers": ",".join(map(str, sorted(full)))} if full else swa
    prompts = random_prompts(LENGTHS)
    windows = tuple(None if i in full else WINDOW for i in range(NUM_LAYERS))
    dense = DenseQwen3(model, Sight(windows))
    with _pair(model, tmp_path, swa, max_num_batched_tokens=96, **arguments) as (fills, answers):
        served = answers.serve(prompts, NUM_TOKENS, fills.fill(prompts))
        check_exact(prompts, [s.answer for s in served], dense)
        assert answers.bytes_read() == sum(_num_bytes(length, full) for length in LENGTHS)
        # The next turn finds the last one's pages in both prefix caches.
        longer = [
            prompt + s.answer.tokens + [7] * PAGE_SIZE
            for prompt, s in zip(prompts, served, strict=True)
        ]
        again = answers.serve(longer, NUM_TOKENS, fills.fill(longer))
        check_exact(longer, [s.answer for s in again], dense)
        assert again[-1].answer.num_cached_tokens > 0
        for settled in (fills.settle(), answers.settle()):
            assert settled["requests"] == settled["held"] == 0
            assert settled["live"] == settled["requests_live"] == 0
            assert settled["peak"] > 0
            assert settled["prefix_hit_tokens"] > 0


def test_a_window_of_another_size_is_refused_at_the_handshake(
    tiny_model: ModelFactory, tmp_path: Path
) -> None:
    """No page moves, the request fails by name, and the server that answers goes on."""
    model = tiny_model(**FULL)
    wrong = {"swa": {"window": WINDOW + 8}}
    prompts = random_prompts([100])
    with (
        _pair(model, tmp_path, {}, kv_lease=6) as (fills, answers),
        server(model, CONSUMER, tmp_path / "other", additional_config=wrong) as other,
    ):
        (failed,) = other.serve(prompts, NUM_TOKENS, fills.fill(prompts))
        assert (failed.reason, failed.answer.tokens, other.bytes_read()) == ("error", [], 0)
        log = other.log.read_text()
        for window in (WINDOW, WINDOW + 8):
            assert f"(layers 0-3: window {window}, pages of {PAGE_SIZE}; rope " in log
        other.serve(prompts, NUM_TOKENS, [None])
        assert other.settle()["held"] == 0
        # Nobody asks for these pages: they come back when their lease ends.
        assert fills.settle()["held"] == 0
        (served,) = answers.serve(prompts, NUM_TOKENS, fills.fill(prompts))
        assert len(served.answer.tokens) == NUM_TOKENS


def test_requests_that_end_early_leave_nothing(tiny_model: ModelFactory, tmp_path: Path) -> None:
    """Aborted before its pages are read; in a pool too small for all; asked for too many tokens."""
    model = tiny_model(**FULL)
    prompts = random_prompts([270, 300, 280, 290])
    dense = DenseQwen3(model, Sight((WINDOW,) * NUM_LAYERS))
    few = ceil_div(WINDOW + 96, PAGE_SIZE) + 3
    with _pair(model, tmp_path, {}, kv_lease=6, num_gpu_blocks_override=3 * few) as pair:
        fills, answers = pair
        abandoned, *others = fills.fill(prompts)
        answers.abandon(prompts[0], abandoned)
        served = answers.serve(prompts[1:], NUM_TOKENS, others)
        check_exact(prompts[1:], [s.answer for s in served], dense)
        assert answers.settle()["held"] == fills.settle()["held"] == 0
        # Tokens behind the prompt would move the window; it ends after one, whatever is asked for.
        (longer,) = fills.serve(prompts[:1], 40, [FOR_ANOTHER])
        assert len(longer.answer.tokens) == 1
        (last,) = answers.serve(prompts[:1], NUM_TOKENS, [longer.transfer])
        check_exact(prompts[:1], [last.answer], dense)


def test_a_server_that_dies_fails_only_what_it_had(
    tiny_model: ModelFactory, tmp_path: Path
) -> None:
    model = tiny_model(**FULL)
    prompts = random_prompts([100, 110])
    with _pair(model, tmp_path, {}) as (fills, answers):
        transfers = fills.fill(prompts)
        fills.stop()
        failed = answers.serve(prompts[:1], NUM_TOKENS, transfers[:1])
        assert [f.reason for f in failed] == ["error"]
        (served,) = answers.serve(prompts[1:], NUM_TOKENS, [None])
        assert len(served.answer.tokens) == NUM_TOKENS
        assert answers.settle()["held"] == 0
