"""The scan for names of others finds each in whatever way it is spelt, and no name of our own."""

import ast
import textwrap

import pytest

from tests.helpers.name_scan import attribute_names, foreign_privates, imported_names, used_names

# Snippets, and the names that are found in each.
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
    "import-of-ours": ("from swa_vllm.attention.layer_table import _layer_table", ["_layer_table"]),
    "relative-import": ("from .layer_table import _layer_table", ["_layer_table"]),
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


def test_import_scan_sees_the_packages_that_it_is_asked_for() -> None:
    code = "from ray.util import a as b\nfrom os import path\ndef f():\n    from ray import nodes"
    names = [touch.name for touch in imported_names({"a.py": ast.parse(code)}, {"ray"})]
    assert sorted(names) == ["a", "nodes"]


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
