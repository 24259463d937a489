"""The files that managers count in: whose they are, who may read them, and until when."""

import errno
import logging
import os
import stat
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families
from vllm import EngineArgs

import swa_vllm
from swa_backend.metrics import PageCounts
from swa_vllm.compat.envs import METRICS_DIR
from swa_vllm.metrics import scrape
from swa_vllm.metrics.board import Owner, PageBoard, board_files, expect_engines, read_counts
from tests.helpers.engines import ModelFactory, resolve_here
from tests.helpers.metrics import samples
from tests.helpers.tiny_models import FULL, SLIDING, save_tiny_moe


@pytest.fixture
def private_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(METRICS_DIR, str(tmp_path))
    return tmp_path


def test_files_are_the_owners_alone(private_board: Path) -> None:
    mask = os.umask(0)
    try:
        board = PageBoard(Owner("17_dp1", 1, 3))
    finally:
        os.umask(mask)
    board.add("skipped", 7)
    files = [*private_board.iterdir()]
    assert len(files) == 3
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE(os.stat(scrape.EngineCounts().path).st_mode) == 0o700
    assert read_counts(map(str, files)) == {(1, 3): PageCounts(skipped=7)}


def test_engines_in_one_directory_are_told_apart(private_board: Path) -> None:
    for owner, amount in ((Owner("1", 0, 0), 5), (Owner("12", 0, 0), 7), (Owner("1", 1, 0), 9)):
        PageBoard(owner).add("allocated", amount)
    assert {k: c.allocated for k, c in read_counts(board_files(private_board, "1")).items()} == {
        (0, 0): 5,
        (1, 0): 9,
    }


def test_a_board_made_again_starts_anew(private_board: Path) -> None:
    """As when vLLM makes an engine's managers again: the old one's counts are nobody's."""
    old, new = PageBoard(Owner("1", 0, 0)), PageBoard(Owner("1", 0, 0))
    old.add("allocated", 3)
    new.add("allocated", 5)
    (counts,) = read_counts(board_files(private_board)).values()
    assert counts.allocated == 5


def test_an_engine_on_another_machine_counts_for_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(METRICS_DIR, str(tmp_path / "elsewhere"))
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger="vllm"):
            board = PageBoard(Owner("1", 4, 0))
    finally:
        logger.removeHandler(caplog.handler)
    board.add("allocated", 3)
    assert board.snapshot().allocated == 3
    (message,) = set(caplog.messages)  # twice, where "vllm" still propagates
    assert message.startswith("SWA metrics of engine 4 are not served")


# An engine core as far as files go.
_ENGINE_PROCESS = """
from swa_vllm.metrics.board import Owner, PageBoard
board = PageBoard(Owner("7", 0, 1))
board.add("allocated", 5)
board.add("live_sink", 2)
print("counted", flush=True)
input()
"""


def test_a_killed_engine_leaves_the_scrape_and_its_successor_starts_at_zero() -> None:
    collector = scrape.EngineCounts()
    registry = CollectorRegistry()
    registry.register(collector)
    expect_engines(collector.path, "7", [0])
    assert samples(generate_latest(registry).decode()) == {"swa_engine_scraped": 0}
    path = os.pathsep.join(sys.path)
    for _ in range(2):
        engine = subprocess.Popen(
            [sys.executable, "-c", _ENGINE_PROCESS],
            env={**os.environ, METRICS_DIR: collector.path, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert engine.stdout is not None
            assert "counted\n" in iter(engine.stdout.readline, "")
            now = samples(generate_latest(registry).decode())
            counted = {name: value for name, value in now.items() if value}
            assert counted == {
                "swa_pages_allocated_total": 5,
                "swa_pages_live:sink": 2,
                "swa_engine_scraped": 1,
            }
        finally:
            engine.kill()
            engine.communicate()
        assert samples(generate_latest(registry).decode()) == {"swa_engine_scraped": 0}


def test_an_engine_whose_number_another_users_process_has_leaves_the_scrape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    collector = scrape.EngineCounts()
    monkeypatch.setenv(METRICS_DIR, collector.path)
    PageBoard(Owner("7", 0, 1)).add("allocated", 5)
    assert [*collector.collect()]

    def kill(pid: int, signal: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "kill", kill)
    assert [*collector.collect()] == []


def _directory_for(model: Path, monkeypatch: pytest.MonkeyPatch, **kwargs: object) -> str | None:
    monkeypatch.delenv(METRICS_DIR, raising=False)
    EngineArgs(str(model), skip_tokenizer_init=True, **kwargs).create_engine_config()
    return os.environ.get(METRICS_DIR)


def test_engines_count_where_their_server_reads(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert _directory_for(tiny_model(**FULL), monkeypatch) is None
    own = _directory_for(tiny_model(**SLIDING), monkeypatch)
    assert own == _directory_for(tiny_model(**SLIDING), monkeypatch)  # registered once
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert _directory_for(tiny_model(**SLIDING), monkeypatch) == str(tmp_path)


@dataclass(frozen=True)
class Deployment:
    """How data parallel engines are divided among machines.

    Attributes:
        here: engines on the machine of the server.
        elsewhere: engines on others that it sends requests to.
        options: of the server.
        environment: its variables.
    """

    here: set[int]
    elsewhere: set[int] = field(default_factory=set)
    options: dict[str, object] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


DEPLOYMENTS = {
    "one engine": Deployment({0}),
    "one machine": Deployment({0, 1}, options={"data_parallel_size": 2}),
    "two machines": Deployment(
        {0, 1}, {2, 3}, {"data_parallel_size": 4, "data_parallel_size_local": 2}
    ),
    "all on other machines": Deployment(
        set(), {0, 1}, {"data_parallel_size": 2, "data_parallel_size_local": 0}
    ),
    "hybrid load balancing": Deployment(
        {2, 3},
        options={
            "data_parallel_size": 4,
            "data_parallel_size_local": 2,
            "data_parallel_start_rank": 2,
            "data_parallel_hybrid_lb": True,
        },
    ),
    "external load balancing": Deployment(
        {3}, options={"data_parallel_size": 4, "data_parallel_rank": 3}
    ),
    "offline, a process for each engine": Deployment(
        {1}, environment={"VLLM_DP_SIZE": "2", "VLLM_DP_RANK": "1"}
    ),
}


@pytest.fixture(scope="module")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    swa_vllm.register()
    resolve_here("Qwen3MoeForCausalLM")
    return save_tiny_moe(tmp_path_factory.mktemp("moe"), **SLIDING)


def _engines_scraped(registry: CollectorRegistry) -> dict[int, float]:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        int(sample.labels["engine"]): sample.value
        for family in families
        for sample in family.samples
        if sample.name == "swa_engine_scraped"
    }


@pytest.mark.parametrize("num_api_servers", [1, 2])
@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_scrape_names_the_engines_that_it_lacks(
    name: str,
    num_api_servers: int,
    tiny_moe: Path,  # other models have no external load balancing in vLLM
    monkeypatch: pytest.MonkeyPatch,
    vllm_variables: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    deployment, registry = DEPLOYMENTS[name], CollectorRegistry()
    for variable, value in deployment.environment.items():
        vllm_variables.setenv(variable, value)
    if num_api_servers == 1:
        collector = scrape.EngineCounts()
        registry.register(collector)
        monkeypatch.setattr(scrape, "_counts_collector", lambda: collector)
    else:
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
        MultiProcessCollector(registry)
    _directory_for(tiny_moe, monkeypatch, **deployment.options)
    assert _engines_scraped(registry) == dict.fromkeys(deployment.here | deployment.elsewhere, 0)
    for engine in deployment.here:
        for group in (0, 1):
            PageBoard(Owner("7", engine, group))
    if num_api_servers > 1:  # each makes the configuration again
        _directory_for(tiny_moe, monkeypatch, **deployment.options)
    assert _engines_scraped(registry) == {
        **dict.fromkeys(deployment.here, 1),
        **dict.fromkeys(deployment.elsewhere, 0),
    }


def test_a_server_without_page_managers_expects_no_counts(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    _directory_for(tiny_model(**SLIDING), monkeypatch, disable_hybrid_kv_cache_manager=True)
    assert [*tmp_path.iterdir()] == []
