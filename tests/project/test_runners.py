"""The test command shares the engine's tests among two vLLMs and their model runners."""

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.processes import probe_command, probe_environment
from tests.helpers.runners import RUNNER, RUNNERS

# Each of these topics is tried on every runner.
EVERYWHERE = {
    "exactness": "test_exactness.py::test_engine_equals_hugging_face",
    "sinks and shifted sinks": "test_sinks.py::test_engine_equals_a_dense_model",
    "prefix hits": "test_prefill_pages.py::test_sent_again_the_same_prompt_hits",
    "preemption": "test_sinks.py::test_preempted_requests_start_over",
    "prefix hits over our kernels": "test_triton_engine.py::test_prefix_hits_change_no_token",
    "preemption over our kernels": "test_triton_engine.py::test_preempted_requests_start_over",
}
# What needs a GPU, what needs the newer runner, and what tests the tests.
ON_ONE = {"test_gpu.py", "test_graphs.py", "test_graph_recorder.py"}


@cache
def shared() -> dict[str, list[str]]:
    done = subprocess.run(
        probe_command("turns"),
        env=probe_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _of(name: str) -> set[str]:
    return {
        runner for test, runners in shared().items() for runner in runners if f"/{name}" in test
    }


def test_every_case_runs_somewhere() -> None:
    assert len(shared()) > 250
    assert all(runners and set(runners) <= set(RUNNERS) for runners in shared().values())


def test_every_file_runs_on_both_vllms() -> None:
    files = {test.partition("::")[0].rpartition("/")[2] for test in shared()} - ON_ONE
    assert len(files) > 15
    for file in files:
        assert {runner.partition("/")[0] for runner in _of(file)} == {"0.32", "0.33"}, file


@pytest.mark.parametrize("topic", EVERYWHERE)
def test_topic_runs_on_every_runner(topic: str) -> None:
    assert _of(EVERYWHERE[topic]) == set(RUNNERS)


def test_files_that_take_minutes_begin_first(tmp_path: Path) -> None:
    """Whatever order they are given in: of the others, those with more tests."""
    files = [f"tests/engine/test_{name}.py" for name in ("features", "sinks", "fuzz")]
    share = ["--share", str(tmp_path / "ran.jsonl")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *share, *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    begun = dict.fromkeys(re.findall(r"^(tests/\S+)::", done.stdout, re.MULTILINE))
    assert list(begun) == files[::-1]


def test_another_runner_is_refused() -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "tests" / "run.sh"), "--on", "0.34/V2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--on 0.34/V2; allowed are 0.32/V1, 0.33/V1, 0.33/V2 and all" in done.stderr


def test_a_run_that_was_cut_off_goes_on_where_it_was(tmp_path: Path) -> None:
    """With ``--resume``, what has passed is not run again on the same vLLM and runner."""
    passed, file = tmp_path / "passed", "tests/project/test_vllm_0_33.py"
    name = f"{file}::test_another_wheel_is_refused"
    passed.write_text(f"{RUNNER} {name}\n0.31/V1 {file}::test_without_a_registry\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "--resume", str(passed), file],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 deselected" in done.stdout
    assert name not in done.stdout
    assert f"{RUNNER} {file}::test_without_a_registry_it_says_so_and_fails" in passed.read_text()
