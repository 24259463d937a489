"""No name of another package is used that the contract does not list, private or not.

:mod:`upstream` is the list; ``tests/test_contracts.py`` holds it against their sources.
"""

import argparse
import ast
import builtins
import importlib
import io
import logging
import os
import random
import re
import subprocess
import textwrap
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib.axes
import pytest
import torch
import tqdm

import swa_backend
import swa_vllm
from name_scan import (
    attribute_names,
    defined_names,
    foreign_privates,
    is_private,
    parse_rooms,
    used_names,
)
from upstream import CALLED, MEMBERS

LISTED = set[str]().union(*MEMBERS.values()) | {re.split("[:.]", place)[-1] for place in CALLED}
# Whose names the contract lists, wherever our sources use them.
CONTRACTED = {"vllm", "prometheus_client", "ray", "triton", "xformers"}
# Whose attributes are also had without an import of their class, or from instances only.
COMMON: tuple[Any, ...] = (
    *vars(builtins).values(),
    *(argparse.ArgumentParser, argparse.ArgumentParser().add_subparsers(), logging.Logger),
    *(io.TextIOWrapper, os.path, matplotlib.axes.Axes, random.Random, re.Match, re.Pattern),
    *(subprocess.CompletedProcess((), 0), subprocess.Popen, torch.Tensor, torch.cuda),
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


def test_listed_names_are_used() -> None:
    used = used_names(_sources())
    unused = {place: names - used for place, names in MEMBERS.items() if names - used}
    assert not unused
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


# Of the scan itself: snippets, and the names that it finds in each.
FOUND = {
    "attribute": ("request._tokens", ["_tokens"]),
    "written": ("request._tokens = 1", ["_tokens"]),
    "deleted": ("del request._tokens", ["_tokens"]),
    "method": ("pool._free(block)", ["_free"]),
    "in-a-chain": ("torch._C.name", ["_C"]),
    "mangled": ("request.__tokens", ["__tokens"]),
    "import": ("from vllm.v1.request import _tokens", ["_tokens"]),
    "import-renamed": ("from vllm.v1.request import _tokens as tokens", ["_tokens"]),
    "import-in-a-function": ("def f():\n    from a import _b", ["_b"]),
    "import-of-ours": ("from swa_vllm.report import _table", ["_table"]),
    "relative-import": ("from .report import _table", ["_table"]),
    "from-a-private-module": ("from vllm._custom_ops import name", ["_custom_ops"]),
    "private-module": ("import vllm._custom_ops", ["_custom_ops"]),
    "getattr": ('getattr(pool, "_free")', ["_free"]),
    "getattr-default": ('getattr(pool, "_free", None)', ["_free"]),
    "hasattr": ('hasattr(pool, "_free")', ["_free"]),
    "setattr": ('setattr(pool, "_free", 1)', ["_free"]),
    "attrgetter": ('operator.attrgetter("pool._free")', ["_free"]),
    "methodcaller": ('operator.methodcaller("_free")', ["_free"]),
    "patch": ('patch.object(triton, "_active", 1)', ["_active"]),
    "vars": ('vars(pool)["_free"]', ["_free"]),
    "dict": ('pool.__dict__["_free"]', ["_free"]),
    "getattr-of-self": ('class A:\n    def f(self): getattr(self, "_free")', ["_free"]),
    "self": ("class A:\n    def f(self): self._a", ["_a"]),
    "cls": ("class A:\n    @classmethod\n    def f(cls): cls._a", ["_a"]),
    "self-outside-a-class": ("def f(self): self._a", ["_a"]),
    "of-another-class": (
        "class A:\n    def f(self): self._a = 1\nclass B:\n    def f(self): self._a",
        ["_a"],
    ),
    "of-a-derived-class": (
        "class A:\n    def f(self): self._a\nclass B(A):\n    def f(self): self._a = 1",
        ["_a"],
    ),
    "of-an-inner-class": (
        "class A:\n    class B:\n        _a = 1\n    def f(self): self._a",
        ["_a"],
    ),
    "only-counted-up": ("class A:\n    def f(self): self._a += 1", ["_a"]),
    "base-of-theirs": (
        "from vllm import B\nclass A(B):\n    def f(self): self._a",
        ["_a"],
    ),
    "super": ("class A(B):\n    def _f(self): super()._f()", ["_f"]),
    "super-getattr": ('class A(B):\n    def _f(self): getattr(super(), "_f")', ["_f"]),
    "own-class-by-another-name": (
        "class A:\n    def f(self, other):\n        self._a = 1\n        return other._a",
        ["_a"],
    ),
    "in-a-default": ("class A:\n    def f(self, a=B._c): pass", ["_c"]),
    "in-a-decorator": ("@a._b\nclass A: pass", ["_b"]),
    "base": ("class A(vllm._B): pass", ["_B"]),
}
OWN = {
    "public": "request.tokens",
    "dunder": "request.__dict__",
    "dunder-import": "from vllm.version import __version__",
    "underscore": "for _ in range(3): gettext._",
    "local": "_a = 1\nprint(_a)",
    "public-by-string": 'getattr(pool, "free")',
    "string-elsewhere": 'print("_free")',
    "subscript": 'table["_free"]',
    "assigned": "class A:\n    def __init__(self): self._a = 1\n    def f(self): return self._a",
    "assigned-in-a-tuple": "class A:\n    def f(self): self._a, self._b = self._b, self._a",
    "annotated": "class A:\n    def f(self): self._a: int = 1; self._a",
    "assigned-by-cls": "class A:\n    def f(cls): cls._a = 1\n    def g(self): self._a",
    "field": "@dataclass\nclass A:\n    _a: int\n    def f(self): self._a",
    "class-attribute": "class A:\n    _a = 1\n    def f(self): self._a",
    "under-a-condition": "class A:\n    if b:\n        _a = 1\n    def f(self): self._a",
    "own-method": "class A:\n    def _a(self): pass\n    def f(self): self._a()",
    "async-method": "class A:\n    async def _a(self): pass\n    async def f(self): self._a()",
    "property": "class A:\n    @property\n    def _a(self): pass\n    def f(self): self._a",
    "own-base": "class A(B): pass\nclass B:\n    _a = 1\nclass C(A):\n    def f(self): self._a",
    "generic-base": "class B:\n    _a = 1\nclass A(m.B[int]):\n    def f(self): self._a",
    "super-of-own-base": "class B:\n    _f = 1\nclass A(B):\n    def _f(self): super()._f()",
    "own-by-string": 'class A:\n    _a = 1\n    def f(self): getattr(self, "_a")',
    "in-a-closure": "class A:\n    _a = 1\n    def f(self): return lambda: self._a",
    "outer-after-inner": "class A:\n    class B: pass\n    _a = 1\n    def f(self): self._a",
}


def _privates(code: str) -> list[str]:
    return [touch.name for touch in foreign_privates({"snippet.py": ast.parse(code)})]


@pytest.mark.parametrize(("code", "names"), FOUND.values(), ids=FOUND)
def test_scan_finds(code: str, names: list[str]) -> None:
    assert _privates(code) == names


@pytest.mark.parametrize("code", OWN.values(), ids=OWN)
def test_scan_lets_pass(code: str) -> None:
    assert _privates(code) == []


def test_bases_are_found_in_other_files() -> None:
    base = ast.parse("class B:\n    def f(self): self._a = 1")
    derived = ast.parse("from base import B\nclass A(B):\n    def f(self): self._a")
    assert foreign_privates({"base.py": base, "derived.py": derived}) == []


def test_findings_say_where() -> None:
    (touch,) = foreign_privates({"a.py": ast.parse("\n\npool._free(1)")})
    assert str(touch) == "a.py:3: pool._free"


def test_public_scan_sees_all_attributes_but_arguments() -> None:
    code = "args.steps\nvllm_config.model_config.dtype = batch.num_reqs"
    names = [touch.name for touch in attribute_names({"a.py": ast.parse(code)})]
    assert sorted(names) == ["dtype", "model_config", "num_reqs"]


def test_names_in_use() -> None:
    code = """
    from vllm.a import imported as other
    class Own(Base):
        overridden = 1
        def method(self, parameter): self.read(keyword=getattr(x, "spelt"))
    """
    used = used_names({"a.py": ast.parse(textwrap.dedent(code))})
    assert used >= {"imported", "overridden", "method", "read", "keyword", "spelt"}
    assert not used & {"other", "parameter", "self"}


def test_plugin_touches_private_names_at_all() -> None:
    """Else the scan or the list would be blind."""
    touched = {touch.name for touch in foreign_privates(_sources())}
    assert {"_null_block", "_k_scale_float", "_build_runtime_env"} <= touched
    assert all(map(is_private, touched))
