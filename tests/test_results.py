"""Committed results say where they come from, and the README tells them."""

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


def test_readme_tells_the_results() -> None:
    readme = (RESULTS.parents[1] / "README.md").read_text()
    assert table() in readme
    arms = json.loads((RESULTS / "serve-tight.json").read_text())["peers"]
    full, stock, here = (round(arms[name]["output"]["median"]) for name in (FULL, STOCK, HERE))
    assert f"| {full} | {stock} | **{here}** |" in readme
