"""The files that managers count in: whose they are, who may read them, and until when."""

import errno
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from vllm import EngineArgs

from swa_backend.metrics import PageCounts
from swa_vllm.compat.envs import METRICS_DIR
from swa_vllm.metrics import scrape
from swa_vllm.metrics.board import Owner, PageBoard, board_files, read_counts
from tests.helpers.engines import ModelFactory
from tests.helpers.metrics import samples
from tests.helpers.tiny_models import FULL, SLIDING


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
    assert len(files) == 2
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
            assert counted == {"swa_pages_allocated_total": 5, "swa_pages_live:sink": 2}
        finally:
            engine.kill()
            engine.communicate()
        assert samples(generate_latest(registry).decode()) == {}


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
