"""`swa bench`: runs, says what it measured, and refuses what makes no sense."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swa_vllm.tools.cli import main
from swa_vllm.tools.simulate import Arm, Engine, simulate


def _swa(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: some benchmarks start an engine."""
    return subprocess.run(
        [sys.executable, "-m", "swa_vllm.tools.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def _json(result: subprocess.CompletedProcess[str], path: Path) -> Any:
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(path.read_text())


def test_pages_of_an_own_workload(tmp_path: Path) -> None:
    path = tmp_path / "pages.json"
    sizes = {"window": 64, "pool-tokens": 4480, "block-size": 32, "prompt": 2000, "output": 99}
    sizes |= {"num-requests": 64, "max-num-batched-tokens": 2048, "steps-in-flight": 1}
    flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    result = _swa("bench", "pages", *flags, "--json", str(path))
    (workload,) = _json(result, path)
    assert [arm["starts"] for arm in workload["arms"].values()] == [True] * 3
    arms = workload["arms"]
    assert arms["this plugin"]["peak_pages"] <= 6
    assert arms["stock vLLM"]["peak_pages"] > 60
    assert arms["this plugin"]["mean_running"] > arms["stock vLLM"]["mean_running"]
    assert "64 x 2000 + 99 tokens, W=64, pool 140 pages of 32" in result.stdout


def test_prefill_gives_the_same_output_and_a_ratio(tmp_path: Path) -> None:
    path = tmp_path / "prefill.json"
    arguments = ("--shape", "Qwen3-0.6B", "--window", "48", "--chunk", "128", "--rounds", "3")
    result = _json(_swa("bench", "prefill", *arguments, "--json", str(path)), path)
    assert [case["context"] for case in result["cases"]] == [0, 135, 368]
    assert all(case["attention_ratio"] > 0 for case in result["cases"])


@pytest.mark.parametrize("shift", [[], ["--shift"]], ids=["plain", "shifted"])
def test_sinks_are_right_and_get_a_ratio(shift: list[str], tmp_path: Path) -> None:
    path = tmp_path / "sinks.json"
    arguments = ("--quick", "--window", "48", "--rounds", "3", *shift, "--json", str(path))
    cases = _json(_swa("bench", "sinks", *arguments), path)["cases"]
    assert len(cases) == 4
    assert all(case["attention_ratio"] > 0 for case in cases)


def test_overhead_compares_scheduler_and_builder(tmp_path: Path) -> None:
    path = tmp_path / "overhead.json"
    arguments = ("--quick", "--batch", "2", "--rounds", "6", "--json", str(path))
    cases = _json(_swa("bench", "overhead", *arguments), path)
    assert {case["name"].split(",")[0] for case in cases} == {
        "scheduler and manager",
        "metadata builder",
        "together",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pages", "--window", "0"], "--window must be at least 1"),
        (["pages", "--window", "8", "--max-model-len", "100"], "is below prompt + output = 8512"),
        (["pages", "--prompt", "100"], "a workload of your own needs --window"),
        (["pages", "--quick", "--window", "8"], "--quick is for the built-in workloads"),
        (["pages", "--window", "8", "--pool-tokens", "10"], "--pool-tokens must be at least two"),
        (["pages", "--window", "8", "--steps-in-flight", "3"], "must be 1 or 2, got 3"),
        (["prefill", "--rounds", "1"], "--rounds must be at least 2, got 1"),
        (["prefill", "--chunk", "0"], "--chunk must be at least 1, got 0"),
        (["sinks", "--sink-tokens", "0"], "--sink-tokens must be at least 1, got 0"),
        (["overhead", "--batch", "0"], "--batch must be at least 1, got 0"),
    ],
)
def test_nonsense_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pages", "prefill", "sinks", "overhead"])
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["bench", name, "--help"])
    assert status.value.code == 0
    assert f"example: swa bench {name} --" in capsys.readouterr().out


def test_more_run_in_a_tight_pool() -> None:
    """W=64 of chunks of 2048 tokens in 140 pages: what stock vLLM reserves for two requests."""
    engine = Engine(64, 32, 140, 2048, 8192)
    stock, here = (simulate(arm, engine, [(2000, 200)] * 64) for arm in (Arm.STOCK, Arm.SWA))
    assert here.mean_running > 1.4 * stock.mean_running
    assert here.num_steps < 0.7 * stock.num_steps
    assert here.peak_pages == here.promised_pages == 6
    assert here.num_preemptions == 0


def test_an_engine_that_stock_refuses_starts() -> None:
    engine = Engine(1024, 16, 2048, 16384, 40960, num_steps_in_flight=2)
    assert not simulate(Arm.STOCK, engine, []).starts
    assert simulate(Arm.SWA, engine, [(20000, 4)] * 4).num_steps > 0


def test_json_alone_on_stdout() -> None:
    flags = ("--window", "64", "--prompt", "300", "--output", "4", "--num-requests", "2")
    result = _swa("bench", "pages", *flags, "--json", "-")
    assert json.loads(result.stdout)[0]["workload"] == "requests"
    assert "a decoding request needs" in result.stderr
