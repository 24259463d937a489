"""No name of another package is used that the contract does not list, private or not.

:mod:`tests.helpers.upstream` is the list; ``test_contracts.py`` holds it against their sources.
"""

import argparse
import ast
import builtins
import hashlib
import importlib
import io
import logging
import os
import random
import re
import subprocess
import threading
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.axes
import torch
import tqdm
from transformers import PreTrainedTokenizerBase, Qwen3MoeConfig

import swa_backend
import swa_vllm
from tests.helpers.name_scan import (
    attribute_names,
    defined_names,
    foreign_privates,
    imported_names,
    is_private,
    parse_rooms,
    used_names,
)
from tests.helpers.upstream import CALLED, MEMBERS

# The last part of a place names a class, a function or a module that is used too.
LISTED = {re.split("[:.]", place)[-1] for place in (*MEMBERS, *CALLED)}.union(*MEMBERS.values())
# Whose names the contract lists, wherever our sources use them.
CONTRACTED = {"vllm", "prometheus_client", "ray", "triton", "xformers"}
# Whose attributes are also had without an import of their class, or from instances only.
COMMON: tuple[Any, ...] = (
    *vars(builtins).values(),
    *(argparse.ArgumentParser, argparse.ArgumentParser().add_subparsers(), logging.Logger),
    *(io.TextIOWrapper, os.path, matplotlib.axes.Axes, random.Random, re.Match, re.Pattern),
    *(subprocess.CompletedProcess((), 0), subprocess.Popen, torch.Tensor, torch.cuda),
    *(hashlib.sha256(), torch.distributed, PreTrainedTokenizerBase(), Qwen3MoeConfig()),
    *(threading.Timer(0, print), SimpleNamespace(plan=None)),  # FlashInfer's wrapper has a plan
    tqdm.tqdm(disable=True),
)


@cache
def _sources() -> dict[str, ast.Module]:
    examples = find_spec("quickstart")
    assert examples is not None
    assert examples.origin is not None
    rooms = (*swa_backend.__path__, *swa_vllm.__path__, Path(examples.origin).parent)
    parsed = {room: parse_rooms([Path(room)]) for room in rooms}
    assert all(parsed.values()), "a room has no Python file"
    return {file: module for modules in parsed.values() for file, module in modules.items()}


@cache
def _plugin() -> dict[str, ast.Module]:
    return parse_rooms(map(Path, swa_vllm.__path__))


def test_private_names_of_others_are_listed() -> None:
    unlisted = [str(touch) for touch in foreign_privates(_sources()) if touch.name not in LISTED]
    assert not unlisted, f"private names; use public ones, or list them in MEMBERS: {unlisted}"


def test_names_of_others_are_listed() -> None:
    """Names that our classes or Python's have too, as ``block_size``, are listed by hand alone."""
    known = defined_names(_sources()) | _common_names()
    unlisted = [
        str(touch)
        for touch in attribute_names(_plugin())
        if not touch.name.startswith("_") and touch.name not in LISTED | known
    ]
    assert not unlisted, f"list in MEMBERS what is upstream's, in COMMON what is not: {unlisted}"


def test_imports_from_others_are_listed() -> None:
    """But for vLLM's, which ``test_what_is_imported_exists`` holds without a list."""
    touches = imported_names(_sources(), CONTRACTED - {"vllm"})
    unlisted = [str(touch) for touch in touches if touch.name not in LISTED]
    assert not unlisted, f"list in MEMBERS where they are defined: {unlisted}"


def test_listed_names_are_used() -> None:
    used = used_names(_sources())
    unused = {place: names - used for place, names in MEMBERS.items() if names - used}
    assert not unused, f"nothing uses them any more, take them out of MEMBERS: {unused}"
    assert [place for place in CALLED if re.split("[:.]", place)[-1] not in used] == []


def _common_names() -> set[str]:
    """Names of packages without a contract that the plugin imports, and of :data:`COMMON`."""
    return {name for thing in (*COMMON, *_imported()) for name in dir(thing)}


def _imported() -> Iterator[Any]:
    for module in _plugin().values():
        for node in ast.walk(module):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield _import(alias.name)
            elif isinstance(node, ast.ImportFrom):
                found = _import(str(node.module))
                yield found
                yield from (getattr(found, alias.name, None) for alias in node.names)


def _import(module: str) -> Any:
    """A module, unless it has a contract, is ours or is not installed."""
    if module.partition(".")[0] in CONTRACTED | {"swa_backend", "swa_vllm"}:
        return None
    return importlib.import_module(module) if find_spec(module.partition(".")[0]) else None


def test_plugin_touches_private_names_at_all() -> None:
    """Else the scan or the list would be blind."""
    touched = {touch.name for touch in foreign_privates(_sources())}
    assert {"_null_block", "_k_scale_float", "_build_runtime_env"} <= touched
    assert all(map(is_private, touched))
