"""`vllm serve` with the plugin over HTTP, on real weights with mixed layers."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from quickstart import PAGE_SIZE, SERVE_ARGS, Server

pytestmark = pytest.mark.alone

# Parsers of Qwen3 look these up; the demo's tokenizer has none.
QWEN3_TOKENS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
PARSERS = [
    "--reasoning-parser",
    "qwen3",
    "--enable-auto-tool-choice",
    "--tool-call-parser",
    "hermes",
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def url(demo_model: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("serve")
    model = directory / "model"
    model.mkdir()
    for file in demo_model["mixed"].iterdir():
        os.symlink(file.resolve(), model / file.name)
    tokenizer = AutoTokenizer.from_pretrained(demo_model["mixed"])
    tokenizer.add_special_tokens({"additional_special_tokens": QWEN3_TOKENS})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink()
    tokenizer.save_pretrained(model)
    server = Server(
        model, directory / "log", [*SERVE_ARGS, *PARSERS, "--block-size", str(PAGE_SIZE)]
    )
    try:
        server.wait()
        yield server.url
    finally:
        server.stop()


def _post(url: str, path: str, **request: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/{path}", json={"model": "demo", **request}, timeout=300)


def _chat(url: str, text: str, **request: Any) -> httpx.Response:
    messages = [{"role": "user", "content": text}]
    return _post(
        url, "chat/completions", messages=messages, temperature=0, max_tokens=24, **request
    )


def _said(message: dict[str, Any]) -> str:
    """All text: without a closing tag, Qwen3's reasoning parser takes everything for thought."""
    return "".join(str(v) for k, v in message.items() if k != "role" and isinstance(v, str))


def test_completion(url: str) -> None:
    response = _post(
        url, "completions", prompt="The capital of France is", temperature=0, max_tokens=8
    )
    assert "Paris" in response.json()["choices"][0]["text"]


def test_chat(url: str) -> None:
    body = _chat(url, "What is the capital of France?").json()
    assert "Paris" in _said(body["choices"][0]["message"])
    assert body["choices"][0]["finish_reason"] == "stop"


def test_reasoning_parser_splits_thought_from_answer(url: str) -> None:
    body = _chat(
        url,
        "What is the capital of France?",
        chat_template_kwargs={"enable_thinking": False},
    ).json()
    assert "Paris" in body["choices"][0]["message"]["content"]


def test_tool_parser_lets_an_answer_without_call_through(url: str) -> None:
    body = _chat(url, "What is the capital of France?", tools=[WEATHER]).json()
    message = body["choices"][0]["message"]
    assert _said(message)
    assert not message.get("tool_calls")


def test_streaming_gives_the_same_text(url: str) -> None:
    question = "Name three animals that live in the sea."
    expected = _said(_chat(url, question).json()["choices"][0]["message"])
    text = ""
    request = {
        "model": "demo",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 24,
        "stream": True,
    }
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=request, timeout=300) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    text += _said(choice["delta"])
    assert text == expected


def test_concurrent_clients_get_what_they_get_alone(url: str) -> None:
    """Prompts from far below one window to far above, in one batch."""
    prompts = ["Count: one, two, three, " * n for n in (1, 8, 30, 90)]

    def complete(prompt: str) -> str:
        response = _post(url, "completions", prompt=prompt, temperature=0, max_tokens=16)
        return str(response.json()["choices"][0]["text"])

    alone = [complete(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(complete, prompts)) == alone


def test_prompt_beyond_max_model_len_is_refused(url: str) -> None:
    response = _post(url, "completions", prompt="word " * 5000, max_tokens=8)
    assert response.status_code == 400
    assert "maximum context length" in response.text
