"""The names that a piece of code reads from outside of itself."""

from __future__ import annotations

import ast
import symtable
from collections.abc import Iterator


def names_from_outside(node: ast.stmt) -> frozenset[str] | None:
    """Return the names that a definition reads from outside; None where it does not compile by itself."""
    try:
        return frozenset(outer_names(symtable.symtable(ast.unparse(node), "<definition>", "exec")))
    except SyntaxError:
        return None


def outer_names(scope: symtable.SymbolTable) -> Iterator[str]:
    """Yield names that are read, in this scope or one inside it, and that may refer to built-ins.

    A name that a function binds anywhere is local to the function. A class body differs: a name not yet bound there is
    looked up in the globals, past all enclosing functions.
    """
    for symbol in scope.get_symbols():
        outside = symbol.is_global() or (symbol.is_local() and scope.get_type() != "function")
        if symbol.is_referenced() and outside:
            yield symbol.get_name()
    for child in scope.get_children():
        yield from outer_names(child)
