"""`swa trace`: the map adds up, in text, in colour, as a picture and as JSON."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from swa_backend.pages import WindowPages, ceil_div
from swa_vllm.tools.cli import main

SIZES = ["--window", "64", "--block-size", "16", "--pool-tokens", "2048", "--output", "30"]
SIZES += ["--max-num-batched-tokens", "256", "--prompt", "900,100,400", "--sink-tokens", "4"]


@pytest.fixture
def trace(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "trace.json"
    assert main(["trace", *SIZES, "--json", str(path)]) == 0
    return dict(json.loads(path.read_text()))


def test_rows_add_up_to_the_pool_and_to_full_attention(trace: dict[str, Any]) -> None:
    rows, used, full = trace["rows"], trace["used"], trace["full"]
    assert [row["num_prompt"] for row in rows] == [900, 100, 400]
    for step, (held, would_hold) in enumerate(zip(used, full, strict=True)):
        live = [sum(row[kind][step] for kind in ("window", "sink", "prefill")) for row in rows]
        assert sum(live) == held <= trace["num_pages"]
        assert sum(live) + sum(row["gone"][step] for row in rows) == would_hold


def test_rows_end_with_the_window_and_the_sinks(trace: dict[str, Any]) -> None:
    pages = WindowPages(64, 16, 4)
    for row in trace["rows"]:
        last = max(step for step, held in enumerate(row["window"]) if held)
        assert (row["sink"][last], row["prefill"][last]) == (1, 0)
        assert row["window"][last] <= pages.max_survivors
        held = row["window"][last] + 1
        assert held + row["gone"][last] == ceil_div(row["num_prompt"] + 29, 16)
    assert max(trace["rows"][0]["prefill"]) > 0


def test_with_a_window_in_the_answer_the_prompt_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.json"
    sizes = [*SIZES[:6], "--output", "300", "--prompt", "900,100,50"]
    assert main(["trace", *sizes, "--phase", "decode", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    for row in rows:
        last = max(step for step, held in enumerate(row["window"]) if held)
        assert row["prompt"][last] == ceil_div(row["num_prompt"], 16)
        assert (max(row["sink"]), row["prefill"][last]) == (0, 0)
        held = row["prompt"][last] + row["window"][last]
        assert held + row["gone"][last] == ceil_div(row["num_prompt"] + 299, 16)
        assert row["gone"][last] > 0
    legend = capsys.readouterr().out.splitlines()[2]
    assert legend.endswith("prefill, window, prompt")


def test_a_phase_that_frees_nothing_has_no_map(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", *SIZES, "--phase", "prefill"]) == 1
    assert "frees no page, so there is nothing to map" in capsys.readouterr().err


def test_text_has_no_colour_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", *SIZES]) == 0
    printed = capsys.readouterr().out
    assert "\033" not in printed
    assert "full attention  " in printed
    assert printed.splitlines()[-1].split()[:2] == ["2", "400"]


def test_text_has_colour_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["trace", *SIZES]) == 0
    assert "\033[34m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["trace", *SIZES]) == 0
    assert "\033" not in capsys.readouterr().out


def test_a_trace_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "trace.png"
    assert main(["trace", *SIZES, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_pool_that_is_not_given_is_short_for_full_attention_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.json"
    assert main(["trace", "--json", str(path)]) == 0
    trace = json.loads(path.read_text())
    assert max(trace["used"]) < trace["num_pages"] < max(trace["full"])
    assert f", {trace['num_pages'] + 1} pages in the pool (" in capsys.readouterr().out


def test_a_pool_that_is_not_given_holds_the_longest_request(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    sizes = ["--window", "2000", "--prompt", "1000", "--output", "30"]
    assert main(["trace", *sizes, "--json", str(path)]) == 0
    assert json.loads(path.read_text())["num_pages"] == ceil_div(1030, 16)
