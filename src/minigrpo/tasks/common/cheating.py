"""Find cheats in the text of a program: imports, and names that hide what it does or keep state between calls.

Scopes decide whether a name counts: an `exit` that the program defines itself is harmless. Cheats found here are named
and cost a reward; safety does not depend on them, that is the sandbox's job.
"""

from __future__ import annotations

import ast
import symtable
import types
from collections.abc import Iterator, Sequence

from minigrpo.tasks.common.harmless_imports import find_imports
from minigrpo.tasks.common.hidden_access import (
    catches_errors,
    find_hidden_access,
    is_literal_getattr,
    receives_tracebacks,
)
from minigrpo.tasks.common.scopes import outer_names

_HIDING_BUILTINS = frozenset(
    {
        *("compile", "eval", "exec", "globals", "locals", "open", "vars"),
        *("copyright", "credits", "exit", "help", "license", "quit"),
        *("delattr", "getattr", "setattr"),
    }
)
"""Built-ins with which a program can hide what it does, or keep state. No honest program needs them."""

_CALLED_BUILTINS = frozenset({"copyright", "credits", "exit", "help", "license", "quit"})
"""Those of them that gain nothing where they are only called: where programs run, there are none."""

_OPERATIONS = (
    "name init len iter next contains repr str eq ne lt le gt ge hash bool int float index round abs neg pos invert "
    "getitem setitem delitem missing reversed call enter exit format doc qualname new post_init slots "
    "add sub mul truediv floordiv mod divmod pow and or xor lshift rshift radd rsub rmul rand ror rxor "
    "iadd isub imul iand ior ixor"
)
_HARMLESS_DUNDERS = frozenset(f"__{name}__" for name in _OPERATIONS.split())
"""Dunder names that honest programs use: operations and names, which give access to nothing."""

_DISGUISING_DUNDERS = frozenset({"__builtins__", "__class__", "__import__"})
"""Dunder names that no honest program even assigns (unlike `__slots__`): they fake a class or a built-in."""

_FRAME_TYPES = (types.FrameType, types.CodeType, types.TracebackType)
_GENERATOR_TYPES = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)
_ATTRIBUTE_PREFIXES = ("f_", "co_", "tb_", "gi_", "cr_", "ag_")


def _internal_attributes(*kinds: type) -> frozenset[str]:
    return frozenset(name for kind in kinds for name in dir(kind) if name.startswith(_ATTRIBUTE_PREFIXES))


_FRAME_ATTRIBUTES = _internal_attributes(*_FRAME_TYPES)
"""Attributes of frames, code and tracebacks; allowed where the program sets that name on its own objects."""
_GENERATOR_ATTRIBUTES = _internal_attributes(*_GENERATOR_TYPES)
"""The only attributes without underscores that lead to a frame or code: never allowed, even if the program sets one."""
_LASTING_ATTRIBUTES = frozenset({"cache_info", "mro", "_generate_next_value_", "_missing_"})
"""Attributes that lead to what outlives a call: classes (of a class, of functools' caches), functions of `Enum`."""


def find_cheats(tree: ast.AST, scopes: symtable.SymbolTable | None) -> Iterator[str]:
    """Yield what a program must not use. Without `scopes` (it does not compile) use of built-ins is not checked."""
    # Walked once, because a walk takes longer than most of what is asked here; nearly half of it is Load and the like.
    nodes = [node for node in ast.walk(tree) if node._fields]
    if scopes is not None:
        own = _assigned_names(scopes) | _written_out_uses(nodes) | _only_called(nodes)
        yield from (f"uses {name}" for name in outer_names(scopes) if name in _HIDING_BUILTINS and name not in own)
    yield from ("import" for _ in find_imports(nodes))
    given_tracebacks = receives_tracebacks(nodes)
    barred = _GENERATOR_ATTRIBUTES | _LASTING_ATTRIBUTES
    if given_tracebacks or catches_errors(nodes):
        barred |= {"obj"}  # of an AttributeError: whatever lacked the attribute
    set_here = frozenset() if given_tracebacks else frozenset(_assigned_attributes(nodes))

    def is_internal(attribute: str) -> bool:
        return _is_dunder(attribute) or attribute in barred or attribute in _FRAME_ATTRIBUTES - set_here

    yield from (f"uses {name}" for name in find_hidden_access(nodes, is_internal))
    harmless = {id(node) for node in _harmless_classes(nodes)}
    for node in nodes:
        if isinstance(node, ast.Name) and _is_dunder(node.id) and (_is_read(node) or node.id in _DISGUISING_DUNDERS):
            yield "import" if node.id == "__import__" else f"uses {node.id}"
        elif isinstance(node, ast.Global):
            yield from (f"uses {name}" for name in node.names if _is_dunder(name))
        elif isinstance(node, ast.Attribute) and is_internal(node.attr) and id(node) not in harmless:
            yield f"uses {node.attr}"


def _harmless_classes(nodes: Sequence[ast.AST]) -> Iterator[ast.expr]:
    """Yield each `x.__class__` that is only called, compared or asked for an attribute: `type(x)` would do the same."""
    for node in nodes:
        if isinstance(node, ast.Attribute):  # which is itself looked at
            found = [node.value]
        elif isinstance(node, ast.Call):
            found = [node.func]
        elif isinstance(node, ast.Compare):
            found = [node.left, *node.comparators]
        else:
            continue
        yield from (
            one for one in found if isinstance(one, ast.Attribute) and one.attr == "__class__" and _is_read(one)
        )


def _written_out_uses(nodes: Sequence[ast.AST]) -> frozenset[str]:
    """Return getattr where a program only ever calls it with the attribute's name written out."""
    uses = [node for node in nodes if isinstance(node, ast.Name) and node.id == "getattr"]
    plain = [node for node in nodes if is_literal_getattr(node)]
    return frozenset({"getattr"}) if len(uses) == len(plain) else frozenset()


def _only_called(nodes: Sequence[ast.AST]) -> frozenset[str]:
    """Return those of `_CALLED_BUILTINS` that a program only ever calls."""
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    handed = {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in called}
    return _CALLED_BUILTINS - handed


def _assigned_names(scopes: symtable.SymbolTable) -> frozenset[str]:
    """Return the names that the program defines at module level."""
    return frozenset(symbol.get_name() for symbol in scopes.get_symbols() if symbol.is_assigned())


def _assigned_attributes(nodes: Sequence[ast.AST]) -> Iterator[str]:
    """Yield attributes that the program sets, or defines in a class of its own."""
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.ClassDef):
            made = [part for line in node.body for part in ast.walk(line)]
            yield from (part.id for part in made if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store))
            yield from (part.name for part in node.body if isinstance(part, ast.FunctionDef))


def _is_read(node: ast.Name | ast.Attribute) -> bool:
    return isinstance(node.ctx, ast.Load)


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__") and name not in _HARMLESS_DUNDERS
