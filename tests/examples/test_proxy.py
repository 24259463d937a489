"""The proxy before servers for prompts and servers for answers.

With real servers behind it: ``test_examples.py``.
"""

import asyncio
from typing import Any

import httpx
import pytest

from prefill_decode.proxy import FOR_ANOTHER, Proxy, for_prefill
from quickstart import free_port

NOBODY = f"http://127.0.0.1:{free_port()}"


def _ask(asked: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Proxy([NOBODY], [NOBODY]).app())
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            if isinstance(asked, bytes):
                return await client.post("/v1/completions", content=asked)
            return await client.post("/v1/completions", json=asked)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("asked", "status", "message"),
    [
        ({"prompt": "a", "n": 2}, 400, "n=2: one answer a request is served here"),
        ({"prompt": ["a", "b", "c"]}, 400, "3 prompts in one request: one is served here"),
        ({"prompt": [[1, 2], [3]]}, 400, "2 prompts in one request"),
        ({"prompt": "a", "use_beam_search": True}, 400, "beams are not divided among servers"),
        (["a"], 400, "the body is a JSON list; an object is allowed"),
        (b"{", 400, "the body is no JSON"),
        ({"prompt": [1, 2]}, 502, " does not answer"),
        ({"prompt": ["a"], "n": None}, 502, " does not answer"),
    ],
)
def test_proxy_says_what_it_cannot_do(asked: Any, status: int, message: str) -> None:
    response = _ask(asked)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


def test_proxy_asks_for_the_prompt_alone() -> None:
    """Without what is wrong of an answer of one token."""
    asked = {
        "model": "m",
        "messages": [],
        "max_completion_tokens": 50,
        "min_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 2,
        "temperature": 0.5,
    }
    assert for_prefill(asked) == {
        "model": "m",
        "messages": [],
        "temperature": 0.5,
        "max_tokens": 1,
        "kv_transfer_params": FOR_ANOTHER,
    }
