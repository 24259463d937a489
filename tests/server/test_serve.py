"""`vllm serve` with the plugin over HTTP, on real weights with mixed layers."""

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from transformers import AutoTokenizer

import swa_backend
from quickstart import PAGE_SIZE, SERVE_ARGS, Server
from swa_backend.metrics import ENGINE_SCRAPED, METRICS, OPTIONS_INFO
from tests.bad_input.requests import EMBEDS, REQUESTS
from tests.bad_input.row import Bad
from tests.helpers.engines import ModelFactory
from tests.helpers.metrics import gained, samples
from tests.helpers.paths import ROOT
from tests.helpers.servers import TIMEOUT_S, family, has_ended, member, wait_for_end, wait_until
from tests.helpers.tiny_models import MIXED, random_prompts

DASHBOARD = ROOT / "examples" / "grafana_dashboard.json"

pytestmark = pytest.mark.long

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
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server puts its temporary files."""
    return tmp_path_factory.mktemp("tmp")


@pytest.fixture(scope="module")
def server(
    demo_model: dict[str, Path], temporary: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
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
        model,
        directory / "log",
        [*SERVE_ARGS, *PARSERS, "--block-size", str(PAGE_SIZE)],
        {"TMPDIR": str(temporary)},
    )
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def url(server: Server) -> str:
    return server.url


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


@pytest.mark.everywhere
def test_completion(url: str) -> None:
    response = _post(
        url, "completions", prompt="The capital of France is", temperature=0, max_tokens=8
    )
    assert "Paris" in response.json()["choices"][0]["text"]


@pytest.mark.everywhere
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


@pytest.mark.everywhere
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


@pytest.mark.everywhere
def test_concurrent_clients_get_what_they_get_alone(url: str) -> None:
    """Prompts from far below one window to far above, in one batch."""
    prompts = ["Count: one, two, three, " * n for n in (1, 8, 30, 90)]

    def complete(prompt: str) -> str:
        response = _post(url, "completions", prompt=prompt, temperature=0, max_tokens=16)
        return str(response.json()["choices"][0]["text"])

    alone = [complete(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(complete, prompts)) == alone


def _scrape(url: str, engine: int = 0) -> dict[str, float]:
    response = httpx.get(f"{url}/metrics", timeout=30)
    assert response.status_code == 200
    return samples(response.text, engine)


def _complete(url: str, prompt: list[int], num_tokens: int, **headers: str) -> None:
    request = {"model": "demo", "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True}
    response = httpx.post(f"{url}/v1/completions", json=request, headers=headers, timeout=300)
    assert response.status_code == 200, response.text


def _engine_files(server: Server) -> list[Path]:
    """The files that the server's engines map to count in."""
    mapped = {map_.path for map_ in member(server, "EngineCore").memory_maps()}
    return [Path(path) for path in mapped if path.endswith(".db") and "_swa-" in path]


@pytest.mark.everywhere
def test_metrics_are_what_the_requests_make_them(url: str) -> None:
    """A prompt of 510 tokens and 4 of answer, with 128 of window in pages of 32; twice.

    The chunk keeps 5 of its pages 0 to 15. The last token stored is 512, in page 16; it sees 385
    and later, from page 12 on. The second time 480 tokens are hit, and pages 15 and 16 are new.
    """
    (prompt,) = random_prompts([510], seed=510)
    start = _scrape(url)
    _complete(url, prompt, 4)
    first = _scrape(url)
    assert gained(start, first) == {
        "swa_pages_allocated_total": 6,
        "swa_pages_skipped_total": 11,
        "swa_pages_freed_total": 1,
    }
    _complete(url, prompt, 4)
    assert gained(first, _scrape(url)) == {
        "swa_pages_allocated_total": 2,
        "swa_pages_freed_total": 1,
        "swa_prefix_hit_tokens_total": 480,
    }
    assert (first["swa_window_tokens"], first["swa_sink_tokens"]) == (128, 0)


def test_metrics_of_a_request_that_runs_and_of_one_that_is_aborted(url: str) -> None:
    request = {"model": "demo", "prompt": random_prompts([300], seed=300)[0], "stream": True}
    body = {**request, "max_tokens": 3000, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=300) as response:
        lines = response.iter_lines()  # dropped, it would end the request
        next(lines)
        now = _scrape(url)
        assert (now["swa_requests_live"], now["swa_pages_reserved"]) == (1, 10)
        assert now["swa_pages_live:window"] in (4, 5)
        assert now["swa_pages_live:sink"] == now["swa_pages_live:prefill"] == 0
    wait_until(lambda: _scrape(url)["swa_requests_live"] == 0)
    after = _scrape(url)
    assert after["swa_pages_reserved"] == after["swa_pages_live:window"] == 0


def test_metrics_are_documented_in_the_scrape_and_private_on_the_way(server: Server) -> None:
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    for metric in (*METRICS.values(), ENGINE_SCRAPED, OPTIONS_INFO):
        assert f"# HELP {metric.sample} {metric.help}" in text
        assert f"# TYPE {metric.sample} {metric.type}" in text
    (options,) = [line for line in text.splitlines() if line.startswith("swa_options_info{")]
    assert set(re.findall(r'(\w+)="([^"]*)"', options)) == {
        *(("engine", "0"), ("version", swa_backend.__version__), ("window", "128")),
        *(("sink_tokens", "0"), ("phase", "both")),
        *(("sliding_layers", "15"), ("full_layers", "15")),
    }
    assert options.endswith(" 1.0")
    shown = {
        name
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\bswa_\w+", target["expr"])
    }
    assert shown <= set(re.findall(r"^(swa_\w+)\{", text, re.MULTILINE))
    files = _engine_files(server)
    assert len(files) == 2
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    (directory,) = {file.parent for file in files}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


GOOD = {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 8, "logprobs": 1}


@pytest.fixture(scope="module")
def before(server: Server) -> tuple[Any, int]:
    """The answer to a good request, and the length of the log, before any bad one."""
    answer = _post(server.url, "completions", **GOOD).json()["choices"]
    return answer, server.log_path.stat().st_size


@pytest.mark.parametrize("row", REQUESTS, ids=[row.name for row in REQUESTS])
def test_bad_request_is_refused(
    row: Bad, url: str, before: Any, record_property: Callable[[str, object], None]
) -> None:
    record_property("summary: bad inputs", 1)
    path, body, status = row.given
    if isinstance(body, bytes):
        headers = {"Content-Type": "application/json"}
        response = httpx.post(f"{url}/v1/{path}", content=body, headers=headers, timeout=60)
    else:
        response = _ask(url, path, body)
    assert response.status_code == status, response.text
    answer = response.json()
    row.check_text(answer["error"]["message"] if "error" in answer else answer["detail"])


def _ask(url: str, path: str, keys: dict[str, Any]) -> httpx.Response:
    """Post a good request, but for these keys."""
    if path == "completions":
        return _post(url, path, **{**GOOD, **keys})
    messages = [{"role": "user", "content": "Hello"}]
    return _post(url, path, **{"messages": messages, "max_tokens": 4, **keys})


@pytest.mark.parametrize("row", [row for row in REQUESTS if row.remedies], ids=lambda row: row.name)
def test_what_a_refusal_tells_is_served(
    row: Bad, url: str, record_property: Callable[[str, object], None]
) -> None:
    num_applied = 0
    for keys, arguments in row.remedies:
        if not arguments:
            response = _ask(url, row.given[0], keys)
            assert response.status_code == 200, response.text
            num_applied += 1
    record_property("summary: remedies applied", num_applied)


def test_arguments_of_the_server_that_refusals_name(
    server: Server,
    demo_model: dict[str, Path],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    remedies = [
        (row.given[0], keys, arguments)
        for row in REQUESTS
        for keys, arguments in row.remedies
        if arguments
    ]
    named = [argument for *_, arguments in remedies for argument in arguments]
    other = Server(demo_model["mixed"], tmp_path / "log", [*SERVE_ARGS, *named])
    embeds = io.BytesIO()
    torch.save(torch.zeros(5, 576, dtype=torch.bfloat16), embeds)
    try:
        other.wait()
        for path, keys, _ in remedies:
            keys = {
                key: base64.b64encode(embeds.getvalue()).decode() if value == EMBEDS else value
                for key, value in keys.items()
            }
            response = _ask(other.url, path, keys)
            assert response.status_code == 200, response.text
    finally:
        other.stop()
    record_property("summary: remedies applied", len(remedies))


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\xff\x00\xff\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    ],
    ids=["no HTTP", "half of a request", "a negative length"],
)
def test_client_that_sends_garbage_and_leaves(sent: bytes, url: str, before: Any) -> None:
    port = int(url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(sent)
    assert httpx.get(f"{url}/health", timeout=30).is_success


def test_server_is_unhurt_by_all_of_them(server: Server, before: tuple[Any, int]) -> None:
    body = {"model": "demo", "prompt": "Once", "max_tokens": 3000, "stream": True, "n": 3}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=300) as response:
        lines = response.iter_lines()
        next(lines)  # and leaves
    wait_until(lambda: _scrape(server.url)["swa_requests_live"] == 0)
    now = _scrape(server.url)
    held = ("reserved", "live:window", "live:sink", "live:prefill")
    assert not any(now[f"swa_pages_{kind}"] for kind in held)
    answer, log_size = before
    assert _post(server.url, "completions", **GOOD).json()["choices"] == answer
    log = server.log_path.read_bytes()[log_size:].decode(errors="replace")
    assert not [line for line in log.splitlines() if " ERROR " in line or "Traceback" in line]


# Two data parallel engines, and as many API servers.
TWO_ENGINES = [
    *("--served-model-name", "demo", "--max-model-len", "512", "--enforce-eager"),
    *("--dtype", "float32", "--skip-tokenizer-init", "--block-size", str(PAGE_SIZE)),
    *("--num-gpu-blocks-override", "256", "--data-parallel-size", "2"),
    "--no-enable-prefix-caching",
]


def test_metrics_of_several_api_servers_and_engines_beside_another_server(
    url: str, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    """Two engines have two API servers; whichever answers says the same, until an engine is killed.

    Prompts of 300 tokens and answers of 40 store 339, in 11 pages of 32. A window of 40 keeps the
    last 3 pages of the chunk, 7 to 9, and frees those before page 9, the first that token 338 sees.
    """
    beside = _scrape(url)
    server = Server(tiny_model(**MIXED), tmp_path / "log", TWO_ENGINES)
    try:
        server.wait()
        (prompt,) = random_prompts([300])
        for rank in (0, 1, 1):
            _complete(server.url, prompt, 40, **{"X-data-parallel-rank": str(rank)})
        for _ in range(10):
            for engine, num_requests in ((0, 1), (1, 2)):
                now = _scrape(server.url, engine)
                assert {name: value for name, value in now.items() if value} == {
                    "swa_pages_allocated_total": num_requests * 4,
                    "swa_pages_skipped_total": num_requests * 7,
                    "swa_pages_freed_total": num_requests * 2,
                    "swa_pages_peak_per_request": 3,
                    "swa_window_tokens": 40,
                    "swa_engine_scraped": 1,
                }
        assert _scrape(url) == beside
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert sum("APIServer" in process.cmdline()[0] for process in family) == 2
        next(p for p in family if "EngineCore_DP1" in p.cmdline()[0]).kill()
        while server.process.poll() is None:  # vLLM ends all once it notices
            with contextlib.suppress(httpx.TransportError):
                assert _scrape(server.url, 1)["swa_pages_allocated_total"] == 8
    finally:
        server.stop()
    assert _scrape(url) == beside


@pytest.mark.full
def test_an_engine_on_another_machine_is_named_in_the_scrape(
    tiny_model: ModelFactory, tmp_path: Path
) -> None:
    """A headless process stands for that machine: its engine counts in a directory of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [
        *(*TWO_ENGINES, "--data-parallel-size-local", "1"),
        *("--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(port)),
    ]
    model, headless = tiny_model(**MIXED), ["--headless", "--data-parallel-start-rank", "1"]
    elsewhere = Server(model, tmp_path / "elsewhere", [*arguments, *headless])
    server = Server(model, tmp_path / "log", arguments)
    try:
        server.wait()
        _complete(server.url, [1, 2, 3], 4, **{"X-data-parallel-rank": "1"})
        for _ in range(10):
            here, there = (_scrape(server.url, engine) for engine in (0, 1))
            assert (here["swa_engine_scraped"], here["swa_window_tokens"]) == (1, 40)
            assert there == {"swa_engine_scraped": 0}
    finally:
        server.stop()
        elsewhere.stop()


def test_sigterm_in_prefill_ends_all_once_clients_let_go(server: Server, temporary: Path) -> None:
    """The last test of this file: it takes the server.

    The engine ends at once. The HTTP server, here as in stock vLLM, waits for its clients first.
    """
    assert [*temporary.glob("swa-metrics-*")]
    processes, engine = family(server), member(server, "EngineCore")

    async def terminate_while_asked() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S) as http:
            # Requests for one token are all prefill.
            bodies = [
                {"model": "demo", "prompt": prompt, "max_tokens": 1}
                for prompt in random_prompts([4000] * 4, seed=4000)
            ]
            asked = [asyncio.create_task(http.post("/v1/completions", json=b)) for b in bodies]
            await asyncio.to_thread(wait_until, lambda: _scrape(server.url)["swa_requests_live"])
            server.process.terminate()
            await asyncio.to_thread(wait_until, lambda: has_ended(engine))
            for request in asked:
                request.cancel()
            answers = await asyncio.gather(*asked, return_exceptions=True)
        assert not [a for a in answers if isinstance(a, httpx.Response) and a.is_success]

    asyncio.run(terminate_while_asked())
    wait_for_end(server, processes)
    assert not [*temporary.glob("swa-*")]
