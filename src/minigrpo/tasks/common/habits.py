"""Leave out of a program what is only a habit: its docstring, annotations, example calls, `main` and `__main__` block.

What the function uses stays: helpers, classes, imports, constants, and the statements that compute the values that
these read. Everything else at the top level is left out, and never run.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

from minigrpo.tasks.common.harmless_imports import Import, ImportUse, is_for_annotations
from minigrpo.tasks.common.scopes import names_from_outside

_LITERAL_NODES = (ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.UnaryOp, ast.USub, ast.Load)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_COMPUTING = (ast.Assign, ast.AugAssign, ast.For, ast.Expr)
_NO_VALUE = (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)
_PURE_NAMES = (
    "abs all any bool chr dict divmod enumerate filter float frozenset int len list map max min ord range reversed "
    "round set sorted str sum tuple zip"
)
_PURE_BUILTINS = frozenset(_PURE_NAMES.split())


@dataclass(frozen=True, slots=True)
class StrippedProgram:
    """A program without what is only a habit: its statements, and the habits that were left out."""

    tree: ast.Module
    habits: tuple[str, ...]

    @property
    def source(self) -> str:
        return ast.unparse(self.tree)


def strip_habits(tree: ast.Module, name: str) -> StrippedProgram:
    """Leave out annotations, and top-level statements other than definitions and what these use.

    `name`: the function that is asked for. A statement that calls it is an example.
    """
    plain = _Unannotated()
    body = [plain.visit(node) for node in tree.body]
    habits = {"annotations"} if plain.found else set()
    kept = []
    used, names = _find_used(body, name)
    for node in body:
        one: ast.stmt | None = node
        if isinstance(node, Import):
            one = _imported_for(node, names)
        elif not _is_constant(node) and id(node) not in used:
            one = None
        if one is not None:
            kept.append(one)
        if one is not node:
            habits.add("a module docstring" if is_docstring(node) else f"code beside {name}")
    module = ast.Module(kept, tree.type_ignores)
    if plain.imports:
        module = _without_type_aliases(module)
        without = _WithoutImports(ImportUse(list(ast.walk(module))))
        module = without.visit(module)
        habits |= {"an import of annotations"} if without.found else set()
    return StrippedProgram(module, tuple(sorted(habits)))


def is_docstring(node: ast.stmt) -> bool:
    """Return whether a statement is only a text, or another constant."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_plain_value(value: ast.expr) -> bool:
    """Return whether an expression only computes: literals, names, comprehensions, calls of built-ins that do so."""
    parts = list(ast.walk(value))
    calls = [part.func for part in parts if isinstance(part, ast.Call)]
    return not any(isinstance(part, _NO_VALUE) for part in parts) and all(
        isinstance(function, ast.Name) and function.id in _PURE_BUILTINS for function in calls
    )


def _is_constant(node: ast.stmt) -> bool:
    """Return whether a statement gives names to a value that is written out."""
    if not isinstance(node, ast.Assign) or not all(isinstance(target, ast.Name) for target in node.targets):
        return False
    return all(isinstance(part, _LITERAL_NODES) for part in ast.walk(node.value))


def _find_used(body: list[ast.stmt], name: str) -> tuple[set[int], frozenset[str] | None]:
    """Return the ids of the definitions and computing statements that the function uses, directly or through one
    another, and all names that these read from outside; None, and all definitions, where there is nothing to tell."""
    definitions = [node for node in body if isinstance(node, _DEFINITIONS)]
    if len(body) == 1:
        return set(map(id, definitions)), None
    roots = frozenset(node.name for node in definitions)
    waiting = [*definitions, *(node for node in body if isinstance(node, _COMPUTING) and name not in _read_names(node))]
    found: set[int] = set()
    names = roots & {name} or roots
    grown = True
    while grown:
        used = [node for node in waiting if id(node) not in found and names & set(_changed_names(node))]
        names = names.union(*map(_outer_names, used))
        found.update(map(id, used))
        grown = bool(used)
    return found, names


def _imported_for(node: Import, names: frozenset[str] | None) -> Import | None:
    """Return an import without what nobody reads; None where that is all. What is for annotations stays for now."""
    kept = [alias for alias in node.names if is_for_annotations(node, alias) or _is_read_by(alias, names)]
    if len(kept) == len(node.names):
        return node
    left: Import = copy.copy(node)
    left.names = kept
    return left if kept else None


def _is_read_by(alias: ast.alias, names: frozenset[str] | None) -> bool:
    return names is None or alias.name == "*" or (alias.asname or alias.name.partition(".")[0]) in names


def _outer_names(node: ast.stmt) -> frozenset[str]:
    """Return the names that a statement reads from outside."""
    if not isinstance(node, _DEFINITIONS):
        return _read_names(node)
    return names_from_outside(node) or frozenset()  # none where it does not compile: then nothing is run


def _read_names(node: ast.AST) -> frozenset[str]:
    return frozenset(
        part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)
    )


def _changed_names(node: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement binds, or whose value it changes by an item or a method."""
    if isinstance(node, _DEFINITIONS):
        yield node.name
        return
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            yield part.id
        elif isinstance(part, ast.Subscript) and isinstance(part.ctx, ast.Store):
            yield from _root_name(part)
        elif isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute):
            yield from _root_name(part.func)


def _root_name(node: ast.AST) -> list[str]:
    while isinstance(node, ast.Subscript | ast.Attribute):
        node = node.value
    return [node.id] if isinstance(node, ast.Name) else []


class _Unannotated(ast.NodeTransformer):
    """Removes annotations, which would be evaluated; a field of a class keeps one that says nothing.

    `found`: whether there were any; `imports`: whether it came across an import.
    """

    def __init__(self) -> None:
        self.found = self.imports = False
        self.fields: set[int] = set()

    def visit_Import(self, node: ast.Import) -> ast.Import:
        self.imports = True
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        self.imports = True
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        for argument in filter(None, every):
            self.found |= argument.annotation is not None
            argument.annotation = None
        self.found |= node.returns is not None
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line.annotation):
                self.found = True
                line.annotation = ast.Constant("object")
                self.fields.add(id(line))
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        if id(node) in self.fields:
            return node
        self.found = True
        if node.value is None:
            node.annotation = ast.Constant("object")
            return node
        return ast.copy_location(ast.Assign([node.target], node.value), node)


def _without_type_aliases(module: ast.Module) -> ast.Module:
    """Replace types that are written as values, such as `Grid = List[List[int]]`."""
    imports = [node for node in ast.walk(module) if isinstance(node, Import)]
    pairs = [(node, alias) for node in imports for alias in node.names if is_for_annotations(node, alias)]
    names = frozenset(alias.asname or alias.name for _, alias in pairs)
    replaced: ast.Module = _WithoutAliases(names).visit(module)
    return replaced


class _WithoutAliases(ast.NodeTransformer):
    """Replaces `List[int]` by None, where `List`, or the module before it, is one of these imported names."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        root = node.value.value if isinstance(node.value, ast.Attribute) else node.value
        if isinstance(root, ast.Name) and root.id in self.names and isinstance(node.ctx, ast.Load):
            return ast.copy_location(ast.Constant(None), node)
        self.generic_visit(node)
        return node


class _WithoutImports(ast.NodeTransformer):
    """Removes imports that were for annotations, unless what they bring is used and harmless."""

    def __init__(self, use: ImportUse) -> None:
        self.use = use
        self.found = False

    def visit_Import(self, node: ast.Import) -> ast.stmt | None:
        return self._visit_import(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt | None:
        return self._visit_import(node)

    def _visit_import(self, node: Import) -> ast.stmt | None:
        kept = [
            alias
            for alias in node.names
            if not is_for_annotations(node, alias) or (self.use.uses(alias) and self.use.is_harmless(node, alias))
        ]
        self.found |= len(kept) < len(node.names)
        node.names = kept
        return node if kept else None

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.body = node.body or [ast.Pass()]
        return node
