"""Prints on which vLLMs and runners each test of ``tests/engine`` runs by default, as JSON."""

import json
import sys

import pytest

from tests.helpers.runners import turns


class _Collector:
    """A pytest plugin."""

    def __init__(self) -> None:
        self.turns: dict[str, list[str]] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.turns = {item.nodeid: list(runners) for item, runners in turns(items)}


def main() -> None:
    collector = _Collector()
    pytest.main(["--collect-only", "-qq", "--no-summary", "tests/engine"], plugins=[collector])
    sys.stdout.write(f"\n{json.dumps(collector.turns)}\n")


if __name__ == "__main__":
    main()
