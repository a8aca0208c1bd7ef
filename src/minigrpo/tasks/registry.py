"""Open a task by name: a built-in one, rg:NAME of reasoning-gym, judge:FILE or classifier:FOLDER, which score rows, or
your own as FILE.py:NAME.

NAME is a Task, a function from the Recipe to a Task, a reward function, or a list of reward functions, among which
judge:FILE and classifier:FOLDER may stand as text. Reward functions need rows: `task.data`, or `rows` (and `test_rows`)
in the same file, a list or a function that returns one. The file may also define `system`, a system prompt for rows
whose prompt is text, and `gold(prompt)`, a right answer.
"""

from __future__ import annotations

import difflib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from minigrpo.config.schema import Recipe, TaskConfig
from minigrpo.errors import MinigrpoError, TaskError
from minigrpo.tasks.builtin import gsm8k, reasoning_gym, sudoku, wordproblems
from minigrpo.tasks.common.dataset import has_half_character, read_data
from minigrpo.tasks.common.rewards import shorten_repr
from minigrpo.tasks.custom.ready_made import is_ready_made, open_ready_made
from minigrpo.tasks.custom.reward_functions import function_kind
from minigrpo.tasks.custom.reward_task import build_reward_task, read_rows
from minigrpo.tasks.custom.reward_task import reward_task as reward_task
from minigrpo.tasks.difficulty_filter import filter_by_difficulty
from minigrpo.types import Message, Prompt, Split, Task
from minigrpo.utils.faults import is_ctrl_c, told_as_task_error, words_of
from minigrpo.utils.paths import user_path

TASKS: dict[str, Callable[[Recipe], Task]] = {
    "wordproblems": wordproblems.wordproblems_task,
    "gsm8k": gsm8k.gsm8k_task,
    "sudoku": sudoku.sudoku_task,
}
_TASKS_WITH_DATA = ("gsm8k",)
_TASKS_WITH_EXAMPLE = ("gsm8k", "sudoku")
_SYSTEM_ROLE = "system"


def open_task(recipe: Recipe) -> Task:
    """Open the task that the recipe names, without the training prompts that `task.rates` finds too hard or too easy.

    Its prompts are checked when they are asked for: there must be some, and no id twice.
    """
    return filter_by_difficulty(
        _set_system_prompt(_check_prompts(_open_by_name(recipe)), recipe.task.system), recipe.task
    )


def _set_system_prompt(task: Task, words: str | None) -> Task:
    """Put this system message before every prompt, in place of its own; None changes nothing.

    Some templates add a system message where a conversation has none: an empty one prevents that.
    """
    if words is None:
        return task
    opening: Message = {"role": _SYSTEM_ROLE, "content": words}

    def prompts(split: Split) -> Sequence[Prompt]:
        return [
            replace(prompt, messages=(opening, *_drop_system_prompt(prompt.messages))) for prompt in task.prompts(split)
        ]

    return replace(task, prompts=prompts)


def _drop_system_prompt(messages: Sequence[Message]) -> Sequence[Message]:
    return messages[1:] if messages[0]["role"] == _SYSTEM_ROLE else messages


def _open_by_name(recipe: Recipe) -> Task:
    name = recipe.task.name
    if recipe.task.example and name not in _TASKS_WITH_EXAMPLE:
        raise TaskError(
            f"task.example has no meaning for {name}: only {' and '.join(_TASKS_WITH_EXAMPLE)} can show one."
        )
    if is_ready_made(name):
        return _open_ready_made_task(name, recipe.task)
    if ".py" in name:
        return _open_custom_task(name, recipe)
    if recipe.task.data and (name in TASKS or name.startswith("rg:")) and name not in _TASKS_WITH_DATA:
        raise TaskError(
            f"task.data has no meaning for {name}: its problems are its own. Data is for FILE.py:FUNCTION and "
            f"{', '.join(_TASKS_WITH_DATA)}."
        )
    if name in TASKS:
        return TASKS[name](recipe)
    if name.startswith("rg:"):
        return reasoning_gym.reasoning_gym_task(name.removeprefix("rg:"), recipe)
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(TASKS)}."
    raise TaskError(
        f"No task is called {name!r}. {hint} For your own: FILE.py:NAME; of reasoning-gym: rg:NAME; "
        "a model that judges: judge:FILE.yaml or classifier:FOLDER."
    )


def _open_ready_made_task(spec: str, config: TaskConfig) -> Task:
    """Open the task whose only reward is a judge or a classifier. Its rows come from `task.data`."""
    if not config.data:
        raise TaskError(f"{spec} scores rows, but there are none. Give --task.data FILE, a folder or a Hub data set.")
    function = open_ready_made(spec, Path.cwd())
    task = build_reward_task([function], read_data(config.data), name=function.__name__, weights=config.weights)
    return _limit_train_prompts(task, config.size)


def _open_custom_task(spec: str, recipe: Recipe) -> Task:
    """Open FILE.py:NAME. `task.size` limits its training prompts as for any other task."""
    file, found, name = spec.rpartition(":")
    if not found or not file.endswith(".py") or not name:
        raise TaskError(
            f"{spec!r} names no task. Write FILE.py:NAME; NAME: a Task, a function Recipe -> Task or a reward."
        )
    path = user_path(file)
    if not path.is_file():
        raise TaskError(f"{path} is missing. task.name {spec!r} asks for it; is the path right from {Path.cwd()}?")
    module = _load_module(path)
    if not hasattr(module, name):
        names = ", ".join(_list_candidates(module)) or "none"
        raise TaskError(f"{path} has no {name!r}. Tasks and functions in it: {names}.")
    with _file_named(path):
        value = open_ready_made(getattr(module, name), path.parent)
    if _is_reward_functions(value, f"{name} in {path}"):
        return _limit_train_prompts(_task_from_rewards(value, module, spec, recipe.task), recipe.task.size)
    if recipe.task.data and isinstance(value, Task):
        raise TaskError(f"task.data cannot reach into {spec!r}, a finished Task. Name a reward function instead.")
    task = value if isinstance(value, Task) else _build_task(value, path, name, recipe)
    if isinstance(value, Task) and recipe.task.weights:
        raise TaskError(
            f"task.weights cannot reach into {spec!r}, a finished Task. Make {name} a function Recipe -> Task that "
            "passes recipe.task.weights to minigrpo.tasks.common.rewards.reweighted or to minigrpo.reward_task."
        )
    return _limit_train_prompts(task, recipe.task.size)


def _is_reward_functions(value: object, where: str) -> bool:
    """Return whether the value is a reward function or a list of them.

    Raise TaskError for a list with anything else in it.
    """
    if not isinstance(value, list | tuple):
        return function_kind(value, where) is not None
    kinds = [function_kind(one, f"{where}, place {place}") for place, one in enumerate(value, 1)]
    if not kinds or None in kinds:
        raise TaskError(f"{where} is a list, but not of reward functions alone: each needs `completion(s)`.")
    return True


def _task_from_rewards(value: Any, module: ModuleType, spec: str, config: TaskConfig) -> Task:
    """Build the task of reward functions and their rows: from `task.data`, else from the same file."""
    path = Path(str(module.__file__))
    if config.data:
        table = read_data(config.data)
    elif hasattr(module, "rows"):
        with _faults_told(path, "It was making the rows."):
            table = read_rows(module.rows, getattr(module, "test_rows", None), f"{path}: ")
    else:
        raise TaskError(
            f"{spec} scores rows, but there are none. Give --task.data FILE (.jsonl, .json, .csv, .parquet, a folder, "
            "a Hub data set), or put `rows`, a list or a function that returns one, into the same file."
        )
    system, gold = _read_system(module, path), _read_gold(module, path)
    with _file_named(path):
        return build_reward_task(
            value if isinstance(value, list | tuple) else [value],
            table,
            name=spec.rpartition(":")[2],
            system=system,
            gold=gold,
            weights=config.weights,
            names={id(held): variable for variable, held in vars(module).items() if not variable.startswith("_")},
        )


def _read_system(module: ModuleType, path: Path) -> str | None:
    found = getattr(module, "system", None)
    if found is None or found == "":
        return None
    if not isinstance(found, str) or not found.strip() or has_half_character(found):
        raise TaskError(f"{path}: system is {shorten_repr(found)}. Make it text, the system message of all rows.")
    return found


def _read_gold(module: ModuleType, path: Path) -> Callable[[Prompt], str] | None:
    found = getattr(module, "gold", None)
    if found is not None and not callable(found):
        raise TaskError(f"{path}: gold is {shorten_repr(found)}. Make it a function: gold(prompt) -> text.")
    return found


def _load_module(path: Path) -> ModuleType:
    """Run the file as a module. Its folder is appended to the import path, last, so that it shadows nothing."""
    if str(path.parent.resolve()) not in sys.path:
        sys.path.append(str(path.parent.resolve()))
    spec = importlib.util.spec_from_file_location(f"minigrpo_own_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise TaskError(f"{path} cannot be read as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look up their module by name
    with _faults_told(path, "Mend the file and try again.", ours=True):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _file_named(path: Path) -> Iterator[None]:
    """Put the user's file before the sentences of the block's errors, which do not know it."""
    try:
        yield
    except TaskError as fault:
        raise TaskError(f"{path}: {fault}") from fault.__cause__


@contextmanager
def _faults_told(path: Path, rest: str, *, ours: bool = False) -> Iterator[None]:
    """Raise TaskError, with the line of the user's file, for whatever its code raises: SystemExit, too. Ctrl-C stays.

    `ours`: also for errors that are sentences already, and do not name the file.
    """
    try:
        yield
    except BaseException as fault:
        if is_ctrl_c(fault) or (isinstance(fault, MinigrpoError) and not ours):
            raise
        raise TaskError(f"{_describe_failure(path, fault)} {rest}") from fault


def _build_task(value: object, path: Path, name: str, recipe: Recipe) -> Task:
    if not callable(value):
        raise TaskError(
            f"{name} in {path} is a {type(value).__name__}. Make it a Task, a function Recipe -> Task or a reward."
        )
    with _faults_told(path, f"{name} was building the task."):
        task = value(recipe)
    if not isinstance(task, Task):
        raise TaskError(f"{name} in {path} returned a {type(task).__name__}. Return a minigrpo.types.Task.")
    return task


def _describe_failure(path: Path, fault: BaseException) -> str:
    """Describe the error and the deepest line of the user's file that led to it, not the line in a library below."""
    own = [frame.lineno for frame in traceback.extract_tb(fault.__traceback__) if Path(frame.filename) == path]
    line = fault.lineno if isinstance(fault, SyntaxError) and fault.filename == str(path) else own[-1] if own else None
    where = f"{path}, line {line}" if line else str(path)
    return f"{where}: {type(fault).__name__}: {fault.msg if isinstance(fault, SyntaxError) else words_of(fault)}."


def _list_candidates(module: ModuleType) -> list[str]:
    """Return names that could have been meant: tasks, and functions that the file defines itself."""
    return sorted(
        name
        for name, value in vars(module).items()
        if isinstance(value, Task) or (callable(value) and getattr(value, "__module__", None) == module.__name__)
    )


def _limit_train_prompts(task: Task, size: int) -> Task:
    def prompts(split: Split) -> Sequence[Prompt]:
        return task.prompts(split)[:size] if split == "train" else task.prompts(split)

    return replace(task, prompts=prompts)


def _check_prompts(task: Task) -> Task:
    def prompts(split: Split) -> Sequence[Prompt]:
        found = _ask_prompts(task, split)
        if not len(found):
            raise TaskError(f"The task {task.name} has no {split} prompts.")
        seen: set[str] = set()
        for prompt in found:
            if prompt.id in seen:
                raise TaskError(f"The task {task.name} has two {split} prompts with the id {prompt.id!r}.")
            seen.add(prompt.id)
        return found

    return replace(task, prompts=prompts)


def _ask_prompts(task: Task, split: Split) -> Sequence[Prompt]:
    """Return the task's own prompts. Raise TaskError for whatever its function raises, and for what are no prompts."""
    with told_as_task_error(f"The task {task.name}", f"when it was asked for its {split} prompts."):
        found = task.prompts(split)
    odd = [one for one in found if not isinstance(one, Prompt)] if isinstance(found, Sequence) else [found]
    if odd:
        raise TaskError(
            f"Among the {split} prompts of task {task.name} is {shorten_repr(odd[0])}. Return a list of "
            "minigrpo.Prompt."
        )
    return found
