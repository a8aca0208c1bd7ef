"""The shape of the house: who may import whom, and how large things may grow. Read from the source, with `ast`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from minigrpo import config

SOURCE = Path(__file__).parents[1] / "src" / "minigrpo"
FLOORS: tuple[tuple[str, ...], ...] = (
    # 0 words
    ("types", "config", "errors", "rundir", "lock", "knobs", "entries", "recipefile", "versions"),
    # 1 parts: no model
    (
        *(
            "objective",
            "advantages",
            "entropy",
            "shaping",
            "packing",
            "attention",
            "stretches",
            "products",
            "highwater",
            "process_state",
            "noise",
            "render",
            "adapter",
            "lora",
            "fused",
            "scoring",
        ),
        *("grading", "rewards", "tasks", "metrics", "interrupt", "stamps", "alarms", "explosion", "tensorfile"),
        *("markdown",),
        "sandbox",
    ),
    # 2 machines
    (
        *("policy", "loading", "engines", "rollout", "grader", "measure", "checkpoint", "track", "display", "plan"),
        *("shadow", "decoding", "budget", "shortage", "forecast"),
        *("progress", "grade_completions", "serialize", "plain_tables", "http_client"),
        *("sampler", "teaching", "journal", "keeper", "quantize", "precision"),
        *("seedling", "coder", "demonstrations", "imitation", "doctor"),
        *("basemodel", "merging", "divergence", "held", "delivery", "proof"),
        *("pretokenizer", "ggufwriter", "converter", "convertworker", "ggufquant", "ggufproof", "modelfile"),
        *("ggufhead", "launching", "servers", "servable", "serveworker"),
        *("hub",),
    ),
    # 3 verbs
    (
        *("preflight", "warmup", "grpo", "evaluate", "checktask", "tables", "parity"),
        *("check", "merge", "export", "verify", "card", "parcels", "publish", "serve"),
    ),
    # 4 road
    ("pipeline", "pipeline_context", "beginning", "judging", "ending"),
    # 5 door
    ("cli", "door", "delivering", "notebook", "__init__"),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
VERBS = (
    *("preflight", "warmup", "grpo", "evaluate", "checktask"),
    *("check", "merge", "export", "verify", "publish", "serve"),
)
WORDS = FLOORS[0]

FILE_LINES, FUNCTION_LINES, LOOP_LINES, POSITIONAL, NESTING = 500, 50, 80, 5, 3
LOOPS = ("grpo.grpo",)
"""The training loop may be longer than other functions: it is the page that is read."""

FILES = sorted(SOURCE.rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_of(path: Path) -> str:
    """policy; engines.native; engines for its __init__."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def floor_of(module: str) -> int:
    """A package stands on one floor with all that is in it."""
    return FLOOR[module.partition(".")[0]]


MODULES = {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules of the package that a file imports at run time, wherever in it; not those under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "minigrpo":
            yield from named(node)
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("minigrpo.") for a in node.names if a.name.startswith("minigrpo."))
        yield from imports(node)


def named(node: ast.ImportFrom) -> Iterator[str]:
    """`from minigrpo import tables` and `from minigrpo.engines import native` name modules; other names are in one."""
    base = (node.module or "").removeprefix("minigrpo").removeprefix(".")
    for alias in node.names:
        full = f"{base}.{alias.name}" if base else alias.name
        yield full if full in MODULES else base or "__init__"


def functions() -> Iterator[tuple[str, Function]]:
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{module}.{node.name}", node


def test_every_module_has_its_floor() -> None:
    homeless = sorted({module.partition(".")[0] for module in MODULES} - FLOOR.keys())
    assert not homeless, f"give {homeless} a place in FLOORS and in the architecture's picture"


def test_imports_go_down_or_stay_on_their_floor() -> None:
    known = {module: tree for module, tree in MODULES.items() if module.partition(".")[0] in FLOOR}
    climbing = [
        f"{module} (floor {floor_of(module)}) imports {other} (floor {floor_of(other)})"
        for module, tree in known.items()
        for other in sorted(set(imports(tree)))
        if other.partition(".")[0] in FLOOR and floor_of(other) > floor_of(module)
    ]
    assert not climbing


def test_verbs_never_import_one_another() -> None:
    assert not [(verb, other) for verb in VERBS for other in imports(MODULES[verb]) if other in VERBS]


def test_imports_never_run_in_a_circle() -> None:
    graph = {module: {other for other in imports(tree) if other != module} for module, tree in MODULES.items()}
    while graph:
        leaves = {module for module, needs in graph.items() if not needs & graph.keys()}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {module: needs for module, needs in graph.items() if module not in leaves}


def test_the_sandbox_knows_nothing_of_the_package_but_its_errors() -> None:
    own = {module: tree for module, tree in MODULES.items() if module.partition(".")[0] == "sandbox"}
    nodes = [node for tree in own.values() for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    found = {(node.module or "").partition("minigrpo.")[2].partition(".")[0] for node in nodes}
    assert found - {"", "sandbox"} == {"errors"}


@pytest.mark.parametrize("module", WORDS)
def test_the_ground_floor_knows_no_torch(module: str) -> None:
    heavy = {"torch", "transformers", "peft", "datasets", "numpy", "accelerate"}
    tree = MODULES[module]
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.partition(".")[0] for name in names} & heavy


def test_files_fit_the_eye() -> None:
    tests = sorted(Path(__file__).parent.rglob("*.py"))
    lengths = {str(path.name): len(path.read_text(encoding="utf-8").splitlines()) for path in [*FILES, *tests]}
    assert not {name: length for name, length in lengths.items() if length > FILE_LINES}


def test_functions_fit_the_eye() -> None:
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions()}
    limits = {name: LOOP_LINES if name in LOOPS else FUNCTION_LINES for name in lengths}
    assert not {name: length for name, length in lengths.items() if length > limits[name]}


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
    from collections import Counter

    from minigrpo.knobs import knob_table

    sizes = Counter(knob.name.rpartition(".")[0] for knob in knob_table())
    assert max(sizes.values()) <= 20
    assert len(sizes) <= 15


def test_names_in_recipes_are_those_of_the_registries() -> None:
    from minigrpo.engines import ENGINES
    from minigrpo.objective import OBJECTIVES
    from minigrpo.tasks import TASKS

    assert set(config.OBJECTIVE_NAMES) == set(OBJECTIVES)
    assert set(config.TASK_NAMES) == set(TASKS)
    assert set(config.ENGINE_NAMES) == {"auto", *ENGINES}
