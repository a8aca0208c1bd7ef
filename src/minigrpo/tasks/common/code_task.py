"""Tasks whose answers are programs: find the one function in a text, and grade it by test cases in the sandbox.

    task = code_task([Problem("double", ("n",), "Twice the number.", cases=(((2,), 4), ((-1,), -2)))])

The form is strict, so that the intended function is graded: one fenced block that defines a function of the required
name and parameters. Text around the block is allowed, and other blocks that do not define it. Habits that gain nothing
are taken or stripped, because most models have them: helper functions, classes and the values that they use stay beside
the function; the module's docstring, annotations and their imports, example calls and a `__main__` block are left out
and never run (habits.py).
Everything else is refused with a reason. The program is only parsed here; it is executed only in the sandbox, where the
whole of it is executed afresh for every call, so that nothing outside the function can keep state.

Not covered: cases that can be guessed. Keep the cases out of the question.
"""

from __future__ import annotations

import ast
import hashlib
import math
import symtable
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from minigrpo.config.schema import SandboxConfig
from minigrpo.errors import TaskError
from minigrpo.tasks.common.cheating import find_cheats
from minigrpo.tasks.common.habits import StrippedProgram, is_docstring, is_plain_value, strip_habits
from minigrpo.types import Grade, Prompt, Split, Task

if TYPE_CHECKING:
    from minigrpo.sandbox import Outcome, Referee, Sandbox

_SOURCE_NAME = "<unread program>"
# For the whole process, because warnings.catch_warnings is not thread-safe. Compiler warnings about a model's program
# are of no use to the user.
warnings.filterwarnings("ignore", category=SyntaxWarning, module=_SOURCE_NAME)

_MAX_CHARS = 20_000  # far above any honest program
_FENCE = "```"
_LANGUAGES = ("", "python", "python3", "py")
_CLASS_LINES = (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.Pass)
_SYSTEM_PROMPT = (
    "Answer with one Python function in one fenced block (```python ... ```). Put every helper inside the function, "
    "and import nothing."
)
_RUNS_OF_CASES = 2  # they share one limit; a process for each error, and its start, come on top
_TEST_ONE_IN = 5  # one problem in five is in the test split


@dataclass(frozen=True, slots=True)
class ParsedProgram:
    """The source of a function. `missing`: why there is none; `refused`: why it cannot be locked down.

    `cheats`: forbidden uses that its text shows: imports, and names that hide what it does. `odd`: uses that no honest
    program needs but that gain nothing. `habits`: what was left out of the text because it is only a habit.
    """

    source: str = ""
    missing: str = ""
    refused: str = ""
    cheats: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()
    habits: tuple[str, ...] = ()

    @property
    def runs(self) -> bool:
        return not (self.missing or self.refused or self.cheats)

    @property
    def complaint(self) -> str:
        return ", ".join(self.cheats) or self.missing or self.refused


def find_program(text: str, name: str, parameters: Sequence[str]) -> ParsedProgram:
    """Find the function `name(*parameters)` in any text; nothing of it is executed."""
    source, fault = _extract_code_block(text, name)
    if fault:
        return ParsedProgram(missing=fault)
    try:
        tree = ast.parse(source, _SOURCE_NAME)
    except SyntaxError as error:
        return ParsedProgram(missing=f"syntax error: {error.msg}")
    except ValueError:  # null bytes, lone surrogates
        return ParsedProgram(missing="characters that Python does not read")
    except (RecursionError, MemoryError):
        return ParsedProgram(missing="nested too deeply")
    try:
        kept = strip_habits(tree, name)
        return _check_program(source if not kept.habits else kept.source, kept, name, tuple(parameters))
    except RecursionError:
        return ParsedProgram(missing="nested too deeply")


def _extract_code_block(text: str, name: str) -> tuple[str, str]:
    """Return (source of the fenced block, "") or ("", why there is none).

    Of several blocks, it is the one that defines the function; it is none where several do.
    """
    pieces = text.split(_FENCE)[:-1]
    if not pieces:
        return "", "no fenced block"
    if len(pieces) % 2:
        return "", "block not closed"
    blocks = list(zip(pieces[::2], pieces[1::2], strict=True))
    if len(blocks) > 1:
        blocks = [pair for pair in blocks if f"def {name}" in pair[1]]
        if len(blocks) != 1:
            return "", f"{'more than one block defines' if blocks else 'no block defines'} {name}"
    before, block = blocks[0]
    language, _, source = block.partition("\n")
    if before.rpartition("\n")[2].strip() or source.rpartition("\n")[2].strip():
        return "", "a fence is not on a line of its own"
    if language.strip().lower() not in _LANGUAGES:
        return "", "a block in another language"
    if len(source) > _MAX_CHARS:
        return "", f"more than {_MAX_CHARS} characters"
    return source.replace("\r\n", "\n"), ""


def _check_program(source: str, kept: StrippedProgram, name: str, parameters: tuple[str, ...]) -> ParsedProgram:
    tree = kept.tree
    scopes, fault = _read_scopes(source)
    cheats = tuple(sorted(set(find_cheats(tree, scopes))))
    if fault:
        return ParsedProgram(source, missing=fault, cheats=cheats)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    if not functions:
        return ParsedProgram(source, missing=_explain_missing(tree, name), cheats=cheats)
    refused = next(_find_refusals(tree, functions, parameters), "")
    odd = tuple(sorted(set(_find_oddities(functions[0]))))
    return ParsedProgram(source, refused=refused, cheats=cheats, odd=odd, habits=kept.habits)


def _read_scopes(source: str) -> tuple[symtable.SymbolTable | None, str]:
    """Return (symbol table of the program, "") or (None, the error of a program that parses but does not compile)."""
    try:
        return symtable.symtable(source, _SOURCE_NAME, "exec"), ""
    except SyntaxError as error:
        return None, f"syntax error: {error.msg}"


def _explain_missing(tree: ast.Module, name: str) -> str:
    """Describe what the program defines in place of the function."""
    kinds = {ast.ClassDef: "a class", ast.AsyncFunctionDef: "an async function"}
    for node in tree.body:
        if type(node) in kinds and getattr(node, "name", "") == name:
            return f"{kinds[type(node)]} in place of the function {name}"
    return f"no function {name}"


def _find_refusals(
    tree: ast.Module, functions: Sequence[ast.FunctionDef], parameters: tuple[str, ...]
) -> Iterator[str]:
    """Yield reasons why a function cannot be locked down: code that would run, or state that would stay, outside its
    calls.
    """
    function = functions[0]
    if len(functions) > 1:
        yield "the function is defined twice"
    if not all(_is_helper(node) for node in tree.body if node is not function):
        yield "code outside the function"
    if function.decorator_list:
        yield "a decorator"
    found = function.args
    if found.defaults or any(found.kw_defaults):
        yield "default arguments"
    if tuple(one.arg for one in (*found.posonlyargs, *found.args)) != parameters or (
        found.vararg or found.kwonlyargs or found.kwarg
    ):
        yield f"parameters other than ({', '.join(parameters)})"
    if getattr(function, "type_params", ()):
        yield "type parameters"
    if any(isinstance(node, ast.Yield | ast.YieldFrom) for node in _own_nodes(function)):
        yield "a generator"


def _is_helper(node: ast.stmt) -> bool:
    """Return whether a top-level statement may stand beside the function: a plain function or class, or a value."""
    if isinstance(node, ast.ClassDef):
        return all(map(_is_dataclass_decorator, node.decorator_list)) and all(
            isinstance(line, _CLASS_LINES) or is_docstring(line) for line in node.body
        )
    if isinstance(node, ast.FunctionDef):
        defaults = (*node.args.defaults, *filter(None, node.args.kw_defaults))
        return all(map(_is_cache, node.decorator_list)) and all(map(is_plain_value, defaults))
    return not isinstance(node, ast.AsyncFunctionDef)


def _is_dataclass_decorator(node: ast.expr) -> bool:
    return _decorator_name(node) in ("dataclass", "dataclasses.dataclass")


def _is_cache(node: ast.expr) -> bool:
    """Return whether a decorator is one of functools' caches, which begin empty at every call like all the rest."""
    return _decorator_name(node).removeprefix("functools.") in ("cache", "lru_cache")


def _decorator_name(node: ast.expr) -> str:
    return ast.unparse(node.func if isinstance(node, ast.Call) else node)


def _own_nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Yield all nodes of its body, except those of nested functions and classes."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def _find_oddities(function: ast.FunctionDef) -> Iterator[str]:
    """Yield attempts that gain nothing, because every call starts fresh and gets copies."""
    last = function.args.args[-1].arg if function.args.args else ""
    for node in ast.walk(function):
        if isinstance(node, ast.Global):
            yield "global variables"
        elif isinstance(node, ast.ClassDef):
            yield "a class of its own"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == function.name:
            yield "state kept on the function"
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del) and _root_name(node) == last:
            yield f"writes into {last}"


def _root_name(node: ast.AST) -> str:
    while isinstance(node, ast.Subscript | ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


# A task of functions graded by test cases


@dataclass(frozen=True, slots=True)
class Problem:
    """A function to be written. `cases`: (arguments, expected result); `gold`: the source of a correct solution."""

    name: str
    parameters: tuple[str, ...]
    asked: str
    cases: Sequence[tuple[tuple[Any, ...], Any]]
    gold: str = ""

    @property
    def signature(self) -> str:
        return f"{self.name}({', '.join(self.parameters)})"


def code_task(
    problems: Sequence[Problem],
    *,
    name: str = "code",
    test: Sequence[Problem] = (),
    sandbox: SandboxConfig | None = None,
) -> Task:
    """Prompts that ask for a function, and rewards: `works` (1: it runs), `passed` (share of the cases), each weight 1.

    A completion is solved when every case passed. Without `test`, a hash of the names puts about one problem in five
    aside. Pass `recipe.sandbox` as `sandbox` so that its settings hold. Raise TaskError where a problem has no case,
    two share a name, or there are fewer than two.
    """
    found = _split_problems(problems, test)
    config = sandbox or SandboxConfig()
    by_name = {problem.name: problem for problem in (*problems, *test)}

    def prompts(split: Split) -> Sequence[Prompt]:
        return [_make_prompt(problem) for problem in found[split]]

    def grade(prompt: Prompt, text: str) -> Grade:
        return _grade_program(by_name[prompt.target["function"]], text, config)

    def gold(prompt: Prompt) -> str:
        return format_code_block(by_name[prompt.target["function"]].gold)

    has_gold = all(problem.gold for problem in by_name.values())
    return Task(
        name,
        prompts,
        grade,
        gold if has_gold else None,
        about="functions judged by cases",
        grading_seconds=lambda side_by_side: longest_grading(config, _RUNS_OF_CASES, side_by_side),
    )


def _split_problems(problems: Sequence[Problem], test: Sequence[Problem]) -> dict[Split, list[Problem]]:
    every = [*problems, *test]
    if empty := [problem.name for problem in every if not problem.cases]:
        raise TaskError(f"The problem {empty[0]} has no case to judge by. Give (arguments, result) pairs.")
    names = [problem.name for problem in every]
    if twice := [one for one in names if names.count(one) > 1]:
        raise TaskError(f"Two problems are called {twice[0]}. Give each function a name of its own.")
    if test:
        return {"train": list(problems), "test": list(test)}
    if len(every) < 2:
        raise TaskError("Give at least two problems, or some as `test`: each split needs one.")
    aside = {one for one in names[1:] if hashlib.sha256(one.encode()).digest()[0] % _TEST_ONE_IN == 0} or {names[-1]}
    return {
        "train": [problem for problem in every if problem.name not in aside],
        "test": [problem for problem in every if problem.name in aside],
    }


def _make_prompt(problem: Problem) -> Prompt:
    asked = {"role": "user", "content": f"Write {problem.signature}. {problem.asked}"}
    return Prompt(problem.name, ({"role": "system", "content": _SYSTEM_PROMPT}, asked), {"function": problem.name})


def format_code_block(source: str) -> str:
    return f"{_FENCE}python\n{source.rstrip()}\n{_FENCE}"


def _grade_program(problem: Problem, text: str, config: SandboxConfig) -> Grade:
    program = find_program(text, problem.name, problem.parameters)
    if not program.runs:
        notes = {"cheats" if program.cheats else "program": program.complaint}
        return Grade(0.0, {"works": 0.0, "passed": 0.0}, formed=not program.missing, notes=notes)
    passed, fault = _run_cases(program, problem, config)
    if fault and fault.verdict == "infrastructure":
        return grade_sandbox_failure(fault)
    if fault and fault.verdict == "blocked":  # cases passed before that earn nothing either
        passed = 0
    share = passed / len(problem.cases)
    works = float(fault is None or passed > 0)
    notes = {"program": f"{fault.verdict}: {fault.detail}"} if fault else {}
    return Grade(works + share, {"works": works, "passed": share}, solved=passed == len(problem.cases), notes=notes)


def grade_sandbox_failure(outcome: Outcome) -> Grade:
    """Return a grade that leaves the completion out: the machine failed, not the program."""
    return Grade(math.nan, formed=False, notes={"grader": f"the sandbox could not run it: {outcome.detail}"})


def _run_cases(program: ParsedProgram, problem: Problem, config: SandboxConfig) -> tuple[int, Outcome | None]:
    """Return (cases passed, the first outcome that went wrong). A case that raises an error fails only itself.

    All cases share one limit of CPU time, also those that a fresh process goes on with after an error.
    """
    sandbox = open_sandbox(config)
    left = sandbox.limits.cpu_s
    passed: list[bool] = []
    first: Outcome | None = None
    while len(passed) < len(problem.cases):
        outcome = sandbox.run(
            program.source, problem.name, _case_referee(problem.cases[len(passed) :], passed), cpu_s=left
        )
        if outcome.verdict == "ok":
            break
        first = first or outcome
        if outcome.verdict != "error":
            return sum(passed), outcome
        passed.append(False)
        left -= outcome.cpu_s
        if left <= 0:
            return sum(passed), replace(outcome, verdict="timeout", detail="the cases used up their CPU time")
    return sum(passed), first


def open_sandbox(config: SandboxConfig, cpu_s: float | None = None) -> Sandbox:
    """Return the shared sandbox with the configured limits; `cpu_s` overrides the configured CPU seconds."""
    from minigrpo.sandbox import Limits, shared_sandbox

    limits = Limits(cpu_s=cpu_s or config.cpu_seconds, memory_mb=config.memory_mb)
    return shared_sandbox(limits, workers=config.workers, unsafe=config.unsafe)


def longest_grading(config: SandboxConfig, runs: int, side_by_side: int) -> float:
    """Return the seconds that grading may take within the sandbox's own limits: `runs` programs, one after the other.

    `side_by_side`: completions that are graded at once, and wait for the same workers.
    """
    sandbox = open_sandbox(config)
    return runs * math.ceil(side_by_side / sandbox.workers) * sandbox.limits.wall


def _case_referee(cases: Sequence[tuple[tuple[Any, ...], Any]], passed: list[bool]) -> Referee[None]:
    """Call the program with every case; append to `passed` whether each answer was right."""
    for arguments, expected in cases:
        answer = yield arguments
        passed.append(is_same_result(answer, expected))


def is_same_result(answer: Any, expected: Any) -> bool:
    """Return whether two values are equal and of one kind: True is not 1, a list is no tuple, but 2.0 is 2."""
    if isinstance(answer, bool) or isinstance(expected, bool) or answer is None or expected is None:
        return answer is expected
    if isinstance(answer, int | float) and isinstance(expected, int | float):
        return answer == expected or (answer != answer and expected != expected)
    if type(answer) is not type(expected):
        return False
    if isinstance(answer, list | tuple):
        return len(answer) == len(expected) and all(map(is_same_result, answer, expected))
    if isinstance(answer, dict):
        return answer.keys() == expected.keys() and all(is_same_result(answer[key], expected[key]) for key in expected)
    return bool(answer == expected)
