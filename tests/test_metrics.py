"""Counts of the page managers, exactly, and their way to whoever reads them."""

import dataclasses
import json
import logging
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from vllm import LLM, EngineArgs

import swa_vllm
from conftest import EngineFactory, ModelFactory
from engine_tools import generate, managers
from metric_tools import gained, samples
from swa_backend.metrics import METRICS, PageCounts
from swa_backend.pages import WindowPages
from swa_vllm import scrape
from swa_vllm.page_board import DIRECTORY, Owner, PageBoard, board_files, read_counts
from swa_vllm.tools.simulate import Arm, Engine, Simulation
from tiny_models import FULL, MIXED, SLIDING, WINDOW, random_prompts

DASHBOARD = Path(__file__).parents[1] / "examples" / "grafana_dashboard.json"
EMPTY = PageCounts(window_tokens=64)
# 64 tokens see 5 pages of 16 at most.
ENGINE = Engine(
    window=64, block_size=16, num_pages=200, max_num_batched_tokens=256, max_model_len=4096
)


@pytest.fixture
def private_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(DIRECTORY, str(tmp_path))
    return tmp_path


def test_every_count_has_a_metric_by_prometheus_conventions() -> None:
    assert [*METRICS] == [field.name for field in dataclasses.fields(PageCounts)]
    for metric in METRICS.values():
        assert metric.name.startswith("swa_")
        assert not metric.name.endswith("_total")
        assert metric.sample.endswith("_total") == (metric.type == "counter")
        assert metric.help.endswith(".")
    assert {m.sample for m in METRICS.values()} >= {
        *("swa_pages_freed_total", "swa_pages_skipped_total", "swa_pages_live"),
        *("swa_pages_reserved", "swa_window_tokens", "swa_sink_tokens", "swa_requests_live"),
        *("swa_prefix_hit_tokens_total", "swa_prefix_lost_tokens_total"),
    }
    assert [m.kind for m in METRICS.values() if m.kind] == ["window", "sink", "prefill"]


def test_kinds_of_held_pages() -> None:
    pages = WindowPages(window=8, page_size=4, sink_tokens=5)  # 2 sink pages, 3 window pages
    kinds = {0: (0, 0, 0), 1: (0, 1, 0), 2: (0, 2, 0), 3: (1, 2, 0), 5: (3, 2, 0), 9: (3, 2, 4)}
    assert {held: pages.kinds(held) for held in kinds} == kinds
    assert pages.kinds(9, num_ahead_tokens=5) == (5, 2, 2)


def test_counts_of_a_prompt_in_two_chunks() -> None:
    """512 tokens of prompt, 40 of answer; every number worked out by hand."""
    simulation = Simulation(Arm.SWA, ENGINE)
    manager = simulation.manager
    assert manager.snapshot() == EMPTY
    simulation.add("a", range(512), 40)
    # Pages 11 to 15 of 0 to 15. It is charged 5 pages before a chunk and 5 that the chunk leaves.
    simulation.step()
    first = dataclasses.replace(
        EMPTY,
        allocated=5,
        skipped=11,
        live_window=5,
        reserved=10,
        requests_live=1,
        peak_live_per_request=5,
    )
    assert manager.snapshot() == first
    # Token 256 sees 193 and later: page 11 goes, 12 to 15 stay, of 16 to 31 the last 5 are stored.
    simulation.step()
    second = dataclasses.replace(
        first,
        allocated=10,
        skipped=22,
        freed_by_window=1,
        live_prefill=4,
        peak_live_per_request=9,
    )
    assert manager.snapshot() == second
    # Token 512 sees 449 and later: pages 28 to 31, and its own is page 32.
    simulation.step()
    third = dataclasses.replace(second, allocated=11, freed_by_window=6, live_prefill=0)
    assert manager.snapshot() == third
    while simulation.step():
        pass
    # The last token that is stored is 550 in page 34; it sees 487 and later, from page 30 on.
    done = dataclasses.replace(
        third, allocated=13, freed_by_window=8, live_window=0, reserved=0, requests_live=0
    )
    assert manager.snapshot() == done


def test_counts_of_prefix_hits_and_of_requests_together() -> None:
    simulation = Simulation(Arm.SWA, dataclasses.replace(ENGINE, prefix_caching=True))
    manager = simulation.manager
    simulation.add("a", range(512), 2)
    while simulation.step():
        pass
    assert manager.snapshot().prefix_hit_tokens == 0
    before = manager.snapshot().allocated
    for name in "bc":
        simulation.add(name, range(512), 2)
    simulation.step()
    # All but the last page of the prompt is hit, 4 pages of it live; the last is stored anew.
    now = manager.snapshot()
    assert (now.prefix_hit_tokens, now.requests_live, now.reserved) == (2 * 496, 2, 2 * 10)
    assert (now.live_window, now.live_prefill, now.allocated - before) == (2 * 5, 0, 2)


def test_counters_never_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even between two calls of the scheduler, when a scrape may come."""
    steps = set()
    add = PageBoard.add

    def watched(board: PageBoard, field: str, amount: int) -> None:
        assert amount >= 0 or METRICS[field].type == "gauge", field
        steps.add((field, amount > 0))
        add(board, field, amount)

    monkeypatch.setattr(PageBoard, "add", watched)
    # Every hole may be filled, and more than half of the pool is free at times.
    caching = dataclasses.replace(
        ENGINE, num_pages=80, prefix_caching=True, retention_interval=None
    )
    simulation = Simulation(Arm.SWA, caching)
    for index in range(6):
        simulation.add(str(index), [*range(200), *range(index, 300 + index)], 40)
        simulation.step()
    while simulation.step():
        pass
    assert {("skipped", True), ("live_prefill", False)} <= steps


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
    monkeypatch.setenv(DIRECTORY, str(tmp_path / "elsewhere"))
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    try:
        board = PageBoard(Owner("1", 4, 0))
    finally:
        logger.removeHandler(caplog.handler)
    board.add("allocated", 3)
    assert board.snapshot().allocated == 3
    (message,) = caplog.messages
    assert message.startswith("SWA metrics of engine 4 are not served")


# An engine core as far as files go.
_ENGINE_PROCESS = """
from swa_vllm.page_board import Owner, PageBoard
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
            env={**os.environ, DIRECTORY: collector.path, "PYTHONPATH": path},
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


@pytest.fixture
def llm(engine: EngineFactory, tiny_model: ModelFactory) -> LLM:
    return engine(tiny_model(**MIXED), max_num_batched_tokens=128, enable_prefix_caching=False)


def test_stats_of_an_engine_are_what_its_managers_count(llm: LLM) -> None:
    (manager,) = managers(llm)
    ((owner, before),) = swa_vllm.stats(llm).items()
    assert owner == (0, manager.kv_cache_group_id) == (0, 1)
    assert before == manager.snapshot()
    generate(llm, random_prompts([300]), num_tokens=20)
    after = swa_vllm.stats(llm)[owner]
    assert after == manager.snapshot()
    # 319 tokens are stored at most, in 10 pages of 32. Chunks of 128 keep 3 pages of 4, the last
    # one of 44 tokens all its 2: pages 0 and 4 are skipped. Token 318 sees 279 and later, page 8.
    assert after.allocated - before.allocated == 8
    assert after.skipped - before.skipped == 2
    assert after.freed_by_window - before.freed_by_window == 6
    assert (after.live, after.requests_live, after.reserved) == (0, 0, 0)
    assert (after.window_tokens, after.sink_tokens) == (WINDOW, 0)


def test_page_events_are_logged_at_debug_level_only(
    llm: LLM, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("vllm")

    def serve(level: int) -> list[str]:
        caplog.clear()
        logger.addHandler(caplog.handler)
        monkeypatch.setattr(logger, "level", level)
        logger.manager._clear_cache()  # type: ignore[attr-defined]
        try:
            generate(llm, random_prompts([300]), num_tokens=20)
        finally:
            logger.removeHandler(caplog.handler)
            monkeypatch.undo()
            logger.manager._clear_cache()  # type: ignore[attr-defined]
        return [r.getMessage() for r in caplog.records if r.getMessage().startswith("SWA")]

    assert serve(logging.INFO) == []
    events = serve(logging.DEBUG)
    assert any("need not be stored" in event for event in events)
    assert any("left its window" in event for event in events)


def test_stats_of_an_engine_started_elsewhere_are_refused(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DIRECTORY, str(tmp_path))
    with pytest.raises(RuntimeError, match="runs on another machine"):
        swa_vllm.stats(llm)


def _directory_for(model: Path, monkeypatch: pytest.MonkeyPatch, **kwargs: object) -> str | None:
    monkeypatch.delenv(DIRECTORY, raising=False)
    EngineArgs(str(model), skip_tokenizer_init=True, **kwargs).create_engine_config()
    return os.environ.get(DIRECTORY)


def test_engines_count_where_their_server_reads(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert _directory_for(tiny_model(**FULL), monkeypatch) is None
    own = _directory_for(tiny_model(**SLIDING), monkeypatch)
    assert own == _directory_for(tiny_model(**SLIDING), monkeypatch)  # registered once
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert _directory_for(tiny_model(**SLIDING), monkeypatch) == str(tmp_path)


def test_dashboard_shows_every_metric_and_no_other() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    shown = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\bswa_\w+", target["expr"])
    }
    assert shown == {metric.sample for metric in METRICS.values()}
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard["panels"])))
    assert used - {"__rate_interval"} == variables
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_gained_leaves_gauges_as_they_are() -> None:
    before, after = {"a_total": 3.0, "b": 5.0}, {"a_total": 4.0, "b": 5.0}
    assert gained(before, after) == {"a_total": 1.0, "b": 5.0}
