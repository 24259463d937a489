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
    num_prompt_bytes,
    servers,
)

pytestmark = pytest.mark.alone

NUM_TOKENS = 12
LEASE_S = 10
# The last one starts a page with what its last token sees first: vLLM's own sliding layers lack it.
LENGTHS = (1, PAGE_SIZE, WINDOW, WINDOW + 1, 270, 430, 8 * PAGE_SIZE + WINDOW - 1)
# A chunk and a window of one request; three of them, or fewer, run at once.
NUM_PAGES = 3 * (ceil_div(WINDOW + 96, PAGE_SIZE) + 3)


@contextmanager
def _pair(model: Path, logs: Path, fills: Any, answers: Any) -> Iterator[tuple[Server, Server]]:
    """A server that computes prompts and one that answers, each with arguments of ``LLM``."""
    first = (model, PRODUCER, {"kv_lease_duration": LEASE_S}, fills)
    second = (model, CONSUMER, {}, answers)
    with servers(logs, first, second) as both:
        yield both[0], both[1]


def _swa(**options: Any) -> dict[str, Any]:
    return {
        "max_num_batched_tokens": 96,
        "additional_config": {"swa": {"window": WINDOW, **options}},
    }


@pytest.fixture(scope="module")
def pair(
    tiny_model: ModelFactory, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Server]]:
    """All layers slide. The first stores survivors alone; the second has a small pool."""
    fills = _swa(prefill_pages="survivors")
    answers = {**_swa(), "num_gpu_blocks_override": NUM_PAGES}
    with _pair(tiny_model(**FULL), tmp_path_factory.mktemp("logs"), fills, answers) as both:
        yield both


def _check_served(
    both: tuple[Server, Server], model: Path, full: set[int], lengths: tuple[int, ...]
) -> None:
    """Two turns of conversations are exact, move what is needed, and give every page back."""
    fills, answers = both
    prompts = random_prompts(lengths)
    dense = DenseQwen3(
        model, Sight(tuple(None if i in full else WINDOW for i in range(NUM_LAYERS)))
    )
    served = answers.serve(prompts, NUM_TOKENS, fills.fill(prompts))
    check_exact(prompts, [s.answer for s in served], dense)
    assert answers.bytes_read() == sum(num_prompt_bytes(length, full) for length in lengths)
    # The next turn finds the last one's pages in both prefix caches.
    told = [s.answer.tokens + [7] * PAGE_SIZE for s in served]
    longer = [prompt + more for prompt, more in zip(prompts, told, strict=True)]
    again = answers.serve(longer, NUM_TOKENS, fills.fill(longer))
    check_exact(longer, [s.answer for s in again], dense)
    assert again[-1].answer.num_cached_tokens > 0
    for settled in (fills.settle(), answers.settle()):
        assert settled["requests"] == settled["held"] == 0
        assert settled["live"] == settled["requests_live"] == 0
        assert settled["peak"] > 0
        assert settled["prefix_hit_tokens"] > 0


def test_two_servers_have_the_tokens_of_one(
    pair: tuple[Server, Server], tiny_model: ModelFactory
) -> None:
    _check_served(pair, tiny_model(**FULL), set(), LENGTHS)


@pytest.mark.parametrize(
    "sizes",
    [(1, 1), *(pytest.param(sizes, marks=pytest.mark.full) for sizes in ((2, 2), (1, 2), (2, 1)))],
    ids=str,
)
def test_full_layers_and_tensor_parallel_servers(
    sizes: tuple[int, int], tiny_model: ModelFactory, tmp_path: Path
) -> None:
    swa = _swa(prefill_pages="all", full_attention_layers="1,3", debug_poison=False)
    fills, answers = ({**swa, "tensor_parallel_size": size} for size in sizes)
    model = tiny_model(**FULL)
    with _pair(model, tmp_path, fills, answers) as both:
        _check_served(both, model, {1, 3}, LENGTHS[-2:])
        # The server that answers is killed: pages come back when nobody renews their lease.
        filling, answering = both
        prompts = random_prompts([100, 200], seed=1)
        answering.begin(prompts, filling.fill(prompts))
        answering.stop()
        assert filling.settle()["held"] == 0


def test_what_ends_early_leaves_nothing(
    pair: tuple[Server, Server], tiny_model: ModelFactory
) -> None:
    """Aborted before its pages are read, preempted, or asked for too many tokens."""
    fills, answers = pair
    prompts = random_prompts([270, 300, 280, 290])
    dense = DenseQwen3(tiny_model(**FULL), Sight((WINDOW,) * NUM_LAYERS))
    abandoned, *others = fills.fill(prompts)
    answers.abandon(prompts[0], abandoned)
    served = answers.serve(prompts[1:], NUM_TOKENS, others)
    check_exact(prompts[1:], [s.answer for s in served], dense)
    preempted, num_preempted = answers.serve_preempted(prompts, NUM_TOKENS, fills.fill(prompts))
    assert num_preempted == len(prompts)
    check_exact(prompts, [s.answer for s in preempted], dense)
    assert answers.settle()["held"] == fills.settle()["held"] == 0
    # Tokens behind the prompt would move the window; it ends after one, whatever is asked for.
    (longer,) = fills.serve(prompts[:1], 40, [FOR_ANOTHER])
    assert len(longer.answer.tokens) == 1
    (last,) = answers.serve(prompts[:1], NUM_TOKENS, [longer.transfer])
    check_exact(prompts[:1], [last.answer], dense)


def test_a_window_of_another_size_is_refused_at_the_handshake(
    pair: tuple[Server, Server], tiny_model: ModelFactory, tmp_path: Path
) -> None:
    """No page moves, and both windows are named; as it may, this server computes the prompt."""
    fills, _ = pair
    wrong = {"additional_config": {"swa": {"window": WINDOW + 8}}}
    prompts = random_prompts([100])
    model = tiny_model(**FULL)
    with servers(tmp_path, (model, CONSUMER, {"recomputes": True}, wrong)) as (other,):
        served = other.serve(prompts, NUM_TOKENS, fills.fill(prompts))
        dense = DenseQwen3(model, Sight((WINDOW + 8,) * NUM_LAYERS))
        check_exact(prompts, [s.answer for s in served], dense)
        assert other.bytes_read() == 0
        log = other.log.read_text()
        for window in (WINDOW, WINDOW + 8):
            assert f"(layers 0-3: window {window}, pages of {PAGE_SIZE}; rope " in log
        assert other.settle()["held"] == 0
    # Nobody asks for these pages: they come back when their lease ends.
    assert fills.settle()["held"] == 0


def test_a_server_that_dies_fails_only_what_it_had(pair: tuple[Server, Server]) -> None:
    """The last test: it ends the server that computes prompts."""
    fills, answers = pair
    prompts = random_prompts([100, 110])
    transfers = fills.fill(prompts)
    fills.stop()
    failed = answers.serve(prompts[:1], NUM_TOKENS, transfers[:1])
    assert [f.reason for f in failed] == ["error"]
    (served,) = answers.serve(prompts[1:], NUM_TOKENS, [None])
    assert len(served.answer.tokens) == NUM_TOKENS
    assert answers.settle()["held"] == 0
