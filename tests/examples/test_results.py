"""Committed results say where they come from, and the pages tell them."""

import json
from pathlib import Path

import pytest

from results_table import FULL, HERE, RESULTS, STOCK, table


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_name_their_command(path: Path) -> None:
    figures = json.loads(path.read_text())
    assert figures["command"] in (RESULTS / "README.md").read_text()
    if figures["command"].startswith("swa bench "):
        # Only the kernels' is: fewer cases, none of them smaller.
        assert figures["conditions"]["quick"] == (path.stem == "kernels-h100")


def test_page_of_results_has_their_table() -> None:
    assert f"\n\n{table()}\n\n" in (RESULTS / "README.md").read_text()


def test_readme_tells_what_the_tight_pool_serves() -> None:
    readme = (RESULTS.parents[1] / "README.md").read_text()
    arms = json.loads((RESULTS / "serve-tight.json").read_text())["peers"]
    full, stock, here = (round(arms[name]["output"]["median"]) for name in (FULL, STOCK, HERE))
    assert f"| {full} | {stock} | **{here}** |" in readme
