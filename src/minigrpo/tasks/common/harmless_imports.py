"""Tell imports that gain nothing from those that are forbidden.

Models import `deque`, `dataclass` and the like out of habit. An imported object stays in the process, so it must offer
no place for notes that a later call could read: classes written in C take no attribute, and what is written in Python
may only be called, never handed around. An import of anything else is a cheat.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

Import = ast.Import | ast.ImportFrom

_ANNOTATION_MODULES = frozenset({"typing", "__future__", "collections.abc"})
"""Modules that honest programs import for their annotations, which are left out."""

_VALUES = {"collections": frozenset({"OrderedDict", "defaultdict", "deque"})}
"""Classes to which nothing can be attached: they may be used in any way."""

_CALLED = {
    "collections": frozenset({"Counter", "namedtuple"}),
    "dataclasses": frozenset({"dataclass", "field"}),
    "typing": frozenset({"NamedTuple", "cast"}),
}
"""Python objects that may be called, decorate a class or be its base, but may not be passed on as values."""

_WITH_CLASS = frozenset({"Counter", "field"})
"""Those whose results have a class that could keep notes: beside them no program may ask for the class of a value."""


def find_imports(nodes: Sequence[ast.AST]) -> Iterator[Import]:
    """Yield the imports of a program that are not harmless."""
    imports = [node for node in nodes if isinstance(node, Import)]
    use = ImportUse(nodes if imports else ())
    for node in imports:
        if not all(use.is_harmless(node, alias) for alias in node.names):
            yield node


def is_for_annotations(node: Import, alias: ast.alias) -> bool:
    """Return whether an import is of a module that honest programs import for their annotations."""
    module = alias.name if isinstance(node, ast.Import) else node.module if not node.level else None
    return module in _ANNOTATION_MODULES


def imports_name(nodes: Sequence[ast.AST], module: str, name: str) -> bool:
    """Return whether a program takes `name` from `module` and keeps its name."""
    found = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == module]
    return any(alias.name == name and alias.asname in (None, name) for node in found for alias in node.names)


class ImportUse:
    """How a program uses what it imports."""

    def __init__(self, nodes: Sequence[ast.AST]) -> None:
        self.parents = {id(child): node for node in nodes for child in ast.iter_child_nodes(node)}
        self.names = [node for node in nodes if isinstance(node, ast.Name)]
        self.asks_class = any(name.id == "type" for name in self.names) or any(map(self._is_class_of, nodes))

    def uses(self, alias: ast.alias) -> list[ast.Name]:
        bound = alias.asname or alias.name.partition(".")[0]
        return [name for name in self.names if name.id == bound]

    def is_harmless(self, node: Import, alias: ast.alias) -> bool:
        """Return whether neither an import nor any use of its name gains anything."""
        names = self.uses(alias)
        if (alias.asname or alias.name).startswith("__"):
            return False
        if isinstance(node, ast.ImportFrom):
            places: list[ast.Name | None] = [*names] or [None]
            return not node.level and all(self._may_use(node.module or "", alias.name, name) for name in places)
        if isinstance(self.parents.get(id(node)), ast.ClassDef):  # the module would be an attribute of the class
            return False
        members = [self.parents[id(name)] for name in names]
        return bool(members) and all(
            isinstance(member, ast.Attribute) and self._may_use(alias.name, member.attr, member) for member in members
        )

    def _may_use(self, module: str, name: str, node: ast.Name | ast.Attribute | None) -> bool:
        """Return whether an imported object may stand where `node` is; None where it stands nowhere."""
        if name in _VALUES.get(module, ()):
            return node is None or isinstance(node.ctx, ast.Load)
        if name not in _CALLED.get(module, ()) or (name in _WITH_CLASS and self.asks_class):
            return False
        above = self.parents.get(id(node))
        called = isinstance(above, ast.Call) and above.func is node
        return node is None or called or (isinstance(above, ast.ClassDef) and name not in _WITH_CLASS)

    def _is_class_of(self, node: ast.AST) -> bool:
        """Return whether a node reads the class of a value, and not only its name."""
        above = self.parents.get(id(node))
        named = isinstance(above, ast.Attribute) and above.attr == "__name__"
        return isinstance(node, ast.Attribute) and node.attr == "__class__" and not named
