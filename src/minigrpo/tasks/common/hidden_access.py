"""Find every way by which a string or a pattern becomes an attribute, and the attributes that it may not become.

A program could name an attribute where no reader of its text expects one: in the string given to `getattr`, in a field
of `str.format` (whose failure hands out the object in `AttributeError.obj`), or in the `__match_args__` of a class that
calls every value its instance. Honest programs use all of these with names of their own, which cost nothing.
"""

from __future__ import annotations

import ast
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

IsInternal = Callable[[str], bool]

_MATCHED_NAMES = "bool bytearray bytes dict float frozenset int list set str tuple"
_MATCHED_WHOLE = frozenset(_MATCHED_NAMES.split())
"""Built-in classes whose positional pattern is the value itself, no attribute."""

_PLAIN_BASES = _MATCHED_WHOLE | {"object", "Exception", "ValueError", "KeyError"}
_MATCH_ARGS = "__match_args__"


def find_hidden_access(nodes: Sequence[ast.AST], is_internal: IsInternal) -> Iterator[str]:
    """Yield the internal attributes that a program reaches by a string or a pattern."""
    classes = _Classes(nodes, is_internal)
    for node in nodes:
        if isinstance(node, ast.Call):
            yield from filter(is_internal, _named_in_call(node))
        elif isinstance(node, ast.MatchClass):
            yield from filter(is_internal, node.kwd_attrs)  # case object(__class__=kind)
            if node.patterns and not classes.is_plain(node.cls):
                yield "attributes through a pattern"
        elif _MATCH_ARGS in _strings_of(node) and id(node) not in classes.written_out:
            yield _MATCH_ARGS


def is_literal_getattr(node: ast.AST) -> bool:
    """Return whether a node is getattr(x, "name") or getattr(x, "name", default), with the name written out."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "getattr"
        and len(node.args) in (2, 3)
        and not node.keywords
        and not any(isinstance(part, ast.Starred) for part in node.args)
        and isinstance(node.args[1], ast.Constant)
        and isinstance(node.args[1].value, str)
    )


def catches_errors(nodes: Sequence[ast.AST]) -> bool:
    """Return whether a program catches exceptions."""
    return any(isinstance(node, ast.ExceptHandler) for node in nodes)


def receives_tracebacks(nodes: Sequence[ast.AST]) -> bool:
    """Return whether a program has an `__exit__`, which is given errors and their tracebacks as arguments."""
    return holds_name(nodes, frozenset({"__exit__", "__aexit__"}))


def holds_name(nodes: Sequence[ast.AST], names: frozenset[str]) -> bool:
    """Return whether one of these names stands in a program, whatever it does with it."""
    return any(name in names for node in nodes for name in _strings_of(node))


def _named_in_call(node: ast.Call) -> Iterator[str]:
    if is_literal_getattr(node):
        yield node.args[1].value  # type: ignore[attr-defined]
    function = node.func
    if isinstance(function, ast.Attribute) and function.attr in ("format", "format_map"):
        written = function.value.value if isinstance(function.value, ast.Constant) else ""
        if isinstance(written, str):
            yield from _format_attributes(written)


def _format_attributes(text: str) -> Iterator[str]:
    """Yield the attributes that the fields of a format string read; `__class__` before `__name__` gives only a name."""
    try:
        fields = list(string.Formatter().parse(text))
    except ValueError:  # it will not be formatted either
        return
    for _, name, spec, _ in fields:
        parts = (name or "").replace("[", ".[").split(".")[1:]
        if parts == ["__class__", "__name__"]:
            continue
        yield from parts
        yield from _format_attributes(spec or "")


def _strings_of(node: ast.AST) -> list[str]:
    """Return the names that a node itself holds, whatever it does with them; not the text of constants."""
    found: list[str] = []
    for value in () if isinstance(node, ast.Constant) else vars(node).values():
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, list):
            found += [part for part in value if isinstance(part, str)]
    return found


def _imports_name(nodes: Sequence[ast.AST], module: str, name: str) -> bool:
    """Return whether a program takes `name` from `module` and keeps its name."""
    found = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == module]
    return any(alias.name == name and alias.asname in (None, name) for node in found for alias in node.names)


class _Classes:
    """The classes of a program, and whether their positional patterns read nothing but what is written out.

    A class does so if its name means nothing else, no metaclass or decorator can change what is an instance of it, and
    its fields and `__match_args__` are no internal attributes.
    """

    def __init__(self, nodes: Sequence[ast.AST], is_internal: IsInternal) -> None:
        self.nodes, self.is_internal = nodes, is_internal

    # Computed when asked for: few programs have a pattern.
    @cached_property
    def imported(self) -> dict[str, bool]:
        kept = (("typing", "NamedTuple"), ("dataclasses", "dataclass"))
        return {name: _imports_name(self.nodes, module, name) for module, name in kept}

    @cached_property
    def bound(self) -> Counter[str]:
        return Counter(name for node in self.nodes for name in _bound_names(node))

    @cached_property
    def defined(self) -> dict[str, ast.ClassDef]:
        return {node.name: node for node in self.nodes if isinstance(node, ast.ClassDef)}

    @cached_property
    def written_out(self) -> set[int]:
        return {
            id(line.targets[0])
            for node in self.defined.values()
            for line in node.body
            if isinstance(line, ast.Assign) and len(line.targets) == 1 and self._names_plainly(line.value)
        }

    def is_plain(self, node: ast.expr, above: frozenset[str] = frozenset()) -> bool:
        """Return whether a name in a pattern, or the base of such a class, is one that hides nothing."""
        if not isinstance(node, ast.Name) or node.id in above:
            return False
        name, count = node.id, self.bound[node.id]
        if name == "NamedTuple":
            return bool(above) and self.imported[name] and count == 1
        if name in (_PLAIN_BASES if above else _MATCHED_WHOLE):
            return not count
        found = self.defined.get(name)
        return (
            found is not None
            and count == 1
            and not found.keywords
            and all(map(self._is_dataclass, found.decorator_list))
            and all(self.is_plain(base, above | {name}) for base in found.bases)
            and not any(map(self.is_internal, _annotated(found)))
        )

    def _is_dataclass(self, node: ast.expr) -> bool:
        maker = node.func if isinstance(node, ast.Call) else node
        return (
            isinstance(maker, ast.Name)
            and maker.id == "dataclass"
            and self.imported["dataclass"]
            and self.bound["dataclass"] == 1
        )

    def _names_plainly(self, value: ast.expr) -> bool:
        parts = value.elts if isinstance(value, ast.Tuple) else [value]
        texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        return len(texts) == len(parts) and not any(map(self.is_internal, texts))


def _bound_names(node: ast.AST) -> list[str]:
    """Return the names to which a node may give a meaning."""
    if isinstance(node, ast.Name):
        return [] if isinstance(node.ctx, ast.Load) else [node.id]
    if isinstance(node, ast.alias):
        return [node.asname or node.name]
    if isinstance(node, ast.Attribute | ast.MatchClass | ast.keyword | ast.ImportFrom | ast.Global | ast.Nonlocal):
        return []
    return _strings_of(node)


def _annotated(node: ast.ClassDef) -> list[str]:
    lines = [line.target for line in node.body if isinstance(line, ast.AnnAssign)]
    return [target.id for target in lines if isinstance(target, ast.Name)]
