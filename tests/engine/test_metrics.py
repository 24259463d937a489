"""Counts of the page managers, exactly, their metrics, and ``swa_vllm.stats``."""

import dataclasses
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from vllm import LLM

import swa_vllm
from swa_backend.metrics import ENGINE_SCRAPED, METRICS, OPTIONS_INFO, PageCounts
from swa_backend.pages import WindowPages
from swa_vllm.compat.envs import METRICS_DIR
from swa_vllm.metrics.board import PageBoard
from swa_vllm.tools.common.arms import Arm
from swa_vllm.tools.engines.scheduler import Simulation
from swa_vllm.tools.engines.simulated import Engine
from tests.helpers.engines import EngineFactory, ModelFactory, generate, managers, start_engine
from tests.helpers.paths import ROOT
from tests.helpers.tiny_models import MIXED, WINDOW, random_prompts

DASHBOARD = ROOT / "examples" / "grafana_dashboard.json"
EVENTS = (
    *("need not be stored", "are stored for the prefix cache"),
    *("left its window", "were held by"),
)
EMPTY = PageCounts(window_tokens=64)
# 64 tokens see 5 pages of 16 at most.
ENGINE = Engine(
    window=64, block_size=16, num_pages=200, max_num_batched_tokens=256, max_model_len=4096
)


def test_every_count_has_a_metric_by_prometheus_conventions() -> None:
    assert [*METRICS] == [field.name for field in dataclasses.fields(PageCounts)]
    for metric in (*METRICS.values(), ENGINE_SCRAPED, OPTIONS_INFO):
        assert metric.name.startswith("swa_")
        assert not metric.name.endswith("_total")
        assert metric.sample.endswith("_total") == (metric.type == "counter")
        assert metric.help.endswith(".")
    assert {m.sample for m in METRICS.values()} >= {
        *("swa_pages_freed_total", "swa_pages_skipped_total", "swa_pages_live"),
        *("swa_pages_reserved", "swa_window_tokens", "swa_sink_tokens", "swa_requests_live"),
        *("swa_prefix_hit_tokens_total", "swa_prefix_lost_tokens_total"),
    }
    assert [m.kind for m in METRICS.values() if m.kind] == [
        "window",
        "sink",
        "prompt",
        "prefill",
    ]


def test_kinds_of_held_pages() -> None:
    pages = WindowPages(window=8, page_size=4, sink_tokens=5)  # 2 sink pages, 3 window pages
    kinds = {0: (0, 0, 0), 1: (0, 1, 0), 2: (0, 2, 0), 3: (1, 2, 0), 5: (3, 2, 0), 9: (3, 2, 4)}
    assert {held: pages.kinds(held) for held in kinds} == kinds
    assert pages.kinds(9, num_ahead_tokens=5) == (5, 2, 2)


def test_counts_of_a_prompt_in_two_chunks() -> None:
    """512 tokens of prompt, 40 of answer; every number worked out by hand."""
    simulation = Simulation(Arm.SWA, ENGINE)
    (manager,) = simulation.managers
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
    (manager,) = simulation.managers
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


def test_counts_of_pages_that_are_stored_for_the_prefix_cache_alone() -> None:
    caching = dataclasses.replace(
        ENGINE, num_pages=32, prefix_caching=True, retention_interval=None
    )
    simulation = Simulation(Arm.SWA, caching)
    simulation.add("a", range(512), 2)
    simulation.step()
    # The chunk's 5 leave 26 of the 31 pages free, 10 above half of 32: of 11 holes 10 are filled.
    (manager,) = simulation.managers
    assert manager.snapshot() == dataclasses.replace(
        EMPTY,
        allocated=15,
        skipped=1,
        live_window=5,
        live_prefill=10,
        reserved=10,
        requests_live=1,
        peak_live_per_request=15,
    )


def test_counters_never_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even between two calls of the scheduler, when a scrape may come."""
    steps = set()
    add = PageBoard.add

    def watched(board: PageBoard, field: str, amount: int) -> None:
        assert amount >= 0 or METRICS[field].type == "gauge", field
        steps.add((field, amount < 0))
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
    assert {("skipped", False), ("live_prefill", True)} <= steps


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


def _page_events(
    level: int, work: Callable[[], object], caplog: pytest.LogCaptureFixture
) -> dict[str, int]:
    """Pages in the events that ``work`` logs at a level of vLLM's logger, by kind of event."""
    logger = logging.getLogger("vllm")
    caplog.clear()
    logger.addHandler(caplog.handler)
    pages: dict[str, int] = {}
    try:
        with caplog.at_level(level, logger="vllm"):
            work()
    finally:
        logger.removeHandler(caplog.handler)
    for event in (r.getMessage() for r in caplog.records if r.getMessage().startswith("SWA")):
        matched = re.fullmatch(r"SWA group \d: (\d+) pages (.+)", event)
        assert matched, event
        (kind,) = [kind for kind in EVENTS if kind in matched[2]]
        pages[kind] = pages.get(kind, 0) + int(matched[1])
    return pages


def test_page_events_are_logged_at_debug_level_only(
    llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    def serve() -> None:
        generate(llm, random_prompts([300]), num_tokens=20)

    assert _page_events(logging.INFO, serve, caplog) == {}
    # As counted above.
    skipped, left, ended = "need not be stored", "left its window", "were held by"
    assert _page_events(logging.DEBUG, serve, caplog) == {skipped: 2, left: 6, ended: 2}


def test_every_page_of_the_counts_is_in_the_debug_log(caplog: pytest.LogCaptureFixture) -> None:
    """Grants for the prefix cache included: nothing goes or comes unseen."""
    caching = dataclasses.replace(ENGINE, prefix_caching=True, retention_interval=None)
    simulation = Simulation(Arm.SWA, caching)
    (manager,) = simulation.managers

    def run() -> None:
        simulation.add("a", range(512), 40)
        while simulation.step():
            pass

    pages = _page_events(logging.DEBUG, run, caplog)
    counts = manager.snapshot()
    # All 16 pages of the first chunk, 11 of them granted, and so with the second.
    assert pages["are stored for the prefix cache"] == 22
    assert pages.get("need not be stored", 0) == counts.skipped == 0
    assert pages["left its window"] == counts.freed_by_window
    assert pages["left its window"] + pages["were held by"] == counts.allocated


def test_stats_of_an_engine_started_elsewhere_are_refused(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(METRICS_DIR, str(tmp_path))
    with pytest.raises(RuntimeError, match="runs on another machine"):
        swa_vllm.stats(llm)


@pytest.mark.full
def test_stats_of_an_engine_in_a_process_of_its_own(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    llm = start_engine(tiny_model(**MIXED), max_num_batched_tokens=128, enable_prefix_caching=False)
    assert set(swa_vllm.stats(llm)) == {(0, 1)}
    generate(llm, random_prompts([300]), num_tokens=20)
    counts = swa_vllm.stats(llm)[0, 1]
    assert (counts.allocated, counts.skipped, counts.freed_by_window) == (8, 2, 6)


def test_dashboard_shows_every_metric_and_no_other() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    shown = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\bswa_\w+", target["expr"])
    }
    assert shown == {metric.sample for metric in (*METRICS.values(), ENGINE_SCRAPED, OPTIONS_INFO)}
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard["panels"])))
    assert used - {"__rate_interval"} == variables
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
