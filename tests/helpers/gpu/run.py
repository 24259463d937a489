"""Runs the steps one by one and records each before the next starts: ``bash tests/gpu.sh``.

Exit status: 0 if every step passed, 1 if one failed, 3 if none failed and some were not run.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from tests.helpers.gpu.lines import NOT_RUN, RECORD, append_line, read_lines
from tests.helpers.gpu.machine import Machine, commit, look, sources_hash, step_environment
from tests.helpers.gpu.steps import STEPS, Step
from tests.helpers.paths import ROOT

# Exit status of pytest where no test was selected.
_NO_TESTS = 5
_NAMES = {"vllm": "vLLM"}
_TOOLS = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))


class Status(StrEnum):
    """How a step ended."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Outcome:
    """How a step ended, and why it did not pass."""

    status: Status
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}" if self.reason else str(self.status)


def obstacle(step: Step, machine: Machine, *, dry: bool) -> str | None:
    """Say why a step cannot be run on a machine; None if it can."""
    if machine.gpu is None and not dry:
        return "no GPU"
    for module in step.needs:
        if module in machine.missing:
            return f"{_NAMES.get(module, module)} missing"
    if step.tool and not dry and shutil.which(step.tool[0], path=_TOOLS) is None:
        return f"{step.tool[0]} missing"
    return None


def judge(code: int | None, limit_s: int, found: Sequence[Mapping[str, Any]]) -> Outcome:
    """Judge a step by its exit status, None if it was killed, and by what it recorded.

    A step whose tests were skipped, all or some, did not run.
    """
    if code is None:
        return Outcome(Status.FAILED, f"not done in {limit_s} s")
    if code == NOT_RUN:
        reasons = [line["not_run"] for line in found if "not_run" in line]
        return Outcome(Status.NOT_RUN, reasons[-1] if reasons else "no reason given")
    if code == _NO_TESTS:
        return Outcome(Status.NOT_RUN, "no test was selected")
    if code != 0:
        return Outcome(Status.FAILED, f"exit status {code}")
    skipped = [line for line in found if line.get("outcome") == "skipped"]
    if skipped:
        num_tests = sum("test" in line and "outcome" in line for line in found)
        reason = skipped[0]["message"].removeprefix("Skipped: ")
        return Outcome(Status.NOT_RUN, f"{len(skipped)} of {num_tests} tests skipped: {reason}")
    return Outcome(Status.PASSED)


def run_step(
    step: Step, out: Path, environment: Mapping[str, str], *, dry: bool
) -> tuple[Outcome, list[dict[str, Any]]]:
    """Run a step to its end or its limit; returns how it ended and what it recorded."""
    file = out / f"{step.name.replace(' ', '-')}.jsonl"
    for left in (file, file.with_suffix(".log")):
        if left.exists():  # perhaps by a run that was cut off
            left.replace(left.with_suffix(f".before{left.suffix}"))
    tool = () if dry else step.tool
    program = shutil.which(tool[0], path=_TOOLS) if tool else None
    command = [*([str(program), *tool[1:]] if tool else []), sys.executable]
    command += step.dry if dry else step.command
    with file.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment, **step.environment, RECORD: str(file)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None
        try:
            # A CPU takes its time; there the caller has the limit.
            code = process.wait(None if dry else step.limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill_group(process)
    found = read_lines(file)
    outcome = judge(code, step.limit_s, found)
    if dry and step.dry_lacks and outcome.status is Status.PASSED:
        outcome = Outcome(Status.NOT_RUN, step.dry_lacks)
    return outcome, found


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what a step leaves, servers and workers included."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def exit_status(statuses: Sequence[Status]) -> int:
    """Tell by a number whether everything ran and passed."""
    if Status.FAILED in statuses:
        return 1
    return 3 if Status.NOT_RUN in statuses else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps that are not recorded yet; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tests/gpu.sh", description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=Path(".cache/gpu"), metavar="OUT")
    parser.add_argument("--again", action="store_true", help="run what is recorded already, too")
    parser.add_argument(
        "--dry-run", action="store_true", help="try the steps themselves, on a CPU with tiny sizes"
    )
    args = parser.parse_args(arguments)
    out, dry = args.out.resolve(), bool(args.dry_run)
    out.mkdir(parents=True, exist_ok=True)
    environment = step_environment(out / "metadata", dry=dry)
    machine = look((name for step in STEPS for name in step.needs), environment)
    key = {"sources": sources_hash(), "gpu": machine.gpu, "dry_run": dry}
    results = out / "results.jsonl"
    statuses = []
    for step in STEPS:
        known = None if args.again else _recorded(results, step, key)
        if known is None:
            known = _run_and_record(step, results, environment, machine, key)
        print(f"{step.name:18}{known}", flush=True)
        statuses.append(known.status)
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in Status)
    print(f"{counts}; {results}")
    return exit_status(statuses)


def _recorded(results: Path, step: Step, key: Mapping[str, Any]) -> Outcome | None:
    """Find how a step ended that ran on these sources and this GPU; None if it did not."""
    for line in reversed(read_lines(results)):
        if line["step"] == step.name and key.items() <= line.items():
            outcome = Outcome(Status(line["status"]), line["reason"])
            return None if outcome.status is Status.NOT_RUN else outcome
    return None


def _run_and_record(
    step: Step,
    results: Path,
    environment: Mapping[str, str],
    machine: Machine,
    key: Mapping[str, Any],
) -> Outcome:
    dry, start = key["dry_run"], time.monotonic()
    missing, found = obstacle(step, machine, dry=dry), list[dict[str, Any]]()
    if missing is not None:
        outcome = Outcome(Status.NOT_RUN, missing)
    else:
        outcome, found = run_step(step, results.parent, environment, dry=dry)
    append_line(
        results,
        {
            "step": step.name,
            "status": outcome.status,
            "reason": outcome.reason,
            "seconds": round(time.monotonic() - start, 1),
            "commit": commit(),
            **key,
            "found": found,
        },
    )
    return outcome


if __name__ == "__main__":
    sys.exit(main())
