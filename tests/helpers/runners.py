"""A vLLM and one of its model runners, which run the engines of a test process.

The whole suite on each of them would take hours. The cases of an engine's test file take turns
instead, so that each runs somewhere, each file on both vLLMs, and what is marked ``everywhere`` on
all of them; ``-m full`` has no turns.
"""

import os
from collections.abc import Iterator, Sequence
from importlib import metadata
from itertools import cycle
from pathlib import Path

import pytest

RUNNERS = ("0.32/V1", "0.33/V2", "0.33/V1")
_VERSION = ".".join(metadata.version("vllm").split(".")[:2])
RUNNER = f"{_VERSION}/V{2 if os.environ.get('VLLM_USE_V2_MODEL_RUNNER') == '1' else 1}"

# What has to equal vLLM without the plugin to the last bit does so over the same operators, and
# real weights take minutes in the interpreter.
_NEEDS_OPERATORS = frozenset({"describe_stock", "stock_accepts", "demo_model"})
_HAS_OPERATORS = ("0.32/V1", "0.33/V1")
# In Triton's interpreter vLLM's V2 takes several times as long: one turn in five.
_TURNS = (*RUNNERS, *_HAS_OPERATORS)
# Where what has no turns runs: what needs vLLM but no model on both vLLMs, all else on one.
_OF_ROOM = {"plugin": ("0.32/V1", "0.33/V1")}


def turns(items: Sequence[pytest.Item]) -> Iterator[tuple[pytest.Item, tuple[str, ...]]]:
    """Each test, and the runners that it runs on by default."""
    next_turn: dict[tuple[Path, bool], Iterator[str]] = {}
    for item in items:
        only_on = item.get_closest_marker("only_on")
        by_operators = not _NEEDS_OPERATORS.isdisjoint(getattr(item, "fixturenames", ()))
        if only_on is not None:
            yield item, only_on.args
        elif item.get_closest_marker("everywhere"):
            yield item, RUNNERS
        elif item.path.parent.name == "engine":
            of_file = cycle(_HAS_OPERATORS if by_operators else _TURNS)
            yield item, (next(next_turn.setdefault((item.path, by_operators), of_file)),)
        else:
            room = item.path.relative_to(Path(__file__).parents[1]).parts[0]
            yield item, _OF_ROOM.get(room, RUNNERS[:1])
