"""``tests/gpu.sh``: a step is recorded as it ended, never as passed if it did not run, and is run
once; a dry run goes through every step."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from vllm.utils import jit_monitor

from tests.helpers.engines import Answer
from tests.helpers.exactness import check_exact
from tests.helpers.gpu import run, serve
from tests.helpers.gpu.lines import NOT_RUN, RECORD, append_line, read_lines
from tests.helpers.gpu.machine import Machine, step_environment
from tests.helpers.gpu.run import Outcome, Status, exit_status, judge, main, obstacle
from tests.helpers.gpu.steps import STEPS, Step
from tests.helpers.paths import ROOT
from tests.helpers.servers import has_ended, wait_until
from tests.helpers.tiny_models import OracleScores

H100 = Machine("H100", frozenset())
RECORDING = "from tests.helpers.gpu.lines import record; record(value=1)"


def _step(name: str, code: str, **changes: Any) -> Step:
    step = Step(name, ("-c", code), ("-c", code), 60, ("torch",))
    return replace(step, **changes)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This machine passes for one with a GPU."""
    monkeypatch.setattr(run, "look", lambda *_: H100)
    return monkeypatch


def _run(monkeypatch: pytest.MonkeyPatch, out: Path, *steps: Step, again: bool = False) -> int:
    monkeypatch.setattr(run, "STEPS", steps)
    return main([str(out), *(["--again"] if again else [])])


def _ended(out: Path) -> list[tuple[str, str, str]]:
    lines = read_lines(out / "results.jsonl")
    return [(line["step"], line["status"], line["reason"]) for line in lines]


def test_limits_are_eleven_minutes_together() -> None:
    assert sum(step.limit_s for step in STEPS) <= 640
    assert len({step.name for step in STEPS}) == len(STEPS) == 12


def test_without_a_gpu_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main([str(tmp_path)]) == 3
    assert _ended(tmp_path) == [(step.name, "not run", "no GPU") for step in STEPS]
    assert f"0 passed, 0 failed, {len(STEPS)} not run" in capsys.readouterr().out


def test_vllm_finds_the_plugin_without_an_installation(tmp_path: Path) -> None:
    environment = step_environment(tmp_path, dry=False)
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path)
    (found,) = metadata.distributions(path=[str(tmp_path)])
    installed = metadata.distribution("swa-backend")
    assert (found.name, found.version) == (installed.name, installed.version)
    assert set(found.entry_points) == set(installed.entry_points)


def test_what_is_missing_is_named() -> None:
    no_vllm = Machine("H100", frozenset({"vllm"}))
    missing = {step.name: obstacle(step, no_vllm, dry=False) for step in STEPS}
    assert missing["times"] == missing["engine eager"] == missing["serve"] == "vLLM missing"
    assert missing["versions"] is missing["kernels"] is None
    tool = _step("sanitizer", "", tool=("no-such-sanitizer",))
    assert obstacle(tool, H100, dry=False) == "no-such-sanitizer missing"
    assert obstacle(tool, H100, dry=True) is None


def _tests(*outcomes: str) -> list[dict[str, Any]]:
    return [{"test": "a", "outcome": o, "message": "Skipped: needs two"} for o in outcomes]


@pytest.mark.parametrize(
    ("code", "found", "outcome"),
    [
        (0, [], Outcome(Status.PASSED)),
        (0, _tests("passed", "passed"), Outcome(Status.PASSED)),
        (1, _tests("passed", "skipped"), Outcome(Status.FAILED, "exit status 1")),
        (
            0,
            _tests("passed", "skipped"),
            Outcome(Status.NOT_RUN, "1 of 2 tests skipped: needs two"),
        ),
        (5, [], Outcome(Status.NOT_RUN, "no test was selected")),
        (None, _tests("passed"), Outcome(Status.FAILED, "not done in 9 s")),
        (-11, [], Outcome(Status.FAILED, "exit status -11")),
        (NOT_RUN, [{"not_run": "no rival"}], Outcome(Status.NOT_RUN, "no rival")),
    ],
)
def test_outcome_of_a_step(code: int | None, found: list[dict[str, Any]], outcome: Outcome) -> None:
    assert judge(code, 9, found) == outcome


def test_exit_status_tells_failed_from_not_run() -> None:
    assert exit_status([Status.PASSED]) == 0
    assert exit_status([Status.PASSED, Status.NOT_RUN]) == 3
    assert exit_status([Status.NOT_RUN, Status.FAILED]) == 1


def test_steps_are_recorded_and_run_once(tmp_path: Path, machine: pytest.MonkeyPatch) -> None:
    steps = (
        _step("good", f"{RECORDING}; print('in the log')"),
        _step("bad", f"{RECORDING}; raise SystemExit(2)"),
        _step("none", "from tests.helpers.gpu.lines import end_not_run; end_not_run('no rival')"),
    )
    ended = [("good", "passed", ""), ("bad", "failed", "exit status 2")]
    not_run = ("none", "not run", "no rival")
    assert _run(machine, tmp_path, *steps) == 1
    assert _ended(tmp_path) == [*ended, not_run]
    good, bad, _ = read_lines(tmp_path / "results.jsonl")
    assert good["found"] == bad["found"] == [{"value": 1}]
    assert (tmp_path / "good.log").read_text() == "in the log\n"
    assert _run(machine, tmp_path, *steps) == 1
    assert _ended(tmp_path) == [*ended, not_run, not_run]
    _run(machine, tmp_path, *steps, again=True)
    assert _ended(tmp_path)[4:] == [*ended, not_run]


def test_other_sources_are_run_anew(tmp_path: Path, machine: pytest.MonkeyPatch) -> None:
    step = _step("good", RECORDING)
    assert [_run(machine, tmp_path, step) for _ in range(2)] == [0, 0]
    assert len(_ended(tmp_path)) == 1
    machine.setattr(run, "sources_hash", lambda: "others")
    assert _run(machine, tmp_path, step) == 0
    assert len(_ended(tmp_path)) == 2


def test_a_step_that_hangs_is_killed_with_its_children(
    tmp_path: Path, machine: pytest.MonkeyPatch
) -> None:
    code = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
from tests.helpers.gpu.lines import record
record(child=child.pid)
time.sleep(100)
"""
    assert _run(machine, tmp_path, _step("hangs", code, limit_s=10)) == 1
    assert _ended(tmp_path) == [("hangs", "failed", "not done in 10 s")]
    (found,) = read_lines(tmp_path / "results.jsonl")[0]["found"]
    with contextlib.suppress(psutil.NoSuchProcess):
        child = psutil.Process(found["child"])
        wait_until(lambda: has_ended(child))  # a busy machine takes a moment to end it


def test_what_a_run_left_that_was_cut_off_is_kept(
    tmp_path: Path, machine: pytest.MonkeyPatch
) -> None:
    append_line(tmp_path / "good.jsonl", {"value": 0})
    assert _run(machine, tmp_path, _step("good", RECORDING)) == 0
    assert read_lines(tmp_path / "good.before.jsonl") == [{"value": 0}]
    assert read_lines(tmp_path / "good.jsonl") == [{"value": 1}]


def test_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    assert read_lines(file) == []
    append_line(file, {"a": 1})
    with file.open("a") as opened:
        opened.write('{"a": ')
    assert read_lines(file) == [{"a": 1}]


@dataclass(frozen=True)
class _Oracle:
    """Gives every token the same probability, but for token 1."""

    def score(self, tokens: Sequence[int], prompt_len: int = 0) -> OracleScores:
        logprobs = torch.full((len(tokens), 4), -2.0, dtype=torch.float64)
        logprobs[:, 1] = -1.0
        return OracleScores(logprobs, noise=0.5)


def test_error_of_every_request_is_recorded_before_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RECORD, str(tmp_path / "found"))
    answers = [Answer([0], [-2.0], 0), Answer([1, 1], [-1.0, -1.25], 0)]
    with pytest.raises(AssertionError):
        check_exact([[1], [2, 3]], answers, _Oracle())
    first, second = read_lines(tmp_path / "found")
    assert (first["prompt_len"], second["prompt_len"]) == (1, 2)
    assert (first["token_error_per_noise"], first["logprob_error_per_noise"]) == (2.0, 0.0)
    assert (second["token_error_per_noise"], second["logprob_error_per_noise"]) == (0.0, 0.5)
    assert "test_error_of_every_request" in first["exactness"]


def test_compilations_are_those_that_vllm_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = list[str]()
    logger = SimpleNamespace(warning=lambda text, *args: messages.append(text % args))
    monkeypatch.setattr(jit_monitor, "logger", logger)
    monkeypatch.setattr(jit_monitor, "_verbose", True)  # as by --jit-monitor-verbose
    event = {"backend": "Triton", "event": "kernel JIT compilation"}
    jit_monitor._handle_jit_event(**event, fn_name="swa.decode_kernel")
    jit_monitor._handle_jit_event(**event, fn_name="swa.decode_kernel")
    jit_monitor._handle_jit_event(**event, fn_name="prefill_kernel", detail="PAGE=16")
    log = "\n".join(["SWA 0-3     sliding  1024", "SWA 4  full", *messages])
    assert serve.read_log(log) == {
        "windows": ["0-3     sliding  1024"],
        "monitored": False,
        "compiled_while_serving": {"Triton prefill_kernel": 1, "Triton swa.decode_kernel": 2},
    }


def _selected(step: Step) -> str:
    """What pytest collects of a step's tests."""
    command = [sys.executable, *step.command, "--collect-only"]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "plugins", ROOT / "examples")))
    env = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels_of_every_operation_are_selected_without_vllm() -> None:
    """A dry run selects fewer of them; what it selects of engines is what a GPU is given."""
    (step,) = (step for step in STEPS if step.name == "kernels")
    assert "vllm" not in step.needs
    selected = _selected(step)
    for name in ("decode_equals", "prefill_equals", "write_equals", "long_text", "fp8", "rotate"):
        assert name in selected


@pytest.mark.full  # four minutes
@pytest.mark.timeout(1200)
def test_dry_run_goes_through_every_step(tmp_path: Path) -> None:
    """Tests that need a GPU are only collected, which fails where none is selected."""
    env = {**os.environ, "SWA_VENV": str(Path(sys.executable).parents[1])}
    command = ["bash", str(ROOT / "tests" / "gpu.sh"), "--dry-run", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    logs = {file.name: file.read_text()[-2000:] for file in tmp_path.glob("*.log")}
    expected = {step.name: ("passed", "") for step in STEPS}
    collected = ("not run", "dry run: its tests were collected, and need a GPU")
    for name in (
        "engine eager",
        "engine graphs",
        "mixed layers",
        "drafts in graphs",
        "compiled",
        "offloading",
    ):
        expected[name] = collected
    expected["sanitizer"] = ("not run", "dry run: without compute-sanitizer")
    assert _ended(tmp_path) == [(name, *ended) for name, ended in expected.items()], logs
    assert done.returncode == 3, done.stdout + done.stderr
    lines = read_lines(tmp_path / "results.jsonl")
    assert all(line["dry_run"] for line in lines)
    found = {line["step"]: line["found"] for line in lines}
    assert found["versions"][0]["versions"]["torch"] == torch.__version__
    assert [line["us"].keys() for line in found["times"][1:]] == [{"here", "TRITON_ATTN"}] * 2
    assert {line["outcome"] for line in found["fp8 cache"] if "outcome" in line} == {"passed"}
    assert all(
        line["logprob_error_per_noise"] <= 1 for line in found["fp8 cache"] if "noise" in line
    )
    assert [line["tokens"] for line in found["serve"] if "turn" in line] == [8, 8]
    json.dumps(lines, allow_nan=False)
