"""Tell imports that gain nothing from those that are forbidden.

Models import `deque`, `deepcopy`, `random` and the like out of habit. An imported object stays in the process, so it
must offer no place for notes that a later call could read: what is written in C takes no attribute, and what is written
in Python may only be called, never handed around. (Where `random` and the recursion limit stand is the sandbox's: each
call begins anew.) An import of anything else is a cheat.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from importlib import import_module

from minigrpo.tasks.common.hidden_access import catches_errors, holds_name, receives_tracebacks
from minigrpo.tasks.common.scopes import names_from_outside

Import = ast.Import | ast.ImportFrom

_ANNOTATION_MODULES = frozenset({"typing", "__future__", "collections.abc"})
"""Modules that honest programs import for their annotations, which are left out."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


VALUES = {
    "bisect": _words("bisect bisect_left bisect_right insort insort_left insort_right"),
    "collections": _words("OrderedDict defaultdict deque"),
    "functools": _words("cmp_to_key partial reduce"),
    "heapq": _words("heapify heappop heappush heappushpop heapreplace"),
    "itertools": _words(
        "accumulate chain combinations combinations_with_replacement compress count cycle dropwhile filterfalse "
        "groupby islice pairwise permutations product repeat starmap takewhile tee zip_longest"
    ),
    "math": _words(
        "acos asin atan atan2 ceil comb cos degrees dist e exp fabs factorial floor fmod fsum gcd hypot inf isclose "
        "isfinite isinf isnan isqrt lcm log log10 log2 modf nan perm pi pow prod radians sin sqrt tan tau trunc"
    ),
    "operator": _words(
        "add and_ contains eq floordiv ge getitem gt invert itemgetter le lt mod mul ne neg not_ or_ pow "
        "setitem sub truediv truth xor"
    ),
    "random": _words("choice choices gauss getrandbits randint random randrange sample seed shuffle uniform"),
    "string": _words("ascii_letters ascii_lowercase ascii_uppercase digits hexdigits punctuation whitespace"),
    "sys": _words("maxsize setrecursionlimit"),
    "time": _words("monotonic perf_counter perf_counter_ns process_time time time_ns"),
}
"""Objects to which nothing can be attached: they may be used in any way."""

CALLED = {
    "abc": _words("ABC abstractmethod"),
    "collections": _words("Counter namedtuple"),
    "copy": _words("copy deepcopy"),
    "dataclasses": _words("asdict astuple dataclass field replace"),
    "enum": _words("Enum IntEnum auto"),
    "functools": _words("cache lru_cache"),
    "heapq": _words("merge nlargest nsmallest"),
    "json": _words("dumps loads"),
    "pprint": _words("pformat pp pprint"),
    "random": _words("Random"),
    "re": _words("compile findall finditer fullmatch match search split sub"),
    "string": _words("capwords"),
    "typing": _words("NamedTuple cast"),
}
"""Python objects that may be called, decorate, or be the base of a class, but may not be passed on as values."""

_WITH_CLASS = _words("ABC Counter Enum IntEnum Random asdict astuple auto copy deepcopy field")
"""Those whose results have a class that could keep notes, or that follow what a class says of itself: beside them no
program may ask for the class of a value."""

_BASES = _words("ABC Enum IntEnum")
"""Those of them that may still be the base of a class."""

_WITH_ERRORS = _words("copy dataclasses json re")
"""Modules whose errors have such a class, too: it matters where a program may catch them."""

_COPIERS = _words("asdict astuple copy deepcopy")
_COPIED_BY = _words("__getattr__ __getattribute__ __reduce__ __reduce_ex__")
"""Methods that tell `copy` which attributes to set on which object: no program may define them beside it."""


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


class ImportUse:
    """How a program uses what it imports."""

    def __init__(self, nodes: Sequence[ast.AST]) -> None:
        self.parents = {id(child): node for node in nodes for child in ast.iter_child_nodes(node)}
        self.names = [node for node in nodes if isinstance(node, ast.Name)]
        self.asks_class = any(name.id == "type" for name in self.names) or any(map(self._is_class_of, nodes))
        self.catches = catches_errors(nodes) or receives_tracebacks(nodes)
        self.guides_copies = holds_name(nodes, _COPIED_BY)

    def uses(self, alias: ast.alias) -> list[ast.Name]:
        bound = alias.asname or alias.name.partition(".")[0]
        return [name for name in self.names if name.id == bound]

    def is_harmless(self, node: Import, alias: ast.alias) -> bool:
        """Return whether neither an import nor any use of its name gains anything."""
        if (alias.asname or alias.name).startswith("__") or self._is_in_class(node):
            return False
        if isinstance(node, ast.ImportFrom) and alias.name == "*":
            return not node.level and self._may_use_all(node.module or "")
        names = [name for name in self.uses(alias) if isinstance(name.ctx, ast.Load)]
        if isinstance(node, ast.ImportFrom):
            known = not node.level and self._may_use(node.module or "", alias.name, None)
            return known and all(
                self._may_use(node.module or "", alias.name, name) or self._means_another(name, node) for name in names
            )
        return (alias.name in VALUES or alias.name in CALLED) and all(
            self._may_use_member(alias.name, self.parents[id(name)]) or self._means_another(name, node)
            for name in names
        )

    def _means_another(self, name: ast.Name, node: Import) -> bool:
        """Return whether a name is that of a function around it, which does not contain the import."""
        around, above = {id(one) for one in self._above(node)}, self._above(name)
        functions = (one for one in above if isinstance(one, ast.FunctionDef) and id(one) not in around)
        read = map(names_from_outside, functions)
        return any(names is not None and name.id not in names for names in read)

    def _above(self, node: ast.AST) -> Iterator[ast.AST]:
        """Yield the nodes around a node, from the innermost."""
        above = self.parents.get(id(node))
        while above is not None:
            yield above
            above = self.parents.get(id(above))

    def _may_use_member(self, module: str, node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and self._may_use(module, node.attr, node)

    def _may_use_all(self, module: str) -> bool:
        """Return whether every public name of a module that is read, or might be, gains nothing."""
        if module not in VALUES and module not in CALLED:
            return False
        public = vars(import_module(module))
        read = [name for name in self.names if isinstance(name.ctx, ast.Load) and name.id in public]
        return all(self._may_use(module, name.id, name) for name in read)

    def _may_use(self, module: str, name: str, node: ast.Name | ast.Attribute | None) -> bool:
        """Return whether an imported object may stand where `node` is; None where it stands nowhere."""
        if name in VALUES.get(module, ()):
            return node is None or isinstance(node.ctx, ast.Load)
        if name not in CALLED.get(module, ()):
            return False
        if self.asks_class and (name in _WITH_CLASS or (self.catches and module in _WITH_ERRORS)):
            return False
        if name in _COPIERS and self.guides_copies:
            return False
        above = self.parents.get(id(node))
        if isinstance(above, ast.Call):
            return above.func is node
        if isinstance(above, ast.ClassDef):
            return name not in _WITH_CLASS or name in _BASES
        return node is None or (isinstance(above, ast.FunctionDef) and node in above.decorator_list)

    def _is_in_class(self, node: ast.AST) -> bool:
        """Return whether what a statement binds becomes an attribute of a class."""
        scopes = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        return isinstance(next((one for one in self._above(node) if isinstance(one, scopes)), None), ast.ClassDef)

    def _is_class_of(self, node: ast.AST) -> bool:
        """Return whether a node reads the class of a value, and not only its name."""
        above = self.parents.get(id(node))
        named = isinstance(above, ast.Attribute) and above.attr == "__name__"
        return isinstance(node, ast.Attribute) and node.attr == "__class__" and not named
