"""A server whose pool is just large enough: under load, then killed, and started again.

Neither its home directory nor vLLM's caches can be written.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
import vllm

from quickstart import Server
from tests.helpers.dense_qwen3 import DenseQwen3, Sight
from tests.helpers.engines import ModelFactory
from tests.helpers.metrics import samples, value
from tests.helpers.paths import ROOT
from tests.helpers.servers import family, member, stream_and_kill, wait_for_end, wait_until
from tests.helpers.tiny_models import MIXED, PAGE_SIZE, WINDOW, random_prompts
from tests.server.soak import MAX_MODEL_LEN, TIMEOUT_S, Soak, memory_curve, replay, run_soak, sample

pytestmark = pytest.mark.alone

SINKS = 4
NUM_PAGES = 32  # 1.3 of the longest requests
SERVE_ARGS = [
    *("--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"),
    *("--skip-tokenizer-init", "--max-model-len", str(MAX_MODEL_LEN), "--enable-prefix-caching"),
    *("--block-size", str(PAGE_SIZE), "--num-gpu-blocks-override", str(NUM_PAGES)),
    *("--max-num-batched-tokens", "128", "--max-num-seqs", "16"),
    *("--additional-config", json.dumps({"swa": {"sink_tokens": SINKS}})),
]
SHORT_S = 25
LEAK_BYTES = 1024  # a request that something still refers to has more than that
RESULT = ROOT / "examples" / "results" / "soak.json"
RecordProperty = Callable[[str, object], None]


@pytest.fixture(scope="module")
def model(tiny_model: ModelFactory) -> Path:
    return tiny_model(**MIXED)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("server")
    (directory / "file").touch()
    home = directory / "file" / "home"  # nobody, not even root, makes a directory there
    return {"HOME": str(home), "VLLM_CACHE_ROOT": str(home / "vllm"), "TMPDIR": str(directory)}


@pytest.fixture(scope="module")
def server(
    model: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with _served(model, tmp_path_factory.mktemp("soak"), environment) as server:
        yield server


@contextmanager
def _served(
    model: Path, directory: Path, environment: dict[str, str], *args: str
) -> Iterator[Server]:
    server = Server(model, directory / "log", [*SERVE_ARGS, *args], environment)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@dataclass(frozen=True)
class Verdict:
    """Of answers given again: how many were judged how.

    Attributes:
        replayed: asked for again on the quiet server.
        differed: had other tokens than the first time.
        scored: compared with the dense oracle: both answers of those, and some of the others.
        wrong: have a token that is not the oracle's best, ties within its fp32 noise aside.
    """

    replayed: int
    differed: int
    scored: int
    wrong: int


def _judge(url: str, model: Path, soak: Soak, num_replayed: int, num_scored: int) -> Verdict:
    oracle = DenseQwen3(model, Sight((None, None, WINDOW, WINDOW), SINKS))
    replayed = replay(url, soak, num_replayed)
    differ = [(a, got) for a, first, again in replayed if first != again for got in (first, again)]
    agree = [(a, first) for a, first, again in replayed if first == again]
    chosen = differ + agree[:: max(1, len(agree) // num_scored)]
    wrong = 0
    for ask, tokens in chosen:
        score = oracle.score(ask.prompt + tokens)
        expected = score.logprobs[len(ask.prompt) - 1 : -1]
        given = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        wrong += bool((expected.max(dim=-1).values - given).max() > score.noise)
    return Verdict(len(replayed), len(differ) // 2, len(chosen), wrong)


def _is_idle(url: str) -> bool:
    metrics = httpx.get(f"{url}/metrics", timeout=30).text
    return not value(metrics, "vllm:num_requests_running") + value(
        metrics, "vllm:num_requests_waiting"
    )


def _soak(
    server: Server, model: Path, seconds: float, num_replayed: int, num_scored: int
) -> dict[str, Any]:
    """Run, check that nothing was lost or leaked, and say what was done."""
    logged = server.log_path.stat().st_size
    soak = run_soak(server.url, server.process.pid, seconds)
    wait_until(lambda: _is_idle(server.url))
    metrics = httpx.get(f"{server.url}/metrics", timeout=30).text
    last = sample(metrics, psutil.Process(server.process.pid))
    verdict = _judge(server.url, model, soak, num_replayed, num_scored)
    result = {
        "command": "bash tests/run.sh -m soak",
        "vllm": vllm.__version__,
        "cores": os.cpu_count(),
        "seconds": seconds,
        "pages": NUM_PAGES - 1,
        "requests": dict(soak.ends),
        "requests_per_s": round(soak.ends.total() / seconds, 1),
        "tokens_of_finished": sum(len(tokens) for _, tokens in soak.finished),
        "preemptions": last.preemptions,
        "prefix_hit_tokens": last.cached_tokens,
        "leaked_pages": value(metrics, "vllm:kv_cache_usage_perc") * (NUM_PAGES - 1),
        "swa": last.swa,
        "answers": asdict(verdict),
        "resident_mib_by_quarter": memory_curve(soak),
    }
    assert b"ERROR" not in server.log_path.read_bytes()[logged:]
    assert verdict.wrong == 0
    assert result["leaked_pages"] == 0
    held = ("swa_pages_live:", "swa_pages_reserved", "swa_requests_live")
    assert not any(count for name, count in last.swa.items() if name.startswith(held))
    # It did what it is for.
    assert last.preemptions > 0
    assert last.cached_tokens > 0
    assert last.swa["swa_pages_freed_total"] > 0
    assert last.swa["swa_pages_skipped_total"] > 0
    assert min(soak.ends[end] for end in ("finished", "disconnected", "aborted")) > 0
    return result


def test_nothing_is_lost_or_leaked(
    server: Server, model: Path, record_property: RecordProperty
) -> None:
    result = _soak(server, model, SHORT_S, num_replayed=16, num_scored=4)
    record_property("summary: soak requests", sum(result["requests"].values()))


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_nothing_is_lost_or_leaked_in_the_long_run(
    server: Server, model: Path, record_property: RecordProperty
) -> None:
    seconds = float(os.environ.get("SWA_SOAK_SECONDS", "1200"))
    result = _soak(server, model, seconds, num_replayed=300, num_scored=40)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    record_property("summary: soak requests", sum(result["requests"].values()))
    num_requests = sum(result["requests"].values()) / 2  # between the middles of two quarters
    for name, (_, second, _, last) in result["resident_mib_by_quarter"].items():
        assert (last - second) * 2**20 < LEAK_BYTES * num_requests, name


def _error_when_killed(server: Server, title: str) -> str:
    """What a client is told whose stream breaks off; the server and all its processes end."""
    processes = family(server)
    events = stream_and_kill(server.url, member(server, title).kill)
    wait_for_end(server, processes)
    return str(events[-1]["error"]["message"])


@pytest.fixture(scope="module")
def error_of_killed_engine(server: Server) -> str:
    return _error_when_killed(server, "EngineCore")


@pytest.fixture(scope="module")
def successor(
    error_of_killed_engine: str,
    model: Path,
    environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """Started by the same command as the server whose engine was killed."""
    with _served(model, tmp_path_factory.mktemp("successor"), environment) as server:
        yield server


def test_killed_engine_is_an_error_and_an_end(
    error_of_killed_engine: str, environment: dict[str, str]
) -> None:
    assert "EngineCore encountered an issue" in error_of_killed_engine
    assert not [*Path(environment["TMPDIR"]).glob("swa-*")]


def test_successor_of_a_killed_engine_counts_from_zero(successor: Server) -> None:
    """A prompt of 100 tokens and 60 of answer, twice; pages of 32, the first one is the sinks'.

    159 tokens are stored, with 4 slots for copies of sinks in 6 pages. The chunk needs the first 4
    of them; token 158 sees 119 and later, so that pages 1 and 2 are freed. The second time 96
    tokens are hit, and pages 3 to 5 are new.
    """
    body = {"model": "tiny", "prompt": random_prompts([100])[0], "max_tokens": 60}
    counted = [_counts(successor.url)]
    for _ in range(2):
        url = f"{successor.url}/v1/completions"
        httpx.post(url, json=body, timeout=TIMEOUT_S).raise_for_status()
        counted.append(_counts(successor.url))
    served = {
        "swa_pages_allocated_total": 6,
        "swa_pages_freed_total": 2,
        "swa_pages_peak_per_request": 4,
    }
    again = {
        **served,
        "swa_pages_allocated_total": 6 + 3,
        "swa_pages_freed_total": 2 + 2,
        "swa_prefix_hit_tokens_total": 96,
    }
    constants = {
        "swa_window_tokens": WINDOW,
        "swa_sink_tokens": SINKS,
        "swa_engine_scraped": 1,
    }
    assert counted == [constants, {**constants, **served}, {**constants, **again}]


def _counts(url: str) -> dict[str, float]:
    metrics = samples(httpx.get(f"{url}/metrics", timeout=TIMEOUT_S).text)
    return {name: count for name, count in metrics.items() if count}


@pytest.mark.full  # tests/server/test_ray.py kills one of Ray's by default
def test_killed_worker_is_an_error_and_an_end(
    model: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("worker")
    environment = {**environment, "TMPDIR": str(directory)}
    with _served(model, directory, environment, "--tensor-parallel-size", "2") as server:
        assert "EngineCore encountered an issue" in _error_when_killed(server, "Worker_TP1")
        assert not [*directory.glob("swa-*")]
