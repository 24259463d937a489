"""What ``tests/mutation`` names and counts is there; its mutants are not run here."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT
from tests.mutation.report import (
    BEGIN,
    END,
    KILLED_NOW,
    PAGE,
    read_counts,
    read_survivors,
    table,
)
from tests.mutation.targets import PARTS

TARGETS = {module: tests for part in PARTS.values() for module, tests in part.items()}
TESTS = sorted({test for tests in TARGETS.values() for test in tests})


@cache
def functions(file: str) -> set[str]:
    """Names of the tests in a file."""
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@cache
def source(module: str) -> str:
    """The lines of a module behind one another, as survivors quote them."""
    return " ".join(line.strip() for line in (ROOT / module).read_text().splitlines())


def check_test(name: str) -> None:
    file, _, function = name.partition("::")
    assert (ROOT / file).is_file(), name
    assert not function or re.sub(r"\[.*", "", function) in functions(file), name


def check_survivor(survivor: dict[str, Any]) -> None:
    assert survivor["line"], survivor
    assert survivor["line"] in source(survivor["module"]), survivor
    if survivor["judged"].startswith(KILLED_NOW):
        check_test(survivor["judged"].removeprefix(KILLED_NOW))


def test_every_module_and_test_is_there() -> None:
    assert set(read_counts()) <= set(TARGETS)
    for module in TARGETS:
        assert (ROOT / module).is_file(), module
    for test in TESTS:
        check_test(test)


def test_survivors_are_changes_of_lines_that_are_there() -> None:
    for survivor in read_survivors():
        check_survivor(survivor)


@pytest.mark.parametrize(
    "wrong",
    [
        {"line": "no such line"},
        {"judged": f"{KILLED_NOW}tests/backend/test_pages.py::test_no_such_test[1]"},
        {"judged": f"{KILLED_NOW}{Path('tests', 'backend', 'no_such_file.py')}::test_span"},
    ],
)
def test_survivor_of_what_is_not_there_is_noticed(wrong: dict[str, str]) -> None:
    survivor = read_survivors()[0]
    with pytest.raises(AssertionError):
        check_survivor({**survivor, **wrong})


def test_counts_are_those_of_the_list() -> None:
    left = Counter(
        survivor["module"]
        for survivor in read_survivors()
        if not survivor["judged"].startswith(KILLED_NOW)
    )
    assert left == Counter({module: n["survived"] for module, n in read_counts().items()})


def test_almost_every_survivor_is_judged() -> None:
    """At most three of a hundred are not."""
    judged = [bool(survivor["judged"]) for survivor in read_survivors()]
    assert judged.count(False) <= 0.03 * len(judged)


def test_page_has_the_counts() -> None:
    written = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert written.strip() == table().strip()
