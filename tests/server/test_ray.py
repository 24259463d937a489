"""The real engine over a real Ray cluster: two nodes at loopback addresses, one device each."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from quickstart import Server
from ray_cluster.local_cluster import LocalRayCluster, local_ray_cluster
from swa_backend import __version__
from tests.helpers.dense_qwen3 import DenseQwen3, Sight
from tests.helpers.engines import Answer, EngineFactory, ModelFactory, generate
from tests.helpers.exactness import LENGTHS, check_exact
from tests.helpers.metrics import samples
from tests.helpers.ray_cluster import TIMEOUT_S, probe, python_with, workers
from tests.helpers.servers import END_TIMEOUT_S, family, stream_and_kill, wait_for_end
from tests.helpers.tiny_models import (
    FULL,
    MIXED,
    NUM_LAYERS,
    PAGE_SIZE,
    SLIDING,
    WINDOW,
    Oracle,
    random_prompts,
)
from tests.server.loopback import loopback_only, namespace

pytestmark = pytest.mark.alone

TP2 = {"tensor_parallel_size": 2}
WITH_SINKS = {
    "window": WINDOW,
    "full_attention_layers": "0-1",
    "sink_tokens": 4,
    "position_shift": True,
}
# Models, and arguments of their engines. One key/value head cannot be shared by two workers: each
# has a copy.
SERVED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mixed, sharded heads": (MIXED, {}),
    "sliding, replicated heads": ({**SLIDING, "num_key_value_heads": 1}, {}),
    "mixed with sinks": (FULL, {"additional_config": {"swa": WITH_SINKS}}),
}
CHUNKED: dict[str, Any] = {"max_num_batched_tokens": 48, "enable_prefix_caching": True}
SERVE_ARGS = [
    *("--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"),
    *("--skip-tokenizer-init", "--block-size", str(PAGE_SIZE), "--max-model-len", "512"),
]
NUM_TOKENS = 24


@pytest.fixture(scope="module", autouse=True)
def only_loopback() -> Iterator[bool]:
    """Whether all that this module starts has no other network, which only root can arrange."""
    with pytest.MonkeyPatch.context() as environment, contextlib.ExitStack() as stack:
        try:
            stack.enter_context(loopback_only())
        except PermissionError:
            message = (
                "Ray's servers listen on all addresses, behind a token: no right to prevent it"
            )
            warnings.warn(message, stacklevel=1)
            yield False
        else:
            environment.setenv("VLLM_HOST_IP", "127.0.0.1")  # else it looks for a way out
            yield True


@pytest.fixture(scope="module")
def cluster(only_loopback: bool) -> Iterator[LocalRayCluster]:
    with local_ray_cluster(2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def on_ray(cluster: LocalRayCluster, tiny_model: ModelFactory) -> dict[str, Any]:
    cases = {
        name: (tiny_model(**checkpoint), {**TP2, **CHUNKED, **arguments})
        for name, (checkpoint, arguments) in SERVED.items()
    }
    stages = {"pipeline_parallel_size": 2, "tensor_parallel_size": 1}
    others = {
        "stages": (tiny_model(**FULL), {**stages, **CHUNKED, **SERVED["mixed with sinks"][1]}),
        "too few devices": (tiny_model(**MIXED), {"tensor_parallel_size": 4}),
    }
    return probe(cluster, {**cases, **others}, LENGTHS)


def test_pipeline_stages_on_two_nodes_have_the_tokens_of_tensor_parallel_workers(
    on_ray: dict[str, Any],
) -> None:
    answers = _served(on_ray, "stages")
    assert [tokens for tokens, _ in answers] == [
        tokens for tokens, _ in _served(on_ray, "mixed with sinks")
    ]
    assert on_ray["stages"]["again"] == [tokens for tokens, _ in answers]
    assert len(on_ray["stages"]["nodes"]) == 2
    # Each has its own half of the layers, of which the first has full ones only.
    first, second = on_ray["stages"]["specs"]
    assert len(first) == len(second) == NUM_LAYERS // 2
    assert not any(spec.startswith("SWASpec") for spec in first.values())
    assert all(spec.startswith("SWASpec") for spec in second.values())
    assert on_ray["stages"]["leaked_pages"] == 0


@pytest.mark.parametrize("name", SERVED)
class TestTwoWorkersOnTwoNodes:
    def test_tokens_equal_one_workers_and_hugging_faces(
        self, name: str, on_ray: dict[str, Any], tiny_model: ModelFactory, engine: EngineFactory
    ) -> None:
        checkpoint, arguments = SERVED[name]
        model = tiny_model(**checkpoint)
        prompts = random_prompts(LENGTHS)
        alone = generate(engine(model, **CHUNKED, **arguments), prompts)
        answers = [Answer(tokens, logprobs, 0) for tokens, logprobs in _served(on_ray, name)]
        assert [a.tokens for a in answers] == [a.tokens for a in alone]
        sight = Sight((None, None, WINDOW, WINDOW), sinks=4, shift=True)
        oracle = DenseQwen3(model, sight) if "sinks" in name else Oracle(model)
        check_exact(prompts, answers, oracle)

    def test_workers_are_on_different_nodes_that_were_checked(
        self, name: str, on_ray: dict[str, Any]
    ) -> None:
        _served(on_ray, name)
        assert len(on_ray[name]["nodes"]) == 2
        assert on_ray[name]["executor"] == "NodeCheckingRayExecutor"

    def test_prefix_hits_change_no_token(self, name: str, on_ray: dict[str, Any]) -> None:
        assert on_ray[name]["again"] == [tokens for tokens, _ in _served(on_ray, name)]
        assert on_ray[name]["cached_tokens"][-1] > 0

    def test_workers_agree_on_windows_and_pages(self, name: str, on_ray: dict[str, Any]) -> None:
        _served(on_ray, name)
        first, second = on_ray[name]["specs"]
        assert first == second
        windowed = [spec for spec in first.values() if spec.startswith("SWASpec")]
        assert len(windowed) == (NUM_LAYERS if "sliding" in name else NUM_LAYERS // 2)
        assert all(f"sliding_window={WINDOW}" in spec for spec in windowed)
        assert on_ray[name]["num_kv_heads"] == [[1] * NUM_LAYERS] * 2

    def test_window_frees_pages_and_none_leaks(self, name: str, on_ray: dict[str, Any]) -> None:
        _served(on_ray, name)
        assert all(freed > 0 for freed in on_ray[name]["freed_by_window"])
        assert on_ray[name]["leaked_pages"] == 0

    def test_bytes_of_a_step_do_not_depend_on_the_context(
        self, name: str, on_ray: dict[str, Any]
    ) -> None:
        _served(on_ray, name)
        short, long = on_ray[name]["step_bytes"].values()
        assert short == long
        assert len(set(short)) <= 2  # one size, and another where a page is added


def _served(on_ray: dict[str, Any], name: str) -> list[tuple[list[int], list[float]]]:
    assert "error" not in on_ray[name], on_ray[name]["error"]
    return list(on_ray[name]["answers"])


def test_nobody_else_can_reach_the_cluster(only_loopback: bool, cluster: LocalRayCluster) -> None:
    if not only_loopback:
        pytest.skip("only root can make a network namespace")
    assert [name for _, name in socket.if_nameindex()] == ["lo"]
    assert {namespace(process.pid) for process in cluster.processes()} == {namespace()}


def test_too_few_devices_is_an_error_that_says_so(on_ray: dict[str, Any]) -> None:
    error = on_ray["too few devices"]["error"]
    assert "Cannot provide a placement group requiring 4.0 GPUs" in error
    assert "Tensor parallel size may exceed available GPUs in your cluster" in error


def test_a_node_that_does_not_answer_is_named(cluster: LocalRayCluster) -> None:
    code = """
import ray
from swa_vllm.distributed.nodes import installation_on_nodes
ray.init(log_to_driver=False)
installation_on_nodes({"10.0.0.9 (gone)": "ab" * 28})
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **cluster.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    message = r"SWAConfigError: node 10.0.0.9 \(gone\) could not be asked for its version"
    assert re.search(message, done.stderr), done.stderr[-2000:]


def post(url: str, prompt: list[int], **request: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": prompt, "temperature": 0, "ignore_eos": True}
    return httpx.post(
        f"{url}/v1/completions",
        json={**body, "return_token_ids": True, **request},
        timeout=TIMEOUT_S,
    )


def test_data_parallel_engines_give_the_same_tokens(
    cluster: LocalRayCluster, tiny_model: ModelFactory, engine: EngineFactory, tmp_path: Path
) -> None:
    model = tiny_model(**MIXED)
    prompts = random_prompts(LENGTHS)
    alone = generate(engine(model, **CHUNKED), prompts, NUM_TOKENS)
    host = cluster.address.split(":")[0]
    parallel = [
        *("--data-parallel-size", "2", "--data-parallel-size-local", "1"),
        *("--data-parallel-backend", "ray", "--data-parallel-address", host),
        *("--api-server-count", "1"),
    ]
    server = Server(model, tmp_path / "log", [*SERVE_ARGS, *parallel], cluster.environment)
    try:
        server.wait()
        with ThreadPoolExecutor(len(prompts)) as pool:
            replies = list(pool.map(lambda p: post(server.url, p, max_tokens=NUM_TOKENS), prompts))
        metrics = httpx.get(f"{server.url}/metrics", timeout=TIMEOUT_S).text
    finally:
        server.stop()
    tokens = [reply.json()["choices"][0]["token_ids"] for reply in replies]
    assert tokens == [answer.tokens for answer in alone]
    served = [line for line in metrics.splitlines() if line.startswith("vllm:prompt_tokens_total")]
    assert len(served) == 2
    assert all(float(line.split()[-1]) > 0 for line in served)
    pages = [samples(metrics, engine)["swa_pages_allocated_total"] for engine in (0, 1)]
    assert all(num_pages > 0 for num_pages in pages)
    # Ray's nodes of these tests are one machine.
    assert [samples(metrics, engine)["swa_engine_scraped"] for engine in (0, 1)] == [1, 1]


def test_killed_worker_is_an_error_and_an_end(
    cluster: LocalRayCluster, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    """The client gets an error, the server ends by itself, and no worker is left."""
    log = tmp_path / "log"
    arguments = [*SERVE_ARGS, *("--tensor-parallel-size", "2")]
    server = Server(
        tiny_model(**MIXED),
        log,
        [*arguments, *("--distributed-executor-backend", "ray")],
        cluster.environment,
    )
    try:
        server.wait()
        processes = family(server)
        events = stream_and_kill(server.url, lambda: workers(cluster)[1].kill())
        assert "EngineCore encountered an issue" in events[-1]["error"]["message"]
        wait_for_end(server, processes)
        # Whoever notices first: the other worker, whose connection broke, or the engine's monitor.
        causes = r"Worker failed with error|RayWorkerProc rank=\S+ died unexpectedly"
        assert re.search(causes, log.read_text())
        assert not psutil.wait_procs(workers(cluster), END_TIMEOUT_S)[1]
    finally:
        server.stop()


def test_nodes_that_lack_the_package_or_have_another_version_are_named(
    tiny_model: ModelFactory, tmp_path: Path
) -> None:
    """Three nodes: the head, one without the package, and one with an older version."""
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3}
    case = (tiny_model(**SLIDING, **heads), {"tensor_parallel_size": 3})
    with local_ray_cluster(1) as cluster:
        for version in (None, "0.0.9"):
            cluster.add_node(python_with(version, tmp_path / str(version)), PYTHONPATH="")
        error = probe(cluster, {"refused": case})["refused"]["error"]
    assert f"every Ray worker needs swa-backend {__version__}, which runs here, but" in error
    assert "node 127.0.0.3 (" in error
    assert ") has no swa-backend" in error
    assert "node 127.0.0.4 (" in error
    assert ") has swa-backend 0.0.9" in error
    assert f'run "pip install swa-backend=={__version__}"' in error
