"""A plugin of pytest that records how each test ended, as soon as it has."""

import os

import pytest

from tests.helpers.gpu.lines import record


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Record a test that ran, was skipped, or failed in a fixture."""
    if report.when == "call" or report.outcome != "passed":
        message = ""
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            message = report.longrepr[2]
        elif report.outcome == "failed":
            message = report.longreprtext.strip().split(os.linesep)[-1]
        record(
            test=report.nodeid,
            outcome=report.outcome,
            seconds=round(report.duration, 2),
            message=message[:300],
        )
