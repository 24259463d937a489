"""Names in our sources that somebody else defines, found in the syntax."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Functions that take an attribute's name as a string.
_BY_STRING = {"attrgetter", "delattr", "getattr", "hasattr", "methodcaller", "object", "setattr"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

Modules = Mapping[str, ast.Module]


@dataclass(frozen=True)
class Touch:
    """A place in our sources that names something.

    Attributes:
        where: file and line.
        written: the expression, as it stands there.
        name: the part of it that is looked for.
    """

    where: str
    written: str
    name: str

    def __str__(self) -> str:
        return f"{self.where}: {self.written}"


def parse_rooms(rooms: Iterable[Path]) -> dict[str, ast.Module]:
    """Syntax trees of all Python files below some folders, by their paths."""
    files = (file for room in rooms for file in sorted(room.rglob("*.py")))
    return {str(file): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def is_private(name: str) -> bool:
    """Whether a name starts with an underscore and is not one of Python's own, as ``__init__``."""
    return name.strip("_") != "" and name.startswith("_") and not is_dunder(name)


def is_dunder(name: str) -> bool:
    """Whether Python itself gives a name its meaning."""
    return name.startswith("__") and name.endswith("__")


def foreign_privates(modules: Modules) -> list[Touch]:
    """Places that name something private which is not their own class's.

    That is ``x._name``, unless ``x`` is ``self`` or ``cls`` and the class or a base among
    ``modules`` defines the name; ``super()._name``, unless such a base does; the same by strings,
    as in ``getattr(x, "_name")``; and the import of a private name or module, ours included.
    """
    classes = _Classes(modules)
    found = []
    for file, module in modules.items():
        scan = _Scan(file, classes)
        scan.visit(module)
        found += scan.found
    return found


def attribute_names(modules: Modules) -> Iterator[Touch]:
    """Every ``x.name``, but for those of a command line's ``args``."""
    for file, node in _walk(modules):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) != "args":
            yield Touch(f"{file}:{node.lineno}", ast.unparse(node), node.attr)


def imported_names(modules: Modules, packages: set[str]) -> Iterator[Touch]:
    """Every name that is imported from a module of some packages."""
    for file, node in _walk(modules):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in packages:
            for alias in node.names:
                yield Touch(f"{file}:{node.lineno}", ast.unparse(node), alias.name)


def used_names(modules: Modules) -> set[str]:
    """Names that are read, written, imported, passed by keyword, overridden or spelt in strings."""
    names = set()
    for _, node in _walk(modules):
        match node:
            case ast.Attribute(attr=name) | ast.keyword(arg=str(name)) | ast.alias(name=name):
                names.add(name)
            case ast.Constant(value=str(name)):
                names.add(name)
            case ast.Subscript():
                names.add("__getitem__")
            case ast.ClassDef():
                names |= body_names(node)
    return names


def defined_names(modules: Modules) -> set[str]:
    """Names of our functions, classes, fields, attributes and module-level variables."""
    names = set()
    for module in modules.values():
        names |= body_names(module)
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef):
                names |= {node.name} | class_names(node)
            elif isinstance(node, _FUNCTIONS):
                names.add(node.name)
    return names


def class_names(node: ast.ClassDef) -> set[str]:
    """Names that a class defines in its body, or its methods assign to ``self`` or ``cls``."""
    return body_names(node) | set(assigned_attributes(node, ("self", "cls")))


def assigned_attributes(node: ast.AST, receivers: tuple[str, ...] = ()) -> Iterator[str]:
    """Attributes that are assigned below a node, but for classes inside; of any receiver or some.

    ``x.name += 1`` needs the attribute and gives it to nobody.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            continue
        if (
            isinstance(child, ast.Attribute)
            and isinstance(child.ctx, ast.Store)
            and not isinstance(node, ast.AugAssign)
            and (not receivers or ast.unparse(child.value) in receivers)
        ):
            yield child.attr
        yield from assigned_attributes(child, receivers)


def _walk(modules: Modules) -> Iterator[tuple[str, ast.AST]]:
    return ((file, node) for file, module in modules.items() for node in ast.walk(module))


def body_names(node: ast.ClassDef | ast.Module) -> set[str]:
    """Names that the statements of a class or module bind."""
    names = set()
    for statement in _statements(node):
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(statement.name)
            case ast.Assign(targets=targets):
                names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return names


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """What runs in a body, ``if`` and ``try`` in it included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler):
            yield child
            if not isinstance(child, (*_FUNCTIONS, ast.ClassDef)):
                yield from _statements(child)


class _Classes:
    """Our classes, and what each has from itself and from its bases among them."""

    def __init__(self, modules: Modules) -> None:
        self._by_name: dict[str, list[ast.ClassDef]] = {}
        for _, node in _walk(modules):
            if isinstance(node, ast.ClassDef):
                self._by_name.setdefault(node.name, []).append(node)

    def inherited(self, node: ast.ClassDef) -> set[str]:
        """Names that our bases of a class define."""
        bases = {_last_part(base) for base in node.bases} - {node.name}
        ours = [found for name in bases for found in self._by_name.get(name, ())]
        return set[str]().union(*map(self.names, ours))

    def names(self, node: ast.ClassDef) -> set[str]:
        """Names that a class and our bases of it define."""
        return class_names(node) | self.inherited(node)


def _last_part(base: ast.expr) -> str:
    """``Base`` of ``module.Base[int]``."""
    return ast.unparse(base).partition("[")[0].rpartition(".")[2]


@dataclass
class _Scan(ast.NodeVisitor):
    """Visits a file; see :func:`foreign_privates`."""

    file: str
    classes: _Classes
    found: list[Touch] = field(default_factory=list)
    inside: ast.ClassDef | None = None

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for outer in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(outer)
        around, self.inside = self.inside, node
        for statement in node.body:
            self.visit(statement)
        self.inside = around

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr not in self._own(node.value):
            self._note(node, node.attr)
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._note(node, *alias.name.split("."))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self._note(node, *(node.module or "").split("."), *(alias.name for alias in node.names))

    def visit_Call(self, node: ast.Call) -> None:
        if _last_part(node.func) in _BY_STRING:
            own = self._own(node.args[0]) if node.args else set()
            for argument in node.args:
                if isinstance(argument, ast.Constant) and argument.value not in own:
                    self._note(node, *str(argument.value).split("."))
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        # vars(x)["_name"] and x.__dict__["_name"]
        of_object = ast.unparse(node.value).startswith("vars(") or (
            isinstance(node.value, ast.Attribute) and node.value.attr == "__dict__"
        )
        if of_object and isinstance(node.slice, ast.Constant):
            self._note(node, str(node.slice.value))
        self.generic_visit(node)

    def _own(self, receiver: ast.expr) -> set[str]:
        """Names that an expression surely has from our classes."""
        if self.inside is None:
            return set()
        match receiver:
            case ast.Name(id="self" | "cls"):
                return self.classes.names(self.inside)
            case ast.Call(func=ast.Name(id="super")):
                return self.classes.inherited(self.inside)
        return set()

    def _note(self, node: Any, *names: str) -> None:
        where, written = f"{self.file}:{node.lineno}", ast.unparse(node)
        self.found += [Touch(where, written, name) for name in names if is_private(name)]
