"""The shape of the house: who may import whom, and how large things may grow. Read from the source, with `ast`."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from minigrpo.config import schema

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "minigrpo"

# Bottom first. A package imports from lower floors only: never from its own floor, never from one above.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("types", "errors", "versions"),
    ("config", "ui", "sandbox", "utils"),
    ("runs", "tasks", "algorithms", "distributed"),
    ("models",),
    ("rollouts",),
    ("training", "evaluation", "delivery"),
    ("pipeline", "view"),
    ("cli", "notebook", "", "__main__"),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
LIGHT = {"types", "errors", "versions", "config", "ui", "sandbox", "runs", "tasks", "view", "cli"}
"""What `minigrpo --help` and the graders load: nothing here may load torch when it is imported."""

FILE_LINES, FUNCTION_LINES, LOOP_LINES, STRAIGHT_LINES, POSITIONAL, NESTING = 500, 50, 80, 70, 5, 3
LOOP = "training.grpo.grpo"
"""The training loop may be longer than other functions: it is the page that is read."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_of(path: Path) -> str:
    """models.policy; rollouts.engines for its __init__; "" for the package's own face."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}
FACES = {module_of(path.parent / "__init__.py") for path in SOURCE.rglob("__init__.py")}


def package_of(module: str) -> str:
    return module.partition(".")[0]


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules of the project that a file names in its imports, wherever they stand; those for types alone count."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "minigrpo":
            base = (node.module or "").removeprefix("minigrpo").removeprefix(".")
            for alias in node.names:
                full = f"{base}.{alias.name}" if base else alias.name
                yield full if full in MODULES else base
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("minigrpo.") for a in node.names if a.name.startswith("minigrpo."))


def imported_at_once(tree: ast.Module) -> Iterator[str]:
    """Packages that are loaded when the module is: imports in functions and those for types alone do not count."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, Function | ast.Lambda) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        waiting += ast.iter_child_nodes(node)


GRAPH = {module: {other for other in imports(tree) if other != module} for module, tree in MODULES.items()}


def functions() -> Iterator[tuple[str, Function]]:
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{module}.{node.name}", node


def test_every_package_has_its_floor() -> None:
    assert {package_of(module) for module in MODULES} == set(FLOOR)


def test_packages_import_lower_packages_only() -> None:
    climbing = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in sorted(others)
        if package_of(other) != package_of(module) and FLOOR[package_of(other)] >= FLOOR[package_of(module)]
        if package_of(module) not in FLOORS[-1] or package_of(other) not in FLOORS[-1]
    ]
    assert not climbing


GRANTED = re.compile(r"with ([\w, ]+?) of \w+ itself")
"""The sentence by which a folder inside a package says which of its neighbours it may import."""


def neighbours(folder: str) -> set[str]:
    """Whatever modules of this folder import from the rest of their package: neighbouring folders, or files."""
    package = package_of(folder)
    inside = {module for module in MODULES if module == folder or module.startswith(f"{folder}.")}
    others = {other for module in inside for other in GRAPH[module] if package_of(other) == package} - inside
    return {other.split(".")[1] for other in others}


def test_a_folder_inside_a_package_imports_only_the_neighbours_that_its_docstring_grants() -> None:
    for folder in sorted(face for face in FACES if face.count(".") == 1):
        about = " ".join((ast.get_docstring(MODULES[folder]) or "").split())
        granted = GRANTED.search(about)
        allowed = set(re.findall(r"\w+", granted[1])) - {"and"} if granted else set()
        if f"the rest of {package_of(folder)}" not in about:
            assert neighbours(folder) <= allowed, folder


def test_modules_never_import_one_another_in_a_circle() -> None:
    graph = dict(GRAPH)
    while graph:
        leaves = {module for module, needs in graph.items() if not needs & graph.keys()}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {module: needs for module, needs in graph.items() if module not in leaves}


def test_what_the_command_line_loads_first_knows_no_torch() -> None:
    heavy = {"torch", "transformers", "peft", "datasets", "accelerate"}
    found = {
        module: sorted(heavy & {name.partition(".")[0] for name in imported_at_once(tree)})
        for module, tree in MODULES.items()
        if package_of(module) in LIGHT
    }
    assert not {module: names for module, names in found.items() if names}


def public_names(tree: ast.Module) -> Iterator[str]:
    """Classes, functions and constants that a module defines for others."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | Function):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def test_no_two_public_names_of_a_package_are_equal() -> None:
    homes: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module, tree in MODULES.items():
        for name in public_names(tree):
            if not name.startswith("_"):
                homes[package_of(module), name].append(module)
    assert not {f"{package}: {name}": where for (package, name), where in homes.items() if len(where) > 1}


def test_no_face_hands_out_the_name_of_a_module() -> None:
    """Such a name would be the function until that module is loaded, and the module ever after."""
    for face in FACES:
        handed = {
            alias.asname or alias.name
            for node in ast.walk(MODULES[face])
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        inside = {module.rpartition(".")[2] for module in MODULES if module and module.rpartition(".")[0] == face}
        assert not handed & inside, face


def test_files_fit_the_eye() -> None:
    files = [*SOURCE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {name: length for name, length in lengths.items() if length > FILE_LINES}


def limit_of(name: str, node: Function) -> int:
    if name == LOOP:
        return LOOP_LINES
    blocks = (ast.For, ast.While, ast.Try, ast.Match)
    straight = not any(isinstance(inner, blocks) for inner in ast.walk(node)) and depth(node) <= 1
    return STRAIGHT_LINES if straight else FUNCTION_LINES


def test_functions_fit_the_eye() -> None:
    long = {
        name: length
        for name, node in functions()
        if (length := (node.end_lineno or 0) - node.lineno + 1) > limit_of(name, node)
    }
    assert not long


def test_signatures_have_few_positional_parameters() -> None:
    counts = {name: [a.arg for a in (*node.args.posonlyargs, *node.args.args)] for name, node in functions()}
    # `ctx` is what torch hands to an autograd function before the caller's own arguments.
    own = {name: [arg for arg in args if arg not in ("self", "cls", "ctx")] for name, args in counts.items()}
    assert not {name: len(args) for name, args in own.items() if len(args) > POSITIONAL}


def depth(node: ast.AST) -> int:
    """How deep blocks stand in blocks. `elif` goes no deeper, and neither do comprehensions."""
    blocks = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
    deepest = 0
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        if not isinstance(child, Function | ast.Lambda):
            deepest = max(deepest, depth(child) + (isinstance(child, blocks) and not is_elif))
    return deepest


def test_blocks_are_not_nested_deep() -> None:
    assert not {name: depth(node) for name, node in functions() if depth(node) > NESTING}


def test_every_section_of_the_recipe_can_be_taken_in_at_a_glance() -> None:
    from minigrpo.config.fields import field_table

    sizes = Counter(knob.name.rpartition(".")[0] for knob in field_table())
    assert max(sizes.values()) <= 20
    assert len(sizes) <= 16


def test_names_in_recipes_are_those_of_the_registries() -> None:
    from minigrpo.algorithms.objective import OBJECTIVES
    from minigrpo.rollouts.engines.registry import ENGINES
    from minigrpo.tasks.registry import TASKS

    assert set(schema.OBJECTIVE_NAMES) == set(OBJECTIVES)
    assert set(schema.TASK_NAMES) == set(TASKS)
    assert set(schema.ENGINE_NAMES) == {"auto", *ENGINES}
